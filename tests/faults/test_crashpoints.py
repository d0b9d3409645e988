"""Every crash point there is: the process dies there, or the disk is full there, and all goes on.

The points are read from the code: one that has no case here fails the first test.
"""

import ast
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import delete
from sqlalchemy.orm import Session

from app import (
    base_models,
    completions,
    crashpoints,
    database,
    datasets,
    experiments,
    storage,
    tables,
    tuned_models,
)
from app.settings import settings
from app.tables import Baseline, BaseModel, Run
from tests import factories
from tests.faults import small
from tests.faults.plant import Plant, begun, reaches, sound, until
from tests.faults.test_kills import lines, states

FOUND = {
    node.args[0].value: path.relative_to(storage.REPOSITORY).as_posix()
    for folder in ("app", "worker")
    for path in (storage.REPOSITORY / folder).rglob("*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.Call)
    and isinstance(node.func, ast.Name)
    and node.func.id == "crashpoint"
    and isinstance(node.args[0], ast.Constant)
}
# Who comes by at which point.
TRAINER = (
    "checkpoint.begun",
    "checkpoint.values",
    "checkpoint.numbers",
    "checkpoint.manifest",
    "checkpoint.synced",
    "checkpoint.placed",
    "checkpoint.entered",
    "checkpoint.forgotten",
    "tuned.written",
    "files.set_aside",
    "files.placed",
    "points.stored",
    "points.committed",
    "points.rewound",
    "samples.stored",
    "answers.stored",
    "baseline.stored",
    "run.finishing",
    "run.finished",
    "run.waiting",
)
KEEPER = ("claim.noted", "claim.committed", "put_back.counted", "run.moved")
UPLOAD = ("upload.stored", "dataset.placed", "dataset.committed")
CREATE = ("experiment.stored", "experiment.committed")
ASK = ("ask.stored", "ask.committed")
ANSWER = ("ask.claimed", "answer.written", "answer.ending", "answer.ended")
PREPARE = ("base_model.fetched", "base_model.placed")
WHOLE = ("whole.written", "whole.proved")
# Where a file is written: there the disk may be full.
WRITES = (
    *TRAINER[: TRAINER.index("points.stored")],
    "upload.stored",
    "dataset.placed",
    "base_model.fetched",
    "whole.written",
)
QUICK = ("checkpoint.placed", "tuned.written")  # of the trainer's, those in the short form


def test_every_crash_point_has_a_case() -> None:
    cases = [*TRAINER, *KEEPER, *UPLOAD, *CREATE, *ASK, *ANSWER, *PREPARE, *WHOLE]
    assert sorted(cases) == sorted(FOUND)
    assert set(WRITES) <= set(FOUND)


def test_every_place_that_writes_for_good_has_a_crash_point() -> None:
    """Modules that commit what people made or workers measured, or put files in their place."""
    assert set(FOUND.values()) >= {
        "app/claims.py",
        "app/comparison/baselines.py",
        "app/completions.py",
        "app/datasets.py",
        "app/experiments.py",
        "app/points.py",
        "app/registry.py",
        "app/space.py",
        "app/runs.py",
        "app/samples.py",
        "app/web/uploads.py",
        "worker/checkpoints.py",
        "worker/export.py",
        "worker/prepare.py",
        "worker/recorder.py",
    }


def test_a_crash_point_does_nothing_unless_it_is_named(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashpoints.crashpoint("here")
    monkeypatch.setattr(settings, "crash", "there:1:full")
    crashpoints.crashpoint("here")
    monkeypatch.setattr(settings, "crash", "here:3:full")
    crashpoints.crashpoint("here")
    crashpoints.crashpoint("here")
    with pytest.raises(OSError, match="No space left"):
        crashpoints.crashpoint("here")
    crashpoints.crashpoint("here")  # once
    script = "from app.crashpoints import crashpoint; crashpoint('now'); print('alive')"
    died = subprocess.run(
        [sys.executable, "-c", script],
        env={"STUDIO_HOME": settings.home, "STUDIO_CRASH": "now"},
        cwd=storage.REPOSITORY,
        capture_output=True,
    )
    assert died.returncode == -9


def crashed(name: str) -> bool:
    return storage.crash_mark(name).exists()


# --- The trainer ------------------------------------------------------------------------------


class Tuning:
    """A worker that stays, one run after another, and what each must come to."""

    def __init__(self, plant: Plant, db: Session, model: Path) -> None:
        self.plant, self.db = plant, db
        self.of = small.experiment(db, model)
        self.of.watch = ["1 a"]
        db.commit()
        plant.start("quick tuner")
        first = self.run()
        reaches(first.id, "succeeded")
        self.curve, self.files = small.curve(first.id), small.left(first.id)

    def run(self) -> Run:
        """A queued run."""
        return small.run(self.db, self.of, validation_interval=2, num_epochs=1)

    def ends_well(self, run: Run) -> None:
        """It succeeds, and is what it would have been without any harm."""
        reaches(run.id, "succeeded")
        assert small.curve(run.id) == self.curve
        assert small.left(run.id) == self.files
        sound()


@pytest.fixture(scope="module")
def tuning(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tuning]:
    """One for all points: `overrides.json` names the next one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "home", str(tmp_path_factory.mktemp("crashes") / "home"))
        patch.setattr(settings, "database_url", "")
        database.engine.cache_clear()
        tables.Table.metadata.create_all(database.engine())
        with begun(patch) as plant, database.session() as db:
            yield Tuning(plant, db, model)
        database.engine().dispose()
        database.engine.cache_clear()


def harmed(tuning: Tuning, name: str, spec: str, **more: Any) -> Run:
    """A run whose process comes to harm at the point."""
    storage.remove(storage.crash_mark(name))
    tuning.plant.override(crash=spec, **more)
    run = tuning.run()
    until(lambda: crashed(name), f"it crashes at {name}")
    return run


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.faults) for name in TRAINER],
)
def test_the_trainer_dies_there(tuning: Tuning, name: str) -> None:
    if name == "points.rewound":  # something must have been measured that was not saved
        storage.remove(storage.crash_mark("points.committed"))
        both = "points.committed:3,points.rewound"
        run = harmed(tuning, name, both, checkpoint_seconds=3600.0)
    elif name == "baseline.stored":  # measured once, then kept
        tuning.db.execute(delete(Baseline))
        tuning.db.commit()
        run = harmed(tuning, name, name)
    elif name == "run.waiting":
        run = harmed(tuning, name, name, disk_reserve_mb=10**9)
        tuning.plant.override()
    else:
        # The second time, where there is one: then there is something that could be lost.
        times = 2 if name.split(".")[0] in {"checkpoint", "points", "samples", "tuned"} else 1
        run = harmed(tuning, name, f"{name}:{times}")
    tuning.ends_well(run)
    expected = 1 if name == "run.finished" else 2
    assert small.now(run.id).attempt >= expected, small.said(run.id)


@pytest.mark.parametrize(
    "name",
    [
        name if name == "checkpoint.values" else pytest.param(name, marks=pytest.mark.faults)
        for name in WRITES
        if name in TRAINER
    ],
)
def test_the_disk_is_full_there(tuning: Tuning, name: str) -> None:
    run = harmed(tuning, name, f"{name}:{1 if name == 'files.set_aside' else 2}:full")
    tuning.ends_well(run)  # it waits, and goes on by itself, since there is room
    assert any("Waiting for disk" in line for line in small.said(run.id)), small.said(run.id)
    assert not any("was ended by" in line for line in small.said(run.id))


def both_ways(names: tuple[str, ...]) -> list[tuple[str, str]]:
    """Death at each, and a full disk where a file is written."""
    return [(name, how) for name in names for how in ("", ":1:full") if not how or name in WRITES]


@pytest.mark.faults
@pytest.mark.parametrize(("name", "how"), both_ways(WHOLE))
def test_merging_dies_there(tuning: Tuning, name: str, how: str) -> None:
    plant, db = tuning.plant, tuning.db
    if "quick generator" not in plant.running:
        plant.start("quick generator")
    tuning.plant.override()
    run = tuning.run()
    tuning.ends_well(run)
    storage.remove(storage.crash_mark(name))
    plant.override(crash=name + how)
    tuned_models.ask_whole(db, run.id)
    until(lambda: crashed(name))
    until(lambda: small.now(run.id).whole_state == "failed")
    assert small.now(run.id).whole_error
    tuned_models.ask_whole(db, run.id)
    until(lambda: small.now(run.id).whole_state == "ready")
    sound()


@pytest.mark.faults
@pytest.mark.parametrize(("name", "how"), both_ways(PREPARE))
def test_preparing_a_base_model_dies_there(
    tuning: Tuning, model: Path, name: str, how: str
) -> None:
    plant, db = tuning.plant, tuning.db
    if "quick generator" not in plant.running:
        plant.start("quick generator")
    folder = storage.models_folder() / "tiny"
    storage.remove(folder)
    shutil.copytree(model, folder)
    storage.remove(storage.crash_mark(name))
    plant.override(crash=name + how)
    base = BaseModel(name="Tiny", source="folder", address="tiny")
    db.add(base)
    db.commit()

    def state() -> str:
        with database.reading() as reader:
            return base_models.get(reader, base.id).state

    until(lambda: state() == "failed")
    with database.reading() as reader:
        assert base_models.get(reader, base.id).error
    base_models.retry(db, base.id)
    until(lambda: state() == "ready")
    assert not list(storage.base_model_folder(base.id).parent.glob(f".{base.id}.new"))


# --- The keeper -------------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.parametrize("name", KEEPER)
def test_the_worker_dies_there(db: Session, plant: Plant, name: str) -> None:
    run = factories.run(db, params={"pretend": "die at first"})
    plant.start("light tuner", STUDIO_CRASH=name)
    until(lambda: crashed(name))
    plant.kill("light tuner")
    plant.start("light tuner")
    reaches(run.id, "succeeded")


# --- The web ----------------------------------------------------------------------------------


def dies(plant: Plant, name: str, ask: Callable[[httpx.Client], Any]) -> None:
    """The web dies while it is asked; then a new one is there."""
    plant.start("web", STUDIO_CRASH=name)
    web = plant.web()
    with pytest.raises(httpx.TransportError):
        ask(web)
    assert crashed(name)
    plant.kill("web")
    plant.start("web")


def upload(web: httpx.Client) -> httpx.Response:
    return web.post("/api/datasets", files={"file": ("a.jsonl", lines())})


@pytest.mark.parametrize(
    "name",
    [
        name if name == "dataset.placed" else pytest.param(name, marks=pytest.mark.faults)
        for name in UPLOAD
    ],
)
def test_the_web_dies_while_it_stores_a_dataset(db: Session, plant: Plant, name: str) -> None:
    dies(plant, name, upload)
    assert len(datasets.all(db)) == (1 if name == "dataset.committed" else 0)
    db.commit()
    answer = upload(plant.web())
    assert answer.status_code == 201
    assert len(datasets.rows(datasets.get(db, answer.json()["id"]))) == 200
    db.commit()


@pytest.mark.faults
@pytest.mark.parametrize("name", [name for name in WRITES if name in UPLOAD])
def test_the_disk_is_full_while_the_web_stores_a_dataset(
    db: Session, plant: Plant, name: str
) -> None:
    plant.start("web", STUDIO_CRASH=f"{name}:1:full")
    web = plant.web()
    answer = upload(web)
    assert answer.status_code == 503
    assert "make room" in answer.json()["error"]["message"]
    assert datasets.all(db) == []
    db.commit()
    assert upload(web).status_code == 201


@pytest.mark.parametrize(
    "name",
    [
        name if name == "experiment.committed" else pytest.param(name, marks=pytest.mark.faults)
        for name in CREATE
    ],
)
def test_promise_1_the_web_dies_between_commit_and_send(
    db: Session, plant: Plant, name: str
) -> None:
    """What is in the table starts, although nobody rang for it."""
    base, data = factories.base_model(db), factories.dataset(db)
    given = {"name": "x", "base_model_id": base.id, "dataset_id": data.id, "methods": {"lora": {}}}
    dies(plant, name, lambda web: web.post("/api/experiments", json=given))
    found = experiments.all(db)
    db.commit()
    if name == "experiment.stored":
        assert found == []
        return
    (run,) = found[0].runs
    run.params = {"pretend": "finish"}
    db.commit()
    plant.start("light tuner")
    reaches(run.id, "succeeded")


@pytest.mark.faults
@pytest.mark.parametrize("name", ASK)
def test_the_web_dies_while_a_prompt_is_asked(db: Session, plant: Plant, name: str) -> None:
    base = factories.base_model(db)
    given = {"base_model_id": base.id, "input": "Hello"}
    dies(plant, name, lambda web: web.post("/api/completions", json=given))
    asked = completions.recent(db)
    db.commit()
    assert len(asked) == (1 if name == "ask.committed" else 0)
    plant.start("light generator")
    for one in asked:
        until(lambda: states(one.ask) == ["done"])  # noqa: B023


@pytest.mark.faults
@pytest.mark.parametrize("name", ANSWER)
def test_the_answering_process_dies_there(db: Session, plant: Plant, name: str) -> None:
    """No prompt stays open, and later ones are answered."""
    base = factories.base_model(db)

    def ask() -> str:
        return completions.ask(
            db, base_model_id=base.id, run_ids=[None], input="Hello", template="{{input}}"
        )

    first = ask()
    plant.start("light generator", STUDIO_CRASH=name)
    until(lambda: crashed(name))
    until(lambda: states(first)[0] in {"done", "failed"})
    assert states(first) == (["done"] if name == "answer.ended" else ["failed"])
    later = ask()
    until(lambda: states(later) == ["done"])
