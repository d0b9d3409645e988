"""Runs of a tiny model, quick enough to be killed often, and what is left of one to compare."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from app import database, methods, points, runs, storage
from app.tables import Experiment, Run
from tests import factories
from tests.tiny import QUICK

SHORT = [(f"{n} {'abcdef'[n % 6]}", factories.LABELS[n % 3]) for n in range(80)]


def experiment(db: Session, model: Path, count: int = 80) -> Experiment:
    """An experiment without runs on a copy of the tiny model; 80 examples leave 40 to train on."""
    base = factories.base_model(db)
    shutil.copytree(model, storage.base_model_folder(base.id))
    data = factories.dataset(db, SHORT[:count])
    return factories.experiment(db, base, data, template="{{input}}")


def run(db: Session, of: Experiment, method: str = "lora", **params: Any) -> Run:
    """A queued run."""
    given = {"num_epochs": 2, "batch_size": 4, "max_length": 128, **QUICK.get(method, {}), **params}
    checked = methods.get(method).schema.model_validate(given)
    return factories.run(db, of, method=method, params=checked.model_dump())


def curve(run_id: str) -> list[tuple[object, ...]]:
    """What must be the same however often a run was interrupted, point by point."""
    with database.reading() as db:
        found = points.curve(db, run_id)
    return [
        (p.kind, p.step, p.loss, p.grad_norm, p.learning_rate, p.epoch, p.tokens) for p in found
    ]


def left(run_id: str) -> dict[str, str]:
    """The hash of every file of the best and the last state."""
    folder = storage.run_folder(run_id)
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for kind in ("best", "last")
        for path in sorted((folder / kind).rglob("*"))
        if path.is_file()
    }


def said(run_id: str) -> list[str]:
    """The run's history in words."""
    with database.reading() as db:
        return [event.message for event in runs.history(db, run_id)]


def now(run_id: str) -> Run:
    """The run as it stands."""
    with database.reading() as db:
        return runs.get(db, run_id)
