"""A run on two devices, as processes on the processor: it ends as one, together, and goes on."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from app import claims, database, runs, storage
from app.settings import settings
from app.tables import Run
from tests import tiny
from tests.faults import small
from tests.servers import wait_for

SLOW = (
    500.0  # seconds: the processes load torch and wait for each other, on a busy machine for long
)
CLOSE = 5e-2  # in bfloat16, where there is it; tests/test_distributed.py compares in float32
pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]
Child = subprocess.Popen[str]


@pytest.fixture
def start(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Run], Child]]:
    """Takes up the run in a process as a worker's, with a checkpoint after every step."""
    monkeypatch.setenv("STUDIO_HOME", settings.home)
    monkeypatch.setenv("STUDIO_CHECKPOINT_SECONDS", "0.001")
    begun: list[Child] = []

    def take_up(run: Run) -> Child:
        with database.session() as db:
            claimed = claims.claim_next(db, "w1")
        assert claimed is not None
        assert claimed.id == run.id
        child = subprocess.Popen(
            [sys.executable, "-m", "worker.run", "w1"],
            stdin=subprocess.PIPE,
            cwd=storage.REPOSITORY,
            text=True,
        )
        begun.append(child)
        assert child.stdin
        with child.stdin as line:
            line.write(json.dumps({"run": run.id, "attempt": claimed.attempt}) + "\n")
        return child

    yield take_up
    for child in begun:
        child.kill()
        child.wait()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.model(tmp_path / "llama", initializer_range=0.15)


def ranks(child: Child) -> list[int]:
    """The processes that torchrun has started, by their number in the group."""
    found: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            words = (entry / "cmdline").read_text().split("\0")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == child.pid and "worker.rank" in words:
                found[int(words[-3])] = int(entry.name)
    return [found[number] for number in sorted(found)]


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def reaches(run: Run, step: int) -> None:
    assert wait_for(lambda: small.now(run.id).step >= step, SLOW), log(run)


def ends(child: Child, run: Run, state: str) -> Run:
    child.wait(SLOW)
    found = small.now(run.id)
    assert found.state == state, (small.said(run.id), log(run))
    return found


def log(run: Run) -> str:
    return storage.log_file(f"run-{run.id}").read_text()[-3000:]


def steps(run: Run, kind: str = "train") -> list[object]:
    return [point[1] for point in small.curve(run.id) if point[0] == kind]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_on_two_devices_is_that_on_one(
    db: Session, start: Callable[[Run], Child], model: Path, method: str
) -> None:
    of = small.experiment(db, model)
    given = {"num_epochs": 1, **({"dropout": 0.0} if method == "lora" else {})}
    shared = small.run(db, of, method, devices=2, **given)
    found = ends(start(shared), shared, "succeeded")
    assert found.figures["devices"] == 2
    assert found.scores["num_test"] > 0
    alone = small.run(db, of, method, **given)
    ends(start(alone), alone, "succeeded")
    assert small.left(shared.id).keys() == small.left(alone.id).keys()
    for one, other in zip(small.curve(shared.id), small.curve(alone.id), strict=True):
        assert one[:2] == other[:2]  # kind and step
        assert one[2] == pytest.approx(other[2], rel=CLOSE)  # loss
        assert one[4:] == other[4:]  # learning rate, epoch, tokens


def test_a_cancelled_run_ends_on_all_devices(
    db: Session, start: Callable[[Run], Child], model: Path
) -> None:
    run = small.run(db, small.experiment(db, model), "full", devices=2, num_epochs=50)
    child = start(run)
    reaches(run, 2)
    pids = ranks(child)
    assert len(pids) == 2
    with database.session() as own:
        runs.cancel(own, run.id)
    before = small.now(run.id).step
    found = ends(child, run, "cancelled")
    assert found.step <= before + 2  # the one being recorded, and the one being computed
    assert gone(pids)


def test_what_is_stopped_or_loses_a_process_goes_on(
    db: Session, start: Callable[[Run], Child], model: Path
) -> None:
    run = small.run(db, small.experiment(db, model), "full", devices=2, num_epochs=6)
    child = start(run)
    reaches(run, 2)
    pids = ranks(child)
    child.send_signal(signal.SIGTERM)
    stopped = ends(child, run, "queued").step
    assert gone(pids)
    assert "The worker was stopped; what was trained is saved" in small.said(run.id)[-1]

    child = start(run)
    reaches(run, stopped + 2)
    pids = ranks(child)
    os.kill(pids[1], signal.SIGKILL)
    killed = ends(child, run, "queued").step
    assert gone(pids)
    assert f"Going on from the checkpoint of step {stopped}." in small.said(run.id)
    assert "number 2 was ended by signal SIGKILL" in small.said(run.id)[-1]

    ends(start(run), run, "succeeded")
    assert killed >= stopped + 2
    assert steps(run) == list(range(1, len(steps(run)) + 1))
    assert len(set(steps(run, "validation"))) == len(steps(run, "validation"))


def test_the_processes_of_a_run_die_with_the_one_that_started_them(
    db: Session, start: Callable[[Run], Child], model: Path
) -> None:
    run = small.run(db, small.experiment(db, model), "lora", devices=2, num_epochs=50)
    child = start(run)
    reaches(run, 1)
    pids = ranks(child)
    child.kill()
    child.wait()
    assert wait_for(lambda: gone(pids))


def test_more_devices_than_there_are_are_refused_in_words(
    db: Session, start: Callable[[Run], Child], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small.run(db, small.experiment(db, model), "lora", devices=8)
    if (os.cpu_count() or 1) >= 8:
        pytest.skip("This machine has as many as can be asked for.")
    found = ends(start(run), run, "failed")
    assert (found.error or "").startswith("This run asks for 8 devices, and the machine that took")
