"""Rehearsals: asked for once, done by one tuner beside no run, measured for real on a small model."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session

from app import database, forecast, lengths, methods, rehearsals, storage
from app.forecast import Given
from app.tables import Rehearsal
from tests import factories, tiny
from tests.faults import nursery
from tests.servers import at_once, wait_for
from worker import prepare
from worker.tuner import Tuner

ASKED: dict[str, Any] = {
    "base_model_id": "b",
    "dataset_id": "d",
    "template": "{{input}}",
    "labels": [],
    "method": "lora",
    "params": {"rank": 8, "learning_rate": 1e-3},
}


def _state(key: str) -> str:
    with database.reading() as db:
        return rehearsals.get(db, key).state


def test_what_does_not_matter_is_the_same_configuration() -> None:
    key = rehearsals.key(**ASKED)
    assert (
        rehearsals.key(**ASKED | {"params": {"rank": 8, "learning_rate": 2e-3, "alpha": 3}}) == key
    )
    for change in (
        {"params": {"rank": 9, "learning_rate": 1e-3}},
        {"method": "qlora"},
        {"template": "Say {{input}}"},
        {"labels": ["a"]},
        {"dataset_id": "e"},
        {"base_model_id": "c"},
    ):
        assert rehearsals.key(**ASKED | change) != key


def test_from_asked_for_to_done_and_again(any_db: Session) -> None:
    asked = rehearsals.ask(any_db, **ASKED)
    assert rehearsals.ask(any_db, **ASKED).key == asked.key
    taken = rehearsals.claim(any_db, "w1")
    assert taken
    assert (taken.state, taken.worker) == ("running", "w1")
    assert rehearsals.claim(any_db, "w2") is None
    rehearsals.progress(any_db, asked.key, "Loading")
    assert rehearsals.ask(any_db, **ASKED).progress == "Loading"  # what goes on is not begun anew
    rehearsals.finish(any_db, asked.key, {"peak_memory_mb": 5.0})
    rehearsals.fail(any_db, asked.key, "Too late.")
    done = rehearsals.get(any_db, asked.key)
    assert (done.state, done.error, done.figures) == ("done", None, {"peak_memory_mb": 5.0})
    again = rehearsals.ask(any_db, **ASKED)
    assert again.state == "waiting"
    assert again.figures == done.figures  # known until it is known better
    assert rehearsals.claim(any_db, "w1")
    rehearsals.fail(any_db, asked.key, "No memory.")
    assert rehearsals.get(any_db, asked.key).error == "No memory."


def test_what_a_lost_worker_held_waits_again(any_db: Session) -> None:
    key = rehearsals.ask(any_db, **ASKED).key
    assert rehearsals.claim(any_db, "gone")
    rehearsals.free_orphans(any_db, ["gone"])
    assert rehearsals.get(any_db, key).state == "running"
    rehearsals.free_orphans(any_db, ["alive"])
    assert rehearsals.get(any_db, key).state == "waiting"
    assert rehearsals.claim(any_db, "w1")
    rehearsals.free(any_db, "w1")
    assert rehearsals.get(any_db, key).state == "waiting"


def test_of_several_that_ask_and_claim_at_once_one_does(any_db: Session) -> None:
    script = (
        "import json\nfrom app import database, rehearsals\nGO\n"
        f"asked = json.loads({json.dumps(json.dumps(ASKED))})\n"
        "with database.session() as db: rehearsals.ask(db, **asked)\n"
        "with database.session() as db: print(bool(rehearsals.claim(db, name)))"
    )
    said = at_once(script, 3)
    assert sorted(line.strip() for line in said) == ["False", "False", "True"]


# --- The keeper ---------------------------------------------------------------------------------


class _Child:
    """Stands for a process of the tuner's that ends when told to."""

    def __init__(self) -> None:
        self.returncode: int | None = None
        self.stdin = io.StringIO()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> int:
        wait_for(lambda: self.returncode is not None, 20)
        return self.returncode or 0

    def kill(self) -> None:
        self.returncode = -9


class _Keeper(Tuner):
    def __init__(self, device: str = "CPU") -> None:
        super().__init__()
        self.worker.device, self.worker.memory_mb = device, 4000.0
        self.begun: list[tuple[str, ...]] = []
        self.children: list[_Child] = []

    def child(self, module: str, *arguments: str) -> Any:
        self.begun.append((module, *arguments))
        self.children.append(_Child())
        return self.children[-1]


