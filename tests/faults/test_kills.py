"""Processes die, stop and sleep; the run goes on exactly, and nothing that was accepted is lost."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy.orm import Session

from app import completions, database, datasets, points, queue, runs, valkey
from app.settings import settings
from app.tables import Run
from tests import factories
from tests.faults import small
from tests.faults.plant import PATIENCE, Plant, reaches, seed, until

_whole: dict[str, tuple[Any, Any]] = {}


def whole(
    db: Session, model: Path, plant: Plant, name: str, seconds: float = PATIENCE, **params: Any
) -> tuple[Run, Any, Any]:
    """A queued run and a worker, and curve and files of a run like it that nobody disturbed."""
    of = small.experiment(db, model)
    params = {"num_epochs": 6} | params  # 60 steps: long enough to come to harm
    plant.start(name)
    key = f"{params}"
    if key not in _whole:
        twin = small.run(db, of, **params)
        reaches(twin.id, "succeeded", seconds=seconds)
        _whole[key] = small.curve(twin.id), small.left(twin.id)
    return small.run(db, of, **params), *_whole[key]


def step(run_id: str) -> int:
    return small.now(run_id).step


def same(run: Run, curve: Any, files: Any) -> None:
    assert small.curve(run.id) == curve
    assert small.left(run.id) == files


def test_promise_3_kill_9_of_the_trainer_in_the_middle_of_a_step(
    db: Session, model: Path, plant: Plant, request: pytest.FixtureRequest
) -> None:
    """A child that dies under a living worker is taken up again at once."""
    chance = seed(request)
    run, curve, files = whole(db, model, plant, "quick tuner")
    queue.ring("tuner")
    kills, waits = 0, []
    while kills < 5:
        goal = step(run.id) + chance.randint(1, 4)
        until(lambda: step(run.id) >= goal or small.now(run.id).state == "succeeded")  # noqa: B023
        time.sleep(chance.random() / 20)
        if small.now(run.id).state == "succeeded":
            break
        before = small.now(run.id).attempt
        if plant.kill_trainer("quick tuner", run.id):
            kills += 1
            at = time.monotonic()
            until(lambda: small.now(run.id).attempt > before)  # noqa: B023
            waits.append(time.monotonic() - at)
    assert kills >= 2
    reaches(run.id, "succeeded")
    same(run, curve, files)
    assert sorted(waits)[len(waits) // 2] < settings.lease_seconds  # no lease had to end
    assert sum("was ended by signal SIGKILL" in line for line in small.said(run.id)) >= 2


@pytest.mark.faults
@pytest.mark.parametrize("method", ["prompt_tuning", "lora", "qlora", "full"])
def test_promise_3_with_workers_as_they_are_started_by_the_studio(
    db: Session, model: Path, plant: Plant, method: str
) -> None:
    """No fork, no shortcut: `python -m worker.tasks tuner`, a fresh interpreter for each attempt."""
    run, curve, files = whole(db, model, plant, "tuner", method=method)
    for _ in range(3):
        goal = step(run.id) + 2
        until(lambda: step(run.id) >= goal)  # noqa: B023
        until(lambda: plant.kill_trainer("tuner", run.id))
    reaches(run.id, "succeeded")
    same(run, curve, files)


@pytest.mark.parametrize("lease", [3, pytest.param(30, marks=pytest.mark.faults)])
def test_promise_4_kill_9_of_the_worker_takes_its_trainer_with_it(
    db: Session, model: Path, plant: Plant, lease: int
) -> None:
    plant.environment["STUDIO_LEASE_SECONDS"] = str(lease)
    run, curve, files = whole(db, model, plant, "quick tuner")
    until(lambda: step(run.id) >= 2)
    trainer = plant.trainer("quick tuner", run.id)
    plant.kill("quick tuner")
    at = time.monotonic()
    assert trainer is None or not os.path.exists(f"/proc/{trainer}") or _is_dead(trainer)
    plant.start("quick tuner")
    until(lambda: small.now(run.id).attempt > 1)
    # At most the lease, and 5 s to the next sweep; the rest is the new worker's start.
    took = time.monotonic() - at
    print(f"With a lease of {lease} s, going on began {took:.1f} s after the kill.")
    if lease == 30:  # as it is by default
        assert took < 45
    reaches(run.id, "succeeded")
    same(run, curve, files)
    assert any("stopped answering" in line for line in small.said(run.id))


def _is_dead(pid: int) -> bool:
    time.sleep(0.5)
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_promise_4_sigterm_saves_and_hands_the_run_back_at_once(
    db: Session, model: Path, plant: Plant
) -> None:
    plant.environment["STUDIO_CHECKPOINT_SECONDS"] = "3600"
    run, curve, files = whole(db, model, plant, "quick tuner")
    until(lambda: step(run.id) >= 3)
    plant.end("quick tuner")
    found = small.now(run.id)
    assert (found.state, found.worker) == ("queued", None)
    assert found.step >= 3
    plant.start("quick tuner")
    reaches(run.id, "succeeded")
    same(run, curve, files)
    assert small.now(run.id).rewinds == []  # nothing was redone
    assert small.now(run.id).attempt == 2


def test_a_run_that_gets_nowhere_fails_with_the_reason(db: Session, plant: Plant) -> None:
    run = factories.run(db, params={"pretend": "die"})
    plant.start("light tuner")
    reaches(run.id, "failed")
    found = small.now(run.id)
    assert found.attempt == 3
    assert "lost 3 times with nothing saved in between" in (found.error or "")


@pytest.mark.faults
def test_promise_5_cancel_against_finish(db: Session, plant: Plant) -> None:
    """Whoever comes first wins, and a cancelled run never turns into success."""
    of = factories.experiment(db)
    plant.start("light tuner")
    ends = set()
    for delay in (0.0, 0.05, 0.1, 0.2, 0.5):
        run = factories.run(db, of, params={"pretend": "finish"})
        until(lambda: small.now(run.id).state != "queued")  # noqa: B023
        time.sleep(delay)
        said_yes = True
        with database.session() as other:
            try:
                runs.cancel(other, run.id)
            except Exception:
                said_yes = False
        reaches(run.id, "succeeded", "cancelled")
        found = small.now(run.id).state
        ends.add(found)
        assert found == ("cancelled" if said_yes else "succeeded")
    print(ends)


@pytest.mark.faults
def test_everything_sleeps_for_longer_than_a_lease(db: Session, model: Path, plant: Plant) -> None:
    """As when the lid of a laptop is closed; two workers wake up, and one of them has the run."""
    run, curve, files = whole(db, model, plant, "quick tuner")
    plant.start("quick tuner", as_name="second")
    until(lambda: step(run.id) >= 2)
    asleep = [one.pid for one in plant.running.values()]
    asleep += [child for name in plant.running for child in plant.children(name)]
    asleep += plant.broker()
    for pid in asleep:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(5)
    for pid in asleep:
        os.kill(pid, signal.SIGCONT)
    reaches(run.id, "succeeded")
    same(run, curve, files)


@pytest.mark.faults
def test_a_worker_that_wakes_up_late_has_lost_its_run_and_changes_nothing(
    db: Session, model: Path, plant: Plant
) -> None:
    run, curve, files = whole(db, model, plant, "quick tuner")
    until(lambda: step(run.id) >= 2)
    trainer = plant.trainer("quick tuner", run.id)
    assert trainer
    stopped = [plant.running["quick tuner"].pid, *plant.children("quick tuner")]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    if small.now(run.id).state == "succeeded":
        pytest.skip("The run was quicker.")
    plant.start("quick tuner", as_name="second")
    until(lambda: small.now(run.id).attempt == 2)
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    reaches(run.id, "succeeded")
    until(lambda: plant.trainer("quick tuner", run.id) is None)
    assert small.now(run.id).attempt == 2
    same(run, curve, files)


@pytest.mark.faults
def test_everything_is_killed_at_once_again_and_again(
    db: Session, model: Path, plant: Plant, request: pytest.FixtureRequest
) -> None:
    chance = seed(request)
    run, curve, files = whole(db, model, plant, "quick tuner")
    for _ in range(5):
        goal = step(run.id) + chance.randint(1, 3)
        until(lambda: step(run.id) >= goal)  # noqa: B023
        time.sleep(chance.random() / 5)
        plant.kill_all()
        valkey.start(60)
        plant.start("quick tuner")
    reaches(run.id, "succeeded")
    same(run, curve, files)


# --- The web ----------------------------------------------------------------------------------


def lines(count: int = 200, length: int = 40) -> bytes:
    rows = [{"input": f"{n} {'x' * length}", "output": "ab"[n % 2]} for n in range(count)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def left_over(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "datasets").glob("*"))


def test_promise_1_the_web_is_killed_in_the_middle_of_an_upload(
    db: Session, home: Path, plant: Plant
) -> None:
    plant.start("web")
    web = plant.web()

    def slowly() -> Any:
        content = lines()
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
        yield content[:1000]
        plant.kill("web")
        yield content[1000:] + b"\r\n--b--\r\n"

    with pytest.raises(httpx.TransportError):
        web.post(
            "/api/datasets",
            content=slowly(),
            headers={
                "Content-Type": "multipart/form-data; boundary=b",
                "Content-Length": str(len(lines()) + 85),
            },
        )
    assert datasets.all(db) == []
    db.commit()
    plant.start("web")
    answer = plant.web().post("/api/datasets", files={"file": ("a.jsonl", lines())})
    assert answer.status_code == 201
    plant.kill("web")  # at once: what was answered with success is there
    stored = datasets.get(db, answer.json()["id"])
    assert len(datasets.rows(stored)) == 200


@pytest.mark.faults
def test_the_web_is_killed_in_the_middle_of_a_stream(db: Session, plant: Plant) -> None:
    """The browser comes back with the numbers it has seen, and gets the rest, once."""
    of = factories.experiment(db)
    run = factories.run(db, of, state="running", num_steps=100)
    points.record(db, run.id, 1, [factories.measured(n) for n in range(1, 11)])
    plant.start("web")
    web = plant.web()
    seen: dict[int, int] = {}
    last = ""

    def follow(enough: int) -> None:
        nonlocal last
        with web.stream(
            "GET", f"/experiments/{of.id}/events", headers={"Last-Event-ID": last} if last else {}
        ) as answer:
            name = ""
            for line in answer.iter_lines():
                key, _, value = line.partition(": ")
                name = value if key == "event" else name
                last = value if key == "id" else last
                if key == "data" and name == "points":
                    for point in json.loads(value):
                        seen[point["step"]] = seen.get(point["step"], 0) + 1
                if len(seen) >= enough and key == "id":
                    return

    follow(10)
    plant.kill("web")
    points.record(db, run.id, 1, [factories.measured(n) for n in range(11, 21)])
    plant.start("web")
    web = plant.web()
    follow(20)
    assert seen == dict.fromkeys(range(1, 21), 1)


# --- The generator ----------------------------------------------------------------------------


def states(ask: str) -> list[str]:
    with database.reading() as db:
        return [one.state for one in completions.of(db, ask)]


@pytest.mark.faults
def test_kill_9_of_the_generator_leaves_no_prompt_open(db: Session, plant: Plant) -> None:
    base = factories.base_model(db)
    asks = []
    plant.start("light generator")
    for _ in range(3):
        asks.append(
            completions.ask(
                db, base_model_id=base.id, run_ids=[None], input="x", template="{{input}}"
            )
        )
        until(lambda: states(asks[-1]) != ["queued"])
        plant.kill("light generator")
        plant.start("light generator")
    # What a worker that is gone had in hand fails with the reason once it is not counted any more.
    until(lambda: all(states(ask)[0] in {"done", "failed"} for ask in asks))
    late = completions.ask(
        db, base_model_id=base.id, run_ids=[None], input="x", template="{{input}}"
    )
    until(lambda: states(late) == ["done"])


@pytest.mark.faults
def test_kill_9_of_the_generator_while_it_writes(db: Session, model: Path, plant: Plant) -> None:
    of = small.experiment(db, model)
    plant.start("generator")
    ask = completions.ask(
        db,
        base_model_id=of.base_model_id,
        run_ids=[None],
        input="abc",
        template="{{input}}",
        sampling=completions.Sampling(temperature=1.5, max_tokens=400),
    )
    until(lambda: states(ask) == ["running"])
    plant.kill("generator")
    plant.start("generator")
    until(lambda: states(ask)[0] in {"done", "failed"})
    late = completions.ask(
        db, base_model_id=of.base_model_id, run_ids=[None], input="a", template="{{input}}"
    )
    until(lambda: states(late) == ["done"])
