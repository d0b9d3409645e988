"""The doctor: finds each thing that must not be, mends what is safe, and leaves alone what is well."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session
from typer.testing import CliRunner

from app import claims, database, disk, doctor, leftovers, points, runs, storage, trash, workers
from app.cli import cli
from app.settings import settings
from app.tables import Checkpoint, Completion, Point, Run, Worker
from tests import factories
from tests.factories import measured
from tests.test_backups import checkpoint, weights


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LATER", 0.0)


def _examined() -> list[doctor.Finding]:
    with database.reading() as db:
        return doctor.examine(db)


def _mend_all() -> list[str]:
    """What is left after mending what can be mended."""
    for finding in _examined():
        if finding.mend:
            with database.session() as db:
                finding.mend(db)
    return [finding.sentence for finding in _examined()]


def _old(path: Path) -> Path:
    long_ago = time.time() - 2 * 86400
    os.utime(path, (long_ago, long_ago))
    return path


def _well(db: Session) -> Run:
    """A studio in order: a run that is done, one at work, one in the trash."""
    of = factories.experiment(db)
    weights(storage.base_model_folder(of.base_model_id))
    done = factories.tuned(db, of, state="running", num_steps=1, attempt=1)
    points.record(db, done.id, 1, [measured(1), measured(1, "validation")])
    for folder in (storage.tuned_model_folder(done.id), storage.last_model_folder(done.id)):
        weights(folder)
    runs.finish(db, done.id, 1)
    at_work = factories.run(db, of, method="full", state="running")
    points.record(db, at_work.id, 1, [measured(1)])
    checkpoint(db, at_work, 1)
    thrown = factories.experiment(db, of.base_model, of.dataset)
    factories.run(db, thrown)
    trash.throw_away(db, "experiment", thrown.id)
    workers.beat(db, Worker(id="w1", kind="tuner", host="h", pid=1))
    db.commit()
    return at_work


def test_a_studio_in_order_has_no_findings(any_db: Session) -> None:
    _well(any_db)
    (storage.checkpoints_folder(any_db.scalars(select(Run.id)).first() or "") / ".x.new").touch()
    (storage.home() / ".backup-running").mkdir()
    storage.upload_file().touch()
    (storage.dataset_file("f" * 12)).touch()  # just being stored
    any_db.commit()
    assert [f for f in _examined() if "not written to its end" not in f.sentence] == []


def _break_lease(db: Session, run: Run) -> None:
    moment, _ = claims.now(db)
    run.lease_until = moment - 1


def _break_no_lease(db: Session, run: Run) -> None:
    run.lease_until = run.clock = None


def _break_boot(db: Session, run: Run) -> None:
    run.clock = "another boot"


ROWS: dict[str, tuple[Callable[[Session, Run], Any], str]] = {
    "lease": (_break_lease, "no worker holds it"),
    "no lease": (_break_no_lease, "no worker holds it"),
    "other boot": (_break_boot, "no worker holds it"),
    "loose lease": (
        lambda db, run: setattr(db.scalars(select(Run).where(Run.state == "succeeded")).one(), "worker", "w7"),
        "a lease on it is left",
    ),
    "points beyond": (
        lambda db, run: db.add(Point(run_id=run.id, number=9, attempt=1, **measured(2)._asdict())),
        "points beyond number 1",
    ),
    "whole model": (
        lambda db, run: db.execute(
            update(Run).where(Run.state == "succeeded").values(whole_state="making", whole_worker="w7")
        ),
        "being made by a worker that is gone",
    ),
    "whole files": (
        lambda db, run: db.execute(update(Run).where(Run.state == "succeeded").values(whole_state="ready")),
        "The whole model of run",
    ),
    "completion": (
        lambda db, run: db.add(
            Completion(ask="a", base_model_id=run.experiment.base_model_id, input="", template="",
                       settings={}, state="running", worker="w7")
        ),
        "1 answer(s)",
    ),
    "base model": (
        lambda db, run: factories.base_model(db, state="preparing", worker="w7", address="x"),
        "being prepared by a worker that is gone",
    ),
    "checkpoint": (
        lambda db, run: (storage.checkpoint_folder(run.id, 1, 1) / "manifest.json").write_text("x"),
        "The checkpoint of step 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROWS)
def test_what_rows_say_wrongly_is_found_and_mended(any_db: Session, kind: str) -> None:
    run = _well(any_db)
    damage, sentence = ROWS[kind]
    damage(any_db, run)
    any_db.commit()
    found = [finding for finding in _examined() if sentence in finding.sentence]
    assert len(found) == 1, _examined()
    assert _mend_all() == []
    with database.session() as db:
        expected = "queued" if "lease" in kind[-5:] and kind != "loose lease" else "running"
        expected = "queued" if kind == "other boot" else expected
        assert runs.get(db, run.id).state == expected
        if kind == "checkpoint":
            assert list(db.scalars(select(Checkpoint))) == []


def test_files_that_nothing_needs_are_found_and_removed(db: Session) -> None:
    at_work = _well(db)
    done = db.scalars(select(Run).where(Run.state == "succeeded")).one()
    left = [
        _old(_made(storage.dataset_file("e" * 12))),
        _old(_made(storage.upload_file())),
        _made(storage.base_model_folder("e" * 12) / "config.json").parent,
        _made(storage.base_model_folder(f".{at_work.experiment.base_model_id}.new") / "x").parent,
        _made(storage.run_folder("e" * 12) / "best" / "x").parent.parent,
        _made(storage.checkpoints_folder(done.id) / ".00000001.new" / "x").parent,
        _old(_made(storage.run_folder(done.id) / ".best.new" / "x").parent),
        _old(_made(storage.home() / ".backup-abc" / "x").parent),
    ]
    kept = [
        _made(storage.checkpoints_folder(at_work.id) / ".00000002.new" / "x"),
        _old(_made(storage.run_folder(done.id) / ".best.old" / "x").parent),
        _made(storage.home() / ".backup-now" / "x"),
        _made(storage.models_folder() / "mine" / "config.json"),
    ]
    db.commit()
    found = _examined()
    assert {finding.sentence.split(" ")[0] for finding in found} == {
        storage.home_name(path) for path in left
    }
    assert _mend_all() == []
    assert [path for path in left if path.exists()] == []
    assert [path for path in kept if not path.exists()] == []


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    return path


def test_what_is_lost_is_named_and_left_to_the_person(db: Session) -> None:
    run = _well(db)
    done = db.scalars(select(Run).where(Run.state == "succeeded")).one()
    storage.remove(storage.tuned_model_folder(done.id))
    storage.remove(storage.base_model_folder(run.experiment.base_model_id))
    storage.remove(storage.dataset_file(run.experiment.dataset_id))
    db.commit()
    found = _examined()
    assert [finding.mend for finding in found] == [None] * 3
    told = " ".join(finding.sentence for finding in found)
    for part in ("'best' is missing", "base model Tiny are missing", "dataset's file is missing"):
        assert part in told
    assert len(_mend_all()) == 3


def test_a_dropped_last_state_is_no_loss(db: Session) -> None:
    _well(db)
    disk.drop_finished(db)
    assert _examined() == []


def test_as_a_command(db: Session) -> None:
    run = _well(db)
    runner = CliRunner()
    assert runner.invoke(cli, ["doctor"]).exit_code == 0
    run.lease_until = None
    db.commit()
    storage.remove(storage.dataset_file(run.experiment.dataset_id))
    db.commit()
    first = runner.invoke(cli, ["doctor"])
    assert first.exit_code == 1
    assert "With --fix: It goes back" in first.stdout
    second = runner.invoke(cli, ["doctor", "--fix"])
    assert second.exit_code == 1  # the file is lost
    assert "Mended: It goes back" in second.stdout
    assert "To do: Restore it from a backup" in second.stdout
    with database.session() as other:
        assert runs.get(other, run.id).state == "queued"


def test_others_are_kept_out_of_the_home_folder(home: Path, db: Session) -> None:
    home.chmod(0o755)
    (finding,) = _examined()
    assert "may look into" in finding.sentence
    assert _mend_all() == []
    assert home.stat().st_mode & 0o077 == 0


def test_what_another_machine_deleted_leaves_the_cache(
    db: Session, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = _well(db)
    db.commit()
    kept = storage.run_folder(run.id)
    gone, half = storage.run_folder("0" * 12), storage.run_folder(run.id) / ".half"
    for folder in (gone, half):
        folder.mkdir(parents=True, exist_ok=True)
    _old(half)
    leftovers.clear_cache(db)
    assert gone.exists()  # without a file store nothing here is a cache
    monkeypatch.setattr(settings, "files_url", f"file://{tmp_path}/store")
    leftovers.clear_cache(db)
    assert not gone.exists()
    assert kept.exists()
    assert half.exists()  # is for the doctor
