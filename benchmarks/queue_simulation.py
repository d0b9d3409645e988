"""The queue under 200 workers and 20,000 runs on PostgreSQL, without torch: `make simulate-queue`.

The workers are the very keepers of `studio worker tuner`; only what they start is a thread instead
of a process, which "computes" by sleeping. A tenth of the workers have a large GPU and take several
runs at once; some workers and runs die on the way, people move runs and hold the queue meanwhile.
Each worker has a connection of its own at times, so the server is started with room for all.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from contextlib import ExitStack
from typing import Any

from sqlalchemy import create_engine, func, insert, select, text

from app import database, order, points, runs, schedule, tables, workers
from app.capacity import gpu_name
from app.errors import Conflict, LostClaim
from app.points import Measured
from app.settings import settings
from app.tables import BaseModel, Dataset, Event, Experiment, Run, Worker
from tests.servers import die_with_tests, new_database, serving_postgres
from worker import keeper
from worker.tuner import Tuner

SIZES = ((0.89, 4_000, 14_000), (0.10, 30_000, 45_000), (0.01, 70_000, 78_000))  # MB, from and to
LARGE_MB, SMALL_MB = 80_000.0, 16_000.0
LEASE_SECONDS = 10.0  # so that runs of workers that died come back within the simulation
TABLES = ("run", "event", "point", "worker")


class Pretended:
    """A child that is a thread: it takes the line that says which run, and sleeps over it."""

    returncode: int | None = None

    def __init__(self, tuner: "Simulated") -> None:
        self.tuner, self.stdin, self.pid = tuner, self, os.getpid()
        self.over = threading.Event()
        with database.session() as db:
            memory = LARGE_MB if tuner.large else SMALL_MB
            workers.describe(db, tuner.worker.id, tuner.device, memory)

    def write(self, line: str) -> None:
        """Begin, as a real child does when it has read the line."""
        told = json.loads(line)
        threading.Thread(target=self._work, args=(told["run"], told["attempt"])).start()

    def flush(self) -> None:
        """Nothing is kept back."""

    def _work(self, run_id: str, attempt: int) -> None:
        try:
            with database.session() as db:
                run = runs.get(db, run_id)
                self.tuner.claimed.append((run_id, attempt, run.position, time.time()))
                runs.progress(db, run_id, attempt, phase="training", num_steps=4)
                points.rewind(db, run_id, attempt, 0)
            dies = attempt == 1 and random.random() < 0.01
            for step in range(1, 5):
                self.over.wait(run.params["seconds"] / 4)
                if self.tuner.dead or self.over.is_set() or (dies and step == 3):
                    return self._end(1)
                with database.session() as db:
                    points.record(db, run_id, attempt, [_measured(step)])
            with database.session() as db:
                runs.finish(db, run_id, attempt)
            self.tuner.finished += 1
        except LostClaim:
            self.tuner.lost += 1
        self._end(0)

    def _end(self, code: int) -> None:
        self.returncode = code
        self.over.set()

    def poll(self) -> int | None:
        """Its exit code, once it has one."""
        return self.returncode

    def wait(self) -> None:
        """Until it has ended."""
        self.over.wait()

    def kill(self) -> None:
        """End it."""
        self._end(-9)

    def send_signal(self, _number: int) -> None:
        """As a real child that saves: hands nothing back here."""
        self._end(75)


class Simulated(Tuner):
    """A tuner whose children are threads."""

    def __init__(self, number: int, large: bool) -> None:
        super().__init__()
        self.worker.id = f"w{number:03}-{random.randrange(16**6):06x}"
        self.number, self.large = number, large
        self.device = gpu_name("simulated") if large else "CPU"
        self.dead = False
        self.claimed: list[tuple[str, int, float, float]] = []
        self.finished = self.lost = 0
        self.claims: list[float] = []  # seconds that each took

    def child(self, module: str, *arguments: str) -> Any:
        """A thread instead of a process."""
        return Pretended(self)

    def _claim(self) -> bool:
        began = time.monotonic()
        found = super()._claim()
        if found:
            self.claims.append(time.monotonic() - began)
        return found

    def look(self) -> None:
        """As ever, until it dies."""
        if self.dead:
            raise SystemExit  # its children stop with it; nobody lets go of anything
        super().look()


def _measured(step: int) -> Measured:
    return Measured("train", step, step / 4, 1.0, 1e-4, 1.0, 100.0, 900.0, float(step), step * 100)


def _fill(num_runs: int, draw: random.Random, mean_seconds: float) -> None:
    with database.session() as db:
        base = BaseModel(name="Base", source="folder", address="base", state="ready")
        data = Dataset(name="Data", fingerprint="0", num_examples=100, num_bytes=10_000)
        db.add_all([base, data])
        db.flush()
        split = {"train": list(range(80)), "validation": [80], "test": [81]}
        rows: list[dict[str, Any]] = []
        for number in range(num_runs):
            if number % 4 == 0:
                about = {"base_model_id": base.id, "dataset_id": data.id, "seed": 1}
                words = {
                    "name": f"Experiment {number}",
                    "task": "generation",
                    "template": "{{input}}",
                }
                experiment = Experiment(**about, **words, split=split)
                db.add(experiment)
                db.flush()
            _, low, high = draw.choices(SIZES, [share for share, _, _ in SIZES])[0]
            need, seconds = draw.uniform(low, high), draw.expovariate(1 / mean_seconds)
            told = seconds * draw.uniform(0.5, 2.0)  # forecasts are wrong by up to two times
            figures = {"memory_mb": need, "gpu_memory_mb": need, "seconds": told, "bytes": 1}
            rows.append(
                {
                    "id": f"r{number:06}",
                    "experiment_id": experiment.id,
                    "method": "lora",
                    "params": {"seconds": seconds, "batch_size": 8, "num_epochs": 3},
                    "forecast": figures,
                    "position": float(number),
                }
            )
        db.execute(insert(Run), rows)
        db.commit()
        db.execute(text("ANALYZE"))
        db.commit()


def _process(numbers: list[int], large: int, until: Any, said: Any) -> None:
    """Some of the workers, each with its own keeper thread."""
    die_with_tests(signal.SIGKILL)
    settings.lease_seconds = LEASE_SECONDS
    database.engine().dispose(close=False)
    tuners = [Simulated(number, number < large) for number in numbers]
    for tuner in tuners:
        tuner.start()
    gone = []
    while not until.wait(5.0):
        if random.random() < 0.15:  # one dies, and is started anew
            place = random.randrange(len(tuners))
            tuners[place].dead = True
            gone.append(tuners[place])
            tuners[place] = Simulated(tuners[place].number, tuners[place].large)
            tuners[place].start()
    for tuner in tuners:
        tuner.stop()
    everyone = [*tuners, *gone]
    with open("/proc/self/status") as status:
        peak = next(line for line in status if line.startswith("VmHWM:")).split()[1]
    said.put(
        {
            "claimed": [one for tuner in everyone for one in tuner.claimed],
            "claims": [one for tuner in everyone for one in tuner.claims],
            "finished": sum(tuner.finished for tuner in everyone),
            "lost": sum(tuner.lost for tuner in everyone),
            "died": len(gone),
            "peak_mb": int(peak) / 1024,
        }
    )


def _people(until: Any, draw: random.Random, moves: list[float]) -> None:
    """Move runs about, and hold the queue once in a while."""
    while not until.wait(1.0):
        began = time.monotonic()
        with database.session() as db:
            waiting = list(db.scalars(select(Run.id).where(Run.state == "queued").limit(200)))
            if waiting:
                try:
                    order.move(db, draw.choice(waiting), draw.choice(["up", "down", "next"]))  # type: ignore[arg-type]
                except Conflict:
                    db.rollback()
        moves.append(time.monotonic() - began)


def _state(db: Any) -> dict[str, Any]:
    found = {
        table: db.scalar(text(f"SELECT pg_total_relation_size('{table}')")) for table in TABLES
    }
    dead = db.execute(text("SELECT relname, n_live_tup, n_dead_tup FROM pg_stat_user_tables")).all()
    return {
        "megabytes": {table: round(size / 1e6, 1) for table, size in found.items()},
        "rows": {name: (live, dead) for name, live, dead in dead if name in TABLES},
        "connections": db.scalar(
            text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
        ),
    }


def _watch(num_runs: int, patience: float) -> tuple[list[tuple[float, int]], int, list[float]]:
    """Until everything has ended: claims over time, most connections, seconds of a queue's page."""
    told, most, pages = [], 0, []
    began = time.monotonic()
    while time.monotonic() - began < patience:
        with database.reading() as db:
            counts = dict(db.execute(select(Run.state, func.count()).group_by(Run.state)).all())  # type: ignore[arg-type]
            claimed = db.scalar(select(func.sum(Run.attempt))) or 0
            most = max(most, _state(db)["connections"])
            at = time.monotonic()
            schedule.show(db)
            pages.append(time.monotonic() - at)
        told.append((time.monotonic() - began, int(claimed)))
        if counts.get("succeeded", 0) + counts.get("failed", 0) == num_runs:
            break
        print(f"{told[-1][0]:6.0f} s: {counts}", flush=True)
        time.sleep(5)
    return told, most, pages