@pytest.mark.parametrize("device", ["CPU", "GPU large"])  # which has room for several runs
def test_the_tuner_rehearses_before_the_next_run_and_beside_none(db: Session, device: str) -> None:
    keeper = _Keeper(device)
    factories.run(db, forecast={"memory_mb": 100.0, "gpu_memory_mb": 100.0, "seconds": 9.0})
    key = rehearsals.ask(db, **ASKED).key
    assert keeper.tasks == []
    keeper.look()
    assert ("worker.rehearse", key) in keeper.begun
    assert keeper.tasks == []  # the run waits
    keeper.look()
    assert keeper.begun.count(("worker.rehearse", key)) == 1
    keeper.children[-1].returncode = -9
    keeper.look()
    with database.reading() as read:
        lost = rehearsals.get(read, key)
    assert lost.state == "failed"
    assert "often: the machine ran out of memory" in (lost.error or "")
    assert len(keeper.tasks) == 1  # now the run
    rehearsals.ask(db, **ASKED)
    keeper.look()
    assert _state(key) == "waiting"  # until the run has ended
    for child in keeper.children:
        child.returncode = 0


def test_a_tuner_that_ends_hands_its_rehearsal_back(db: Session) -> None:
    keeper = _Keeper()
    key = rehearsals.ask(db, **ASKED).key
    keeper.look()
    assert _state(key) == "running"
    keeper.let_go()
    assert _state(key) == "waiting"


# --- Measured -----------------------------------------------------------------------------------


@pytest.fixture
def real(db: Session, tiny_model: Path) -> Given:
    """A tiny model as the studio keeps one, and a dataset."""
    made = factories.base_model(db)
    folder = storage.base_model_folder(made.id)
    folder.mkdir(parents=True, exist_ok=True)
    for path in tiny_model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    made.shapes = prepare.measure(folder)
    db.commit()
    tiny.tokenizer(folder)
    return Given(made, factories.dataset(db), "{{input}}", (), (30, 20, 10))


def _run(db: Session, key: str, *, quick: bool = True) -> None:
    """In a process of its own; as the tuner starts it unless that should be quick."""
    db.commit()  # a transaction of SQLite that may write keeps all others waiting
    environment = {"PATH": "", "STUDIO_HOME": str(storage.home()), "STUDIO_THREADS": "1"}
    if quick:
        nursery.born("worker.rehearse", [key], environment, storage.log_file("rehearse")).wait(200)
        return
    subprocess.run(
        [sys.executable, "-m", "worker.rehearse", key],
        cwd=storage.REPOSITORY,
        env=environment | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        check=True,
        timeout=200,
    )


@pytest.mark.parametrize("method", ["prompt_tuning", "lora", "full"])
def test_two_steps_on_the_longest_batch_are_measured(db: Session, real: Given, method: str) -> None:
    params = methods.get(method).schema(batch_size=4, devices=2).model_dump()
    before = forecast.of(db, real, method, params)
    key = rehearsals.ask(db, **real.row(method, params)).key
    assert rehearsals.claim(db, "w1")
    _run(db, key, quick=method != "full")
    done: Rehearsal = rehearsals.get(db, key)
    assert (done.state, done.error) == ("done", None)
    found = done.figures
    assert len(found["examples"]) == 4
    longest = max(sum(pair) for pair in found["examples"])
    assert longest == max(lengths.of(real.base_model, real.dataset, "{{input}}", ()).totals())
    assert 100 < found["peak_memory_mb"] < 3000
    assert found["step_seconds"] > 0
    told = forecast.of(db, real, method, params)
    assert told["memory_from"]["cpu"] == told["time_from"] == "rehearsal"
    # Nearly all of it is the program's own, which is the same in every process like this.
    assert told["memory_mb"] == pytest.approx(found["peak_memory_mb"], rel=0.1)
    assert told["reckoned"] == before["reckoned"]


def test_what_goes_wrong_is_said_in_words(db: Session, real: Given) -> None:
    params = methods.get("lora").schema(target_modules="nothing_such").model_dump()
    key = rehearsals.ask(db, **real.row("lora", params)).key
    assert rehearsals.claim(db, "w1")
    _run(db, key)
    failed = rehearsals.get(db, key)
    assert failed.state == "failed"
    assert "has no layers named nothing_such" in (failed.error or "")
