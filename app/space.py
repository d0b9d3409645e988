"""Space on the disk: asked for before it is needed; runs that wait for it, and when they go on."""

import errno
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import queue, runs, storage
from app.crashpoints import crashpoint
from app.errors import NoRoom
from app.settings import settings
from app.tables import Run


def spare() -> int:
    """Bytes that may still be written: what is free, less what the settings keep free."""
    return storage.free() - settings.disk_reserve_mb * 2**20


def check(needed: int) -> None:
    """Raises NoRoom, before anything is written, unless so many bytes may be written."""
    missing = needed - spare()
    if missing > 0:
        raise NoRoom(
            f"The disk of the home folder is full: saving takes {_megabytes(needed)}, "
            f"{settings.disk_reserve_mb} MB are to stay free, and {_megabytes(missing)} are missing.",
            needed,
        )


def _megabytes(size: int) -> str:
    return f"{max(1, round(size / 2**20)):,} MB"


def is_full(error: BaseException) -> bool:
    """Whether a write failed because the disk is full, whoever says so."""
    if isinstance(error, NoRoom):
        return True
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # safetensors and SQLite have only words for it.
    return any(words in str(error) for words in ("No space left", "disk is full"))


def wait(db: Session, run_id: str, attempt: int, error: BaseException, needed: int) -> None:
    """A run cannot save: it waits until there is room. One that was to stop just stops."""
    said = str(error) if isinstance(error, NoRoom) else "The disk of the home folder is full."
    needed = error.needed if isinstance(error, NoRoom) else needed
    reason = (
        f"Waiting for disk: {said} What was saved before is safe; free some space, and the run "
        "goes on from there by itself."
    )
    run = runs.get(db, run_id)
    values: dict[str, Any] = {"error": reason, "figures": run.figures | {"bytes_needed": needed}}
    fenced = Run.attempt == attempt
    if runs.move(db, run_id, frozenset({"running"}), "waiting", fenced, **values):
        runs.note(db, run_id, attempt, reason, "warning")
        crashpoint("run.waiting")
        db.commit()
        queue.announce(run.experiment_id)
        return
    runs.note(db, run_id, attempt, said + " What was trained since the last saving is lost.")
    runs.settle(db, run_id, attempt, reason)


def wake(db: Session) -> None:
    """Put the runs that wait back into the queue as soon as what they need can be written."""
    waiting = db.scalars(select(Run).where(Run.state == "waiting")).all()
    for run in waiting:
        if spare() < run.figures.get("bytes_needed", 0):
            continue
        if runs.move(db, run.id, frozenset({"waiting"}), "queued", error=None):
            runs.note(db, run.id, run.attempt, "There is room on the disk: back in the queue.")
            db.commit()
            queue.announce(run.experiment_id)
            queue.ring("tuner")
    db.commit()
