"""Workers: they beat, take work with and without a bell, lose no run with a child, and end.

Most tests run the keeper here with children that hold no torch (tests/pretender.py); the last
ones start whole workers.
"""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import text, update
from sqlalchemy.orm import Session

from app import (
    base_models,
    claims,
    completions,
    database,
    methods,
    processes,
    queue,
    runs,
    storage,
    tuned_models,
    valkey,
    workers,
)
from app.capacity import gpu_name
from app.settings import settings
from app.tables import BaseModel, Run
from tests import factories
from tests.servers import fresh_queue, wait_for
from worker import keeper
from worker import tuner as tuner_module
from worker.generator import Generator
from worker.keeper import Child, Keeper
from worker.tuner import Tuner

# Pipes of processes that have ended are closed when they are collected: soon enough.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


def _pretend(_self: Keeper, module: str, *arguments: str) -> Child:
    return processes.start("tests.pretender", module, *arguments, stdin=subprocess.PIPE)


class LightTuner(Tuner):
    """Its children hold no torch."""

    child = _pretend


class LightGenerator(Generator):
    """Its children hold no torch."""

    child = _pretend


@pytest.fixture
def started(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[type[Keeper]], Any]]:
    """Starts keepers, whose children work on the test's home; ends them after the test."""
    monkeypatch.setenv("STUDIO_HOME", settings.home)
    monkeypatch.setattr(keeper, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(tuner_module, "SAVE_SECONDS", 5.0)
    running: list[Keeper] = []

    def start(kind: type[Keeper]) -> Keeper:
        running.append(kind())
        running[-1].start()
        return running[-1]

    yield start
    for one in running:
        one.stop()
    running.clear()
    gc.collect()


def _run(db: Session, pretend: str, **changes: Any) -> Run:
    return factories.run(db, params={"pretend": pretend}, **changes)


def _now(run_id: str) -> Run:
    with database.reading() as db:
        return runs.get(db, run_id)


def _becomes(run: Run, state: str, seconds: float = 30.0) -> Run:
    assert wait_for(lambda: _now(run.id).state == state, seconds), _now(run.id).state
    return _now(run.id)


def _alive() -> list[str]:
    with database.reading() as db:
        return [worker.kind for worker in workers.alive(db)]


def _described() -> bool:
    """Whether a child has said what the worker has: before that nothing is taken."""
    with database.reading() as db:
        return any(worker.memory_mb for worker in workers.alive(db))


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_tuner_beats_and_leaves(home: Path, started: Any) -> None:
    tuner = started(LightTuner)
    assert wait_for(lambda: _alive() == ["tuner"] and tuner.spare)
    spare = tuner.spare
    tuner.stop()
    assert _alive() == []
    assert spare.poll() is not None


def test_runs_are_taken_one_after_another(db: Session, started: Any) -> None:
    of = factories.experiment(db)
    queued = [_run(db, "finish", experiment_id=of.id) for _ in range(2)]
    started(LightTuner)
    found = [_becomes(run, "succeeded") for run in queued]
    assert {run.attempt for run in found} == {1}
    assert len({run.figures["pid"] for run in found}) == 2  # a process each
    begun = [run.started_at or 0 for run in found]
    assert begun == sorted(begun)


def test_a_gpu_takes_several_as_they_fit(
    db: Session, started: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRETENDED_DEVICE", gpu_name("Test"))  # with 8000 MB
    of = factories.experiment(db)
    queued = [
        _run(db, "save when told", experiment_id=of.id, position=float(place), forecast=forecast)
        for place, forecast in enumerate(
            {"gpu_memory_mb": memory_mb, "seconds": seconds}
            for memory_mb, seconds in ((3000, 600.0), (5000, 600.0), (4000, 60.0))
        )
    ]
    tuner = started(LightTuner)
    assert wait_for(lambda: [_now(run.id).state for run in queued].count("running") == 2, 30)
    time.sleep(0.5)
    # The second would not fit beside the first; the third does, and ends before it.
    assert [_now(run.id).state for run in queued] == ["running", "queued", "running"]
    assert wait_for(lambda: all(_now(run.id).figures for run in (queued[0], queued[2])))
    time.sleep(0.2)  # their handlers are there
    tuner.stop()
    assert [_now(run.id).state for run in queued] == ["queued"] * 3


def test_a_cpu_takes_several_only_if_it_is_told_to(
    db: Session, started: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "runs_at_once", 2)
    of = factories.experiment(db)
    forecast = {"memory_mb": 2000, "seconds": 60.0}
    queued = [
        _run(db, "save when told", experiment_id=of.id, position=float(place), forecast=forecast)
        for place in range(3)
    ]
    started(LightTuner)
    assert wait_for(lambda: [_now(run.id).state for run in queued].count("running") == 2, 30)
    time.sleep(0.5)
    assert [_now(run.id).state for run in queued] == ["running", "running", "queued"]


def test_a_bell_is_heard_at_once(
    db: Session, started: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "LOOK_SECONDS", 60.0)
    tuner = started(LightTuner)
    assert wait_for(_described)
    time.sleep(0.5)  # it has looked, and now waits for a minute
    run = _run(db, "finish")
    tuner.wake()
    _becomes(run, "succeeded")


def test_a_run_whose_process_dies_is_put_back_at_once_but_not_for_ever(
    db: Session, started: Any
) -> None:
    poison, other = _run(db, "die", position=1.0), _run(db, "finish", position=2.0)
    begun = time.monotonic()
    started(LightTuner)
    found = _becomes(poison, "failed")
    assert time.monotonic() - begun < settings.lease_seconds  # no lease had to end for that
    assert found.attempt == claims.MOST_STUCK
    assert "The tuning process was ended by signal SIGKILL" in (found.error or "")
    with database.reading() as reader:
        said = [event.message for event in runs.history(reader, poison.id)]
    assert "Back in the queue" in said[1]
    _becomes(other, "succeeded")


@pytest.mark.parametrize(
    ("number", "kills", "less"),
    [(signal.SIGKILL, 1, True), (signal.SIGKILL, 0, False), (signal.SIGUSR1, 1, False)],
    ids=["for want of memory", "by someone", "while another was killed"],
)
def test_only_a_run_that_is_killed_for_want_of_memory_goes_on_with_less(
    db: Session,
    started: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    kills: int,
    less: bool,
) -> None:
    counts = tmp_path / "vmstat"
    monkeypatch.setattr(processes, "_COUNTS", str(counts))
    counts.write_text("nr_free_pages 7\noom_kill 3\nnuma_hit 9\n")
    run = _run(db, "hang")
    started(LightTuner)
    assert wait_for(lambda: _now(run.id).figures)
    pid = _now(run.id).figures["pid"]
    db.execute(  # as a training leaves it: at the next attempt it finishes
        update(Run).values(
            params=methods.get("lora").schema(batch_size=4).model_dump(),
            figures={"token_budget": 1024, "longest_tokens": 40, "prompts_at_once": 16},
        )
    )
    db.commit()
    counts.write_text(f"nr_free_pages 7\noom_kill {3 + kills}\nnuma_hit 9\n")
    os.kill(pid, number)
    found = _becomes(run, "succeeded")
    assert found.attempt == 2
    with database.reading() as reader:
        reason = runs.history(reader, run.id)[1].message
    if less:
        assert reason.startswith("The machine ran out of memory at step 0. The run goes on from")
        assert "rows of at most 80 tokens instead of 160" in reason
    else:
        assert reason.startswith(f"The tuning process was ended by signal {number.name}")
    assert found.figures["token_budget"] == (80 if less else 1024)
    assert found.figures["prompts_at_once"] == (8 if less else 16)


def test_what_a_process_leaves_open_when_it_ends_well_ends_too(db: Session, started: Any) -> None:
    """It finished just when someone asked it to pause: nobody else would ever end the run."""
    run = _run(db, "say nothing until asked")
    started(LightTuner)
    assert wait_for(lambda: _now(run.id).figures)
    runs.pause(db, run.id)
    _becomes(run, "paused")


def test_a_spare_that_dies_is_replaced(db: Session, started: Any) -> None:
    tuner = started(LightTuner)
    assert wait_for(lambda: tuner.spare)
    tuner.spare.kill()
    tuner.spare.wait()
    _becomes(_run(db, "finish"), "succeeded")


@pytest.mark.parametrize("at_once", [1, 2])
def test_imports_wait_while_a_run_begins_that_nothing_can_join(
    db: Session, started: Any, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(settings, "runs_at_once", at_once)
    monkeypatch.setattr(tuner_module, "QUIET_SECONDS", 3.0)
    run = _run(db, "say nothing until asked")
    tuner = started(LightTuner)
    assert wait_for(lambda: _now(run.id).figures)
    time.sleep(0.5)  # several looks
    assert (tuner.spare is None) is (at_once == 1)
    assert wait_for(lambda: tuner.spare)


def test_a_tuner_that_is_stopped_hands_its_run_back(db: Session, started: Any) -> None:
    run = _run(db, "save when told")
    tuner = started(LightTuner)
    assert wait_for(lambda: _now(run.id).figures)
    time.sleep(0.2)  # its handler is there
    tuner.stop()
    found = _now(run.id)
    assert (found.state, found.worker, found.stuck) == ("queued", None, 0)


def test_a_run_that_does_not_save_in_time_is_put_back(
    db: Session, started: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner_module, "SAVE_SECONDS", 0.5)
    run = _run(db, "hang")
    tuner = started(LightTuner)
    assert wait_for(lambda: _now(run.id).figures)
    tuner.stop()
    found = _now(run.id)
    assert (found.state, found.stuck) == ("queued", 0)  # this was no fault of the run
    assert _is_gone(found.figures["pid"])


def test_what_a_lost_worker_held_is_taken_over(db: Session, started: Any) -> None:
    run = _run(db, "finish", state="running", worker="lost", lease_until=0.0, step=3)
    started(LightTuner)
    found = _becomes(run, "succeeded")
    assert (found.attempt, found.worker) == (2, None)


def test_a_lease_is_renewed_while_a_run_is_at_work(
    db: Session, started: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "lease_seconds", 1.0)
    run = _run(db, "save when told")
    started(LightTuner)
    assert wait_for(lambda: _now(run.id).figures)
    for _ in range(15):
        time.sleep(0.1)
        with database.session() as other:
            assert claims.sweep(other) == 0
    assert _now(run.id).attempt == 1


def test_a_keeper_outlives_a_database_that_is_away(db: Session, started: Any) -> None:
    started(LightTuner)
    assert wait_for(_alive)
    db.execute(text("ALTER TABLE run RENAME TO away"))
    db.commit()
    time.sleep(0.5)
    db.execute(text("ALTER TABLE away RENAME TO run"))
    db.commit()
    _becomes(_run(db, "finish"), "succeeded")


def test_a_process_that_dies_while_the_database_is_away_is_not_forgotten(
    db: Session, started: Any
) -> None:
    run = _run(db, "hang")
    started(LightTuner)
    assert wait_for(lambda: _now(run.id).figures)
    db.execute(text("ALTER TABLE event RENAME TO away"))  # so that nothing can be put back
    db.commit()
    os.kill(_now(run.id).figures["pid"], signal.SIGKILL)
    time.sleep(0.5)
    assert _now(run.id).attempt == 1
    db.execute(text("ALTER TABLE away RENAME TO event"))
    db.execute(update(Run).values(params={"pretend": "finish"}))
    db.commit()
    assert _becomes(run, "succeeded", settings.lease_seconds / 2).attempt == 2


def test_a_run_that_is_held_in_name_alone_is_swept(
    db: Session, started: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim was stored, and the connection broke before the worker heard of it."""
    monkeypatch.setattr(settings, "lease_seconds", 1.0)
    tuner = started(LightTuner)
    assert wait_for(lambda: tuner.spare)
    with database.session() as other:
        run = _run(other, "finish", state="running", worker=tuner.worker.id)
    time.sleep(1.2)
    tuner.swept = 0.0  # the next sweep is due
    assert _becomes(run, "succeeded").attempt == 2


def _ask(db: Session, of: BaseModel, words: str) -> str:
    return completions.ask(
        db, base_model_id=of.id, run_ids=[None], input=words, template="{{input}}"
    )


def _answer(ask: str) -> tuple[str, str]:
    with database.reading() as db:
        (found,) = completions.of(db, ask)
    return found.state, found.text


def test_prompts_are_answered_and_none_is_left_open(db: Session, started: Any) -> None:
    base = factories.base_model(db)
    first = _ask(db, base, "Hello")
    generator = started(LightGenerator)
    assert wait_for(lambda: _answer(first) == ("done", "Hello"))
    process = generator.answering
    deadly = _ask(db, base, "die")
    assert wait_for(lambda: _answer(deadly)[0] == "failed")
    later = _ask(db, base, "Again")
    assert wait_for(lambda: _answer(later) == ("done", "Again"))
    assert generator.answering is not process
    child = generator.answering
    generator.stop()
    assert child.poll() is not None
    assert _alive() == []


def test_base_models_are_prepared_and_adapters_merged(db: Session, started: Any) -> None:
    good = factories.base_model(db, state="waiting")
    bad = factories.base_model(db, state="waiting", address="die")
    orphan = factories.base_model(db, state="preparing", worker="lost")
    run = factories.tuned(db)
    tuned_models.ask_whole(db, run.id)

    def states() -> list[str]:
        with database.reading() as reader:
            return [base_models.get(reader, one.id).state for one in (good, bad, orphan)]

    started(LightGenerator)
    assert wait_for(lambda: states() == ["ready", "failed", "ready"]), states()
    with database.reading() as reader:
        assert "ended with exit code 4" in (base_models.get(reader, bad.id).error or "")
    assert wait_for(lambda: _now(run.id).whole_state == "failed")
    assert "ended with exit code 4. Try again." in (_now(run.id).whole_error or "")


# --- Whole workers ----------------------------------------------------------------------------


@pytest.fixture
def worker(home: Path) -> Iterator[Callable[[str], "subprocess.Popen[str]"]]:
    """Starts workers as `studio worker` does; kills what is left of them after the test."""
    begun: list[subprocess.Popen[str]] = []

    def start(kind: str) -> "subprocess.Popen[str]":
        with storage.log_file(kind).open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "worker.tasks", kind],
                cwd=storage.REPOSITORY,
                env=os.environ | {"STUDIO_HOME": settings.home, "STUDIO_REDIS_URL": ""},
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
        begun.append(process)
        return process

    yield start
    for process in begun:
        process.kill()
        process.wait()


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def _said(kind: str) -> str:
    return storage.log_file(kind).read_text()


def _ends(process: "subprocess.Popen[str]", kind: str, seconds: float = 8.0) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        assert process.wait(seconds) == 0, _said(kind)
    except subprocess.TimeoutExpired:
        pytest.fail(f"It did not end in {seconds} seconds.\n{_said(kind)}")
    assert _alive() == []


def test_a_worker_hears_the_bell_and_ends_when_told_to(broker: redis.Redis, worker: Any) -> None:
    process = worker("generator")
    assert wait_for(lambda: _alive() == ["generator"], 20), _said("generator")
    assert queue.ring("generator")
    assert wait_for(lambda: broker.llen("complete") == 0), _said("generator")
    assert wait_for(lambda: _children(process.pid))
    children = _children(process.pid)
    _ends(process, "generator")
    assert all(_is_gone(child) for child in children)


def test_a_worker_without_a_broker_beats_and_ends(home: Path, worker: Any) -> None:
    process = worker("tuner")
    assert wait_for(lambda: _alive() == ["tuner"], 20), _said("tuner")
    assert wait_for(lambda: "Cannot connect" in _said("tuner"))
    _ends(process, "tuner")


def test_a_worker_that_is_told_to_end_while_it_starts(home: Path, worker: Any) -> None:
    process = worker("tuner")
    assert wait_for(lambda: _alive() == ["tuner"], 20), _said("tuner")
    _ends(process, "tuner")


def test_a_worker_finds_a_broker_that_comes_late_and_outlives_it(
    home: Path, worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = worker("tuner")
    assert wait_for(lambda: "Cannot connect" in _said("tuner"), 20)
    monkeypatch.setattr(settings, "redis_url", "")
    fresh_queue(monkeypatch)
    valkey.start()
    try:
        assert queue.ring("tuner")
        client = redis.Redis.from_url(queue.redis_url())
        assert wait_for(lambda: client.llen("tune") == 0, 20), _said("tuner")
        os.kill(int(client.info("server")["process_id"]), signal.SIGKILL)
        assert wait_for(lambda: _said("tuner").count("Cannot connect") >= 2, 20), _said("tuner")
        assert process.poll() is None
        _ends(process, "tuner")
    finally:
        valkey.stop()


def test_the_children_of_a_worker_that_is_killed_die_with_it(home: Path, worker: Any) -> None:
    def described() -> bool:
        with database.reading() as db:
            return any(worker.device for worker in workers.alive(db))

    process = worker("tuner")
    # Until its child has loaded torch, and says so, it holds nothing and looks at its end.
    assert wait_for(described, 60), _said("tuner")
    (child,) = _children(process.pid)
    assert not _is_gone(child)
    process.kill()
    process.wait()
    assert wait_for(lambda: _is_gone(child), 5)
