"""The rules find what must not be, and nothing where all is well."""

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, insert, update
from sqlalchemy.orm import Session

from app import invariants, points, storage
from app.registry import MANIFEST
from app.tables import Checkpoint, Dataset, Point, Run
from tests import factories


def weights(path: Path) -> None:
    """A safetensors file of four numbers."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))


def going(db: Session) -> Run:
    """A run at step 3 with a checkpoint, which breaks no rule."""
    run = factories.run(db, state="running", num_steps=3)
    measured = [factories.measured(step) for step in (1, 2, 3)]
    points.record(db, run.id, 1, [*measured, factories.measured(3, "validation")])
    folder = storage.checkpoint_folder(run.id, 3, 1)
    folder.mkdir()
    (folder / MANIFEST).write_text("{}")
    digest = hashlib.sha256(b"{}").hexdigest()
    db.add(Checkpoint(run_id=run.id, step=3, attempt=1, digest=digest, num_bytes=2, seconds=0.1))
    db.commit()
    return run


def ended(db: Session) -> Run:
    """A run that succeeded, with all its files."""
    run = going(db)
    for folder in (storage.tuned_model_folder(run.id), storage.last_model_folder(run.id)):
        folder.mkdir()
        weights(folder / "adapter_model.safetensors")
    nobody = {"worker": None, "lease_until": None, "clock": None, "finished_at": 1.0}
    db.execute(update(Run).where(Run.id == run.id).values(state="succeeded", **nobody))
    db.commit()
    return run


def test_nothing_is_found_where_all_is_well(any_db: Session) -> None:
    going(any_db)
    ended(any_db)
    factories.run(any_db)
    assert invariants.check(any_db) == []


def changed(**values: Any) -> Callable[[Session, Run], None]:
    def act(db: Session, run: Run) -> None:
        db.execute(update(Run).where(Run.id == run.id).values(**values))

    return act


def without(kind: str, step: int) -> Callable[[Session, Run], None]:
    def act(db: Session, run: Run) -> None:
        which = (Point.run_id == run.id, Point.kind == kind, Point.step == step)
        db.execute(delete(Point).where(*which))

    return act


def a_point_beyond(db: Session, run: Run) -> None:
    point = factories.measured(4, "validation")._asdict()
    db.execute(insert(Point), [point | {"run_id": run.id, "attempt": 1, "number": 99}])


def a_number_that_falls(db: Session, run: Run) -> None:
    which = (Point.run_id == run.id, Point.kind == "train", Point.step == 1)
    db.execute(update(Point).where(*which).values(number=77))


def lost(name: str) -> Callable[[Session, Run], None]:
    def act(_db: Session, run: Run) -> None:
        storage.remove(storage.run_folder(run.id) / name)

    return act


def cut(_db: Session, run: Run) -> None:
    file = storage.tuned_model_folder(run.id) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def a_dataset_without_its_file(db: Session, run: Run) -> None:
    storage.remove(storage.dataset_file(run.experiment.dataset_id))


def a_longer_dataset(db: Session, run: Run) -> None:
    db.execute(update(Dataset).values(num_bytes=Dataset.num_bytes + 1))


def another_manifest(_db: Session, run: Run) -> None:
    (storage.checkpoint_folder(run.id, 3, 1) / MANIFEST).write_text("{ }")


@pytest.mark.parametrize(
    ("make", "breaks", "rule"),
    [
        (going, changed(state="asleep"), "states_are_known"),
        (going, changed(finished_at=1.0), "states_are_known"),
        (ended, changed(finished_at=None), "states_are_known"),
        (ended, changed(state="failed"), "states_are_known"),
        (going, changed(lease_until=None), "held_runs_have_a_lease"),
        (ended, changed(worker="w1"), "held_runs_have_a_lease"),
        (going, without("train", 2), "steps_have_no_gap"),
        (going, changed(step=2), "steps_have_no_gap"),
        (going, a_point_beyond, "steps_have_no_gap"),
        (ended, without("validation", 3), "steps_have_no_gap"),
        (ended, changed(num_steps=4), "steps_have_no_gap"),
        (going, a_number_that_falls, "numbers_rise"),
        (going, changed(last_number=3), "numbers_rise"),
        (ended, lost("best"), "tuned_models_are_whole"),
        (ended, lost("last/adapter_model.safetensors"), "tuned_models_are_whole"),
        (ended, cut, "tuned_models_are_whole"),
        (going, lost("checkpoints/00000003-0001"), "checkpoints_are_there"),
        (going, another_manifest, "checkpoints_are_there"),
        (going, a_dataset_without_its_file, "datasets_have_files"),
        (going, a_longer_dataset, "datasets_have_files"),
    ],
)
def test_each_rule_finds_what_breaks_it(
    db: Session, make: Callable[[Session], Run], breaks: Callable[[Session, Run], None], rule: str
) -> None:
    run = make(db)
    breaks(db, run)
    db.commit()
    db.expire_all()
    found = invariants.check(db)
    assert rule in {one.rule for one in found}
    assert {one.row_id for one in found} == {run.id} or rule == "datasets_have_files"
    assert rule in str(found[0])
