"""What takes up room on the disk, and what deleting it would free."""

import time
from functools import lru_cache
from typing import Any, NamedTuple

from sqlalchemy import delete, select, text
from sqlalchemy.orm import Session

from app import files, runs, storage
from app.settings import settings
from app.tables import BaseModel, Checkpoint, Dataset, Experiment, Run

PARTS = ("checkpoints", "best", "last", "whole")  # of a run; what else it holds is in no part


class Entry(NamedTuple):
    """Something a person can delete. `frees`: bytes that this would free; `kept`: why none."""

    kind: str  # as in app/trash.py
    id: str
    name: str
    num_bytes: int
    parts: dict[str, int]
    frees: int
    kept: str
    trashed: bool


class Usage(NamedTuple):
    """Bytes. `finished`: checkpoints and last states of runs that have ended."""

    entries: list[Entry]  # the largest first
    finished: int
    logs: int
    database: int
    other: int  # the broker's file, uploads at work, what a deletion left behind
    used: int
    free: int


def usage(db: Session) -> Usage:
    """All of it. Looks at every file: not for every second."""
    runs_of = {path.name: _parts(path) for path in storage.entries("runs")}
    bases = {path.name: storage.size(path) for path in storage.entries("base_models")}
    experiments = list(db.scalars(select(Experiment)))
    entries = [_experiment(one, runs_of) for one in experiments]
    for model in db.scalars(select(BaseModel)):
        users = [one for one in experiments if one.base_model_id == model.id]
        entries.append(_needed("base-model", model, bases.get(model.id, 0), users))
    for dataset in db.scalars(select(Dataset)):
        users = [one for one in experiments if one.dataset_id == dataset.id]
        entries.append(_needed("dataset", dataset, dataset.num_bytes, users))
    ended = [run.id for one in experiments for run in one.runs if run.state in runs.FINAL]
    finished = [runs_of.get(run, {}) for run in ended]
    used, logs, database = storage.size(storage.home()), _logs(), _database(db)
    shown = logs + (0 if settings.database_url else database) + sum(x.num_bytes for x in entries)
    return Usage(
        entries=sorted(entries, key=lambda entry: -entry.num_bytes),
        finished=sum(parts.get("checkpoints", 0) + parts.get("last", 0) for parts in finished),
        logs=logs,
        database=database,
        other=max(0, used - shown),
        used=used,
        free=storage.free(),
    )


def _parts(folder: storage.Path) -> dict[str, int]:
    found = list(folder.glob("*")) if folder.is_dir() else [folder]
    return {path.name: storage.size(path) for path in found}


def _experiment(experiment: Experiment, runs_of: dict[str, dict[str, int]]) -> Entry:
    mine = [runs_of.get(run.id, {}) for run in experiment.runs]
    at_work = any(run.state in runs.HELD for run in experiment.runs)
    total = sum(sum(parts.values()) for parts in mine)
    return Entry(
        kind="experiment",
        id=experiment.id,
        name=experiment.name,
        num_bytes=total,
        parts={part: sum(parts.get(part, 0) for parts in mine) for part in PARTS},
        frees=0 if at_work else total,
        kept="A run is at work" if at_work else "",
        trashed=experiment.trashed_at is not None,
    )


def _needed(kind: str, row: Any, num_bytes: int, users: list[Experiment]) -> Entry:
    """A dataset or base model, which stays while an experiment uses it."""
    outside = [one for one in users if one.trashed_at is None]
    kept = f"Used by {outside[0].name}" if outside else ""
    if len(outside) > 1:
        kept += f" and {len(outside) - 1} more"
    trashed = row.trashed_at is not None
    frees = 0 if outside else num_bytes
    return Entry(kind, row.id, row.name, num_bytes, {}, frees, kept, trashed)


def _logs() -> int:
    return sum(storage.size(path) for path in storage.entries("logs"))


def _database(db: Session) -> int:
    if settings.database_url:
        return int(db.scalar(text("SELECT pg_database_size(current_database())")) or 0)
    file = storage.database_file()
    return sum(storage.size(path) for path in file.parent.glob(f"{file.name}*"))  # its log too


def summary() -> tuple[int, int]:
    """Bytes used by the studio and free on its disk; looked at anew every minute."""
    return _summary(settings.home, int(time.monotonic() // 60))


@lru_cache(maxsize=1)
def _summary(_home: str, _minute: int) -> tuple[int, int]:
    return storage.size(storage.home()), storage.free()


def drop_finished(db: Session) -> int:
    """Delete checkpoints and last states of runs that have ended; the bytes that were freed.

    Such a run is never resumed, and what is kept of it is its best state.
    """
    ended = list(db.scalars(select(Run).where(Run.state.in_(runs.FINAL))))
    for run in ended:
        run.figures = {**run.figures, "last_dropped": True}
    db.execute(delete(Checkpoint).where(Checkpoint.run_id.in_([run.id for run in ended])))
    db.commit()
    freed = 0
    for run in ended:
        for part in ("checkpoints", "last"):
            path = storage.files_of_run(run.id) / part
            freed += storage.size(path)
            files.remove(path)
    _summary.cache_clear()
    return freed
