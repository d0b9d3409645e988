"""Files in the home folder that no row needs: of deletions, uploads and work that broke off."""

import time
from collections.abc import Iterator
from typing import NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import runs, storage
from app.settings import settings
from app.storage import Path
from app.tables import BaseModel, Dataset, Run

OLD_SECONDS = 3600.0  # what is younger may be at work just now
OLD_PASSING_SECONDS = 86400.0  # a backup of a large studio takes its time


class Leftover(NamedTuple):
    """A file or folder, and what is known of it."""

    path: Path
    why: str
    deleted: bool = False  # whether it was deleted, rather than not written to its end


def find(db: Session) -> list[Leftover]:
    """Safe to remove while the studio runs."""
    # The files first: what begins while this looks has its row already when the rows are read.
    listed = {what: storage.entries(what) for what in ("datasets", "base_models", "runs")}
    passing = [path for path in storage.home().iterdir() if _is_old(path, OLD_PASSING_SECONDS)]
    found = [
        *_of_datasets(db, listed["datasets"]),
        *_of_base_models(db, listed["base_models"]),
        *_of_runs(db, listed["runs"]),
        *(Leftover(path, "is of a backup that broke off") for path in passing if _passes(path)),
    ]
    db.commit()
    return found


def clear_cache(db: Session) -> None:
    """Remove from this machine what was deleted on another one; without a file store nothing is a cache."""
    if settings.files_url:
        for one in find(db):
            if one.deleted:
                storage.remove(one.path)


def _passes(path: Path) -> bool:
    return path.name.startswith((".backup-", ".restore-", ".snapshot-"))


def _is_old(path: Path, seconds: float) -> bool:
    try:
        return path.lstat().st_mtime < time.time() - seconds
    except FileNotFoundError:
        return False


def _of_datasets(db: Session, paths: list[Path]) -> Iterator[Leftover]:
    known = set(db.scalars(select(Dataset.id)))
    for path in paths:
        if not _is_old(path, OLD_SECONDS):
            continue  # it gets its name a moment before its row is stored
        if path.name.startswith(".upload-"):
            yield Leftover(path, "is of an upload that broke off")
        elif path.stem not in known:
            yield Leftover(path, "belongs to no dataset", deleted=True)


def _of_base_models(db: Session, paths: list[Path]) -> Iterator[Leftover]:
    states = {one.id: one.state for one in db.scalars(select(BaseModel))}
    for path in paths:
        owner = path.name.removeprefix(".").partition(".")[0]
        if owner not in states:
            yield Leftover(path, "belongs to no base model", deleted=True)
        elif path.name.endswith(".new") and states[owner] != "preparing":
            yield Leftover(path, "is of a preparation that broke off")


def _of_runs(db: Session, paths: list[Path]) -> Iterator[Leftover]:
    rows = {one.id: one for one in db.execute(select(Run.id, Run.state, Run.deleted_at))}
    for path in paths:
        row = rows.get(path.name)
        if row is None:
            yield Leftover(path, "belongs to no run", deleted=True)
        elif row.deleted_at is not None and storage.parts(path):
            yield Leftover(path, "belongs to a tuned model that was deleted", deleted=True)
        elif row.state not in runs.HELD:
            yield from _half_written(path)


def _half_written(folder: Path) -> Iterator[Leftover]:
    """What a worker that died was writing. What it had set aside (.old) may be all there is."""
    checkpoints = storage.inside(folder, "checkpoints")
    inner = list(checkpoints.iterdir()) if checkpoints.is_dir() else []
    for path in [*folder.iterdir(), *inner]:
        hidden = path.name.startswith(".") and not path.name.endswith(".old")
        # A generating worker writes a whole model without holding the run.
        if hidden and (path in inner or _is_old(path, OLD_SECONDS)):
            yield Leftover(path, "was not written to its end")
