"""Many watch a run while it trains, and many ask for pages: all is answered, and nothing is lost."""

import asyncio
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session

from app import database, datasets, points, storage
from app.tables import Point, Run
from tests import factories
from tests.faults import small
from tests.faults.load import Event, Load, Target
from tests.faults.plant import Plant, reaches, until

PAGE_SECONDS, POINT_SECONDS = 0.4, 1.0
ROWS = [(f"{n} {'abcdef'[n % 6]}", factories.LABELS[n % 3]) for n in range(2000)]


@pytest.mark.parametrize(
    ("num_watchers", "rate", "seconds", "worker"),
    [
        pytest.param(20, 10, 5, "quick tuner", id="short"),
        pytest.param(200, 50, 60, "tuner", id="long", marks=pytest.mark.faults),
    ],
)
def test_many_watch_and_many_ask_while_a_run_trains(
    db: Session,
    model: Path,
    plant: Plant,
    num_watchers: int,
    rate: int,
    seconds: int,
    worker: str,
) -> None:
    """Nothing fails, and each point comes to each watcher once. The long form holds it to times, too:
    they are for a machine that has nothing else to do.
    """
    training, waiting = _studio(db, model)
    db.close()
    plant.environment |= {"STUDIO_CHECKPOINT_SECONDS": "60", "STUDIO_LEASE_SECONDS": "30"}
    plant.start("web")
    plant.start(worker)
    until(lambda: small.now(training.id).step >= 1)
    web = plant.web()  # one that has just begun still has its templates to read
    assert {web.get(address).status_code for address in _addresses(training)} == {200}
    web.close()
    load = Load(
        Target(plant.port, storage.token()),
        stream=f"/experiments/{training.experiment_id}/events",
        ends=[f"/api/runs/{run.id}/cancel" for run in (waiting, training)],
        addresses=_addresses(training),
        num_watchers=num_watchers,
        rate=rate,
        seconds=seconds,
    )
    before = {name: _worked(plant, name) for name in plant.running}
    began = time.monotonic()
    used: dict[str, float] = {}

    def count() -> None:
        lasted = time.monotonic() - began
        used.update({name: (_worked(plant, name) - before[name]) / lasted for name in before})

    load.at_end = count
    asyncio.run(load.run())
    reaches(training.id, "cancelled")

    _tell(load, used)
    assert [wrong for _, _, wrong in load.answers if wrong] == []
    assert len(load.answers) == rate * seconds
    delays = _delays(load, training.id)
    print(_line("Points at watchers", delays))
    pages = [took for _, took, _ in load.answers]
    if seconds > 10:
        assert _share(pages, 0.99) < PAGE_SECONDS
        assert max(delays) < POINT_SECONDS


def _studio(db: Session, model: Path) -> tuple[Run, Run]:
    """A studio with something on its pages; two runs of its newest experiment, the first to train."""
    of = small.experiment(db, model)
    of.dataset_id = factories.dataset(db, ROWS).id
    of.split = datasets.split(len(ROWS), 1)
    db.commit()
    scores = {"primary": "accuracy", "metrics": {"accuracy": 0.5, "macro_f1": 0.5}}
    ended: dict[str, Any] = {"state": "succeeded", "scores": scores, "num_steps": 100, "step": 100}
    ended |= {"last_number": 101, "deleted_at": time.time(), "finished_at": time.time()}
    for name in "ABCDEFGHIJ":
        other = factories.experiment(db, of.base_model, of.dataset, name=f"Question {name}")
        for method in factories.METHODS:
            run = factories.run(db, other, method=method, **ended)
            curve = [factories.measured(step) for step in range(1, 101)]
            curve.append(factories.measured(100, "validation"))
            for number, point in enumerate(curve, 1):
                db.add(Point(run_id=run.id, number=number, attempt=1, **point._asdict()))
    db.commit()
    training = small.run(db, of, num_epochs=50)
    return training, small.run(db, of, method="prompt_tuning", num_epochs=50)


def _addresses(run: Run) -> Sequence[str]:
    """Pages, what pages ask for by themselves, and what programs ask for, as a person's day has it."""
    of = run.experiment_id
    return [
        "/",
        f"/experiments/{of}",
        f"/api/runs/{run.id}",
        "/experiments",
        "/now",
        f"/runs/{run.id}",
        "/queue",
        f"/api/experiments/{of}",
        f"/experiments/{of}",
        "/queue/lines",
        f"/runs/{run.id}/panel",
        "/api/queue",
        "/experiments",
        f"/experiments/{of}/comparison",
        "/now",
        f"/api/runs/{run.id}/points",
        "/",
        f"/runs/{run.id}",
        "/api/experiments",
        "/datasets",
    ]


def _delays(load: Load, run_id: str) -> list[float]:
    """Seconds from a point's being stored to its arrival, of all points at all watchers.

    Fails unless each connection was whole and each watcher has each point once. What was there
    before a watcher came is counted from its coming.
    """
    with database.reading() as db:
        stored = {point.number: point.recorded_at for point in points.curve(db, run_id)}
    assert len(load.watchers) == load.num_watchers
    delays = []
    for connections in load.watchers:
        numbers: list[int] = []
        for place, one in enumerate(connections):
            status, events, whole = one.read()
            assert status == "HTTP/1.1 200 OK"
            if place == len(connections) - 1:
                assert whole
                assert events[-1].name == "done"
            told = [(event.at, point) for event in events for point in _points(event, run_id)]
            numbers += [point["number"] for _, point in told]
            delays += [at - max(one.begun, stored[point["number"]]) for at, point in told]
        assert numbers == sorted(stored)
    return delays


def _points(event: Event, run_id: str) -> list[dict[str, Any]]:
    found = event.data if event.name == "points" else []
    return [point for point in found if point["run"] == run_id]


def _worked(plant: Plant, name: str) -> float:
    """Seconds of a processor that a process and its children have taken."""
    taken = 0.0
    for pid in (plant.running[name].pid, *plant.children(name)):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        taken += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return taken


def _share(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def _line(what: str, values: Sequence[float]) -> str:
    p50, p99 = (_share(values, share) * 1000 for share in (0.5, 0.99))
    return (
        f"{what:40} {len(values):7} p50 {p50:5.0f} p99 {p99:5.0f} max {max(values) * 1000:5.0f} ms"
    )


def _tell(load: Load, used: dict[str, float]) -> None:
    """Print the figures."""
    by_address = defaultdict(list)
    for address, took, _ in load.answers:
        by_address[address].append(took)
    print()
    for address, found in sorted(by_address.items()):
        print(_line(address, found))
    tenth = len(load.answers) // 10  # in the order of their answers
    for place in range(10):
        part = load.answers[place * tenth : (place + 1) * tenth]
        print(_line(f"Requests, tenth {place + 1} of the time", [took for _, took, _ in part]))
    print(_line("All requests", [took for _, took, _ in load.answers]))
    print(_line("This process came late by", load.late))
    shares = {name: f"{share:.2f}" for name, share in (used | {"load": load.busy}).items()}
    print(f"Processors used: {shares}; load average of the machine: {os.getloadavg()[0]:.1f}")