def _overtaken(claimed: list[tuple[str, int, float, float]]) -> dict[str, int]:
    """For each run, how many that were queued behind it began before it did, at first attempts."""
    first = sorted((at, position) for _, attempt, position, at in claimed if attempt == 1)
    waits: dict[str, int] = {}
    # By a tree of counts over positions: a run at rank k was overtaken by those already begun beyond.
    ranks = {position: rank for rank, position in enumerate(sorted(p for _, p in first), 1)}
    tree = [0] * (len(first) + 1)
    names = {position: run_id for run_id, _, position, _ in claimed}
    for begun, (_, position) in enumerate(first):
        rank, before = ranks[position], 0
        place = rank
        while place:
            before += tree[place]
            place -= place & -place
        waits[names[position]] = begun - before
        place = rank
        while place <= len(first):
            tree[place] += 1
            place += place & -place
    return waits


def main() -> None:
    """Fill the queue, let the workers empty it, and print what was seen."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--workers", type=int, default=200)
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.5, help="mean length of a run")
    parser.add_argument("--patience", type=float, default=3600.0)
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: exit(1))
    with ExitStack() as stack:
        settings.home = stack.enter_context(tempfile.TemporaryDirectory())
        most = chosen.workers * 2 + 50
        server = stack.enter_context(serving_postgres(options=("-c", f"max_connections={most}")))
        settings.database_url = new_database(server)
        keeper.LOOK_SECONDS = 2.0
        _simulate(chosen)


def _simulate(chosen: argparse.Namespace) -> None:
    draw = random.Random(1)
    maker = create_engine(database.url())
    tables.Table.metadata.create_all(maker)
    maker.dispose()
    _fill(chosen.runs, draw, chosen.seconds)
    with database.session() as db:
        before = _state(db)
        plan = db.execute(
            text(
                "EXPLAIN SELECT id FROM run WHERE state = 'queued' "
                "ORDER BY position, id LIMIT 1 FOR UPDATE SKIP LOCKED"
            )
        ).scalars()
        print("\n".join(plan))
    database.engine().dispose()
    spawn = multiprocessing.get_context("fork")
    until, said = spawn.Event(), spawn.Queue()
    numbers = [
        list(range(chosen.workers))[first :: chosen.processes] for first in range(chosen.processes)
    ]
    processes = [
        spawn.Process(target=_process, args=(some, max(1, chosen.workers // 10), until, said))
        for some in numbers
    ]
    for process in processes:
        process.start()
    moves: list[float] = []
    person = threading.Thread(target=_people, args=(until, draw, moves), daemon=True)
    person.start()
    try:
        told, most, pages = _watch(chosen.runs, chosen.patience)
    finally:
        until.set()
    found = [said.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    _report(chosen, before, told, most, pages, moves, found)


def _report(
    chosen: argparse.Namespace,
    before: dict[str, Any],
    told: list[tuple[float, int]],
    most: int,
    pages: list[float],
    moves: list[float],
    found: list[dict[str, Any]],
) -> None:
    claimed = [tuple(one) for some in found for one in some["claimed"]]
    pairs = [(run_id, attempt) for run_id, attempt, _, _ in claimed]
    waits = _overtaken(claimed)  # type: ignore[arg-type]
    with database.session() as db:
        db.execute(text("ANALYZE"))
        db.commit()
        states = dict(db.execute(select(Run.state, func.count()).group_by(Run.state)).all())  # type: ignore[arg-type]
        needs = {
            run_id: told["memory_mb"] for run_id, told in db.execute(select(Run.id, Run.forecast))
        }
        ends = db.execute(
            select(Event.run_id, func.count())
            .where(Event.message == "Finished.")
            .group_by(Event.run_id)
        ).all()
        after = _state(db)
        gone = db.scalar(select(func.count()).select_from(Worker))
    seconds, total = told[-1]
    begun = sum(attempts for _, attempts in told[-1:])
    print(f"\nruns by state at the end: {states}")
    print(f"claims: {begun} in {seconds:.0f} s = {total / seconds:.0f} a second")
    print(
        f"doubles: {len(pairs) - len(set(pairs))} of {len(pairs)}; ended twice: {sum(n > 1 for _, n in ends)}"
    )
    print(
        f"workers that died: {sum(some['died'] for some in found)}; writes refused: {sum(some['lost'] for some in found)}"
    )
    for _, low, high in SIZES:
        some = sorted(waits[run_id] for run_id in waits if low <= needs[run_id] <= high)
        if some:
            print(
                f"runs of {low / 1000:.0f} to {high / 1000:.0f} GB: {len(some)}, begun {len(some)}; overtaken by: "
                f"median {statistics.median(some):.0f}, most {some[-1]}"
            )
    took = sorted(one for some in found for one in some["claims"])
    print(
        f"a claim: median {statistics.median(took) * 1000:.0f} ms, "
        f"99 of 100 within {took[int(0.99 * len(took))] * 1000:.0f} ms"
    )
    print(f"queue's page: median {statistics.median(pages):.2f} s, most {max(pages):.2f} s")
    print(f"a move: median {statistics.median(moves):.2f} s, most {max(moves):.2f} s")
    print(f"connections: most {most}; worker rows at the end: {gone}")
    print(
        f"peak memory of a process of {chosen.workers // chosen.processes} workers: {max(some['peak_mb'] for some in found):.0f} MB"
    )
    for what in ("megabytes", "rows"):
        print(f"{what} before: {before[what]}\n{what} after:  {after[what]}")


if __name__ == "__main__":
    main()
