"""The register of a run's checkpoints: a row says that one was whole on the disk, and its digest."""

import hashlib
from collections.abc import Callable, Collection
from typing import NamedTuple

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from app import files, runs, storage
from app.crashpoints import crashpoint
from app.storage import Path
from app.tables import Checkpoint

MANIFEST = "manifest.json"  # in a checkpoint's folder: sizes and hashes of the other files


class Made(NamedTuple):
    """A checkpoint that has been written: its step, the digest of its manifest, bytes, seconds."""

    step: int
    digest: str
    num_bytes: int
    seconds: float


def enter(db: Session, run_id: str, attempt: int, made: Made, place: Callable[[], None]) -> None:
    """Have `place` give the checkpoint its name, and enter it. Raises LostClaim.

    The run's row is locked meanwhile: nobody can take the run over between the check and the name.
    """
    runs.update_held(db, run_id, attempt, stuck=0)  # whatever happens now, this run gets on
    place()
    crashpoint("checkpoint.placed")
    db.merge(Checkpoint(run_id=run_id, attempt=attempt, **made._asdict()))
    db.commit()
    crashpoint("checkpoint.entered")


def is_good(folder: Path, digest: str) -> bool:
    """Whether the checkpoint in the folder has the manifest that its row was given for."""
    manifest = folder / MANIFEST
    return manifest.is_file() and hashlib.sha256(manifest.read_bytes()).hexdigest() == digest


def of(db: Session, run_id: str) -> list[Checkpoint]:
    """The run's checkpoints, the newest first."""
    query = select(Checkpoint).where(Checkpoint.run_id == run_id)
    order = (Checkpoint.step.desc(), Checkpoint.attempt.desc())
    return list(db.scalars(query.order_by(*order)))


def keep(db: Session, run_id: str, attempt: int, kept: Collection[tuple[int, int]]) -> None:
    """Forget every checkpoint but those of these steps and attempts, then remove what has no row.

    The rows go first: what has a row is always there. What is to be removed is chosen while the run
    is locked: a later attempt's checkpoints can not be among it. Raises LostClaim.
    """
    runs.lock(db, run_id, attempt)
    gone = set()
    for one in of(db, run_id):
        if (one.step, one.attempt) not in kept:
            gone.add(storage.checkpoint_folder(run_id, one.step, one.attempt))
            db.execute(
                delete(Checkpoint).where(
                    Checkpoint.run_id == run_id,
                    Checkpoint.step == one.step,
                    Checkpoint.attempt == one.attempt,
                )
            )
    names = {storage.checkpoint_folder(run_id, *one).name for one in kept}
    gone |= {one for one in storage.checkpoints_folder(run_id).iterdir() if one.name not in names}
    # And what a process that died had not yet given its name.
    gone |= {one for one in storage.run_folder(run_id).iterdir() if one.name.startswith(".")}
    db.commit()
    crashpoint("checkpoint.forgotten")
    for path in gone:
        files.remove(path)


def drop(db: Session, run_id: str) -> None:
    """Forget and remove all checkpoints of a run that has succeeded: it is never gone on with.

    What a process that dies here leaves, the disk page offers to delete (app/disk.py).
    """
    db.execute(delete(Checkpoint).where(Checkpoint.run_id == run_id))
    db.commit()
    files.remove(storage.files_of_run(run_id) / "checkpoints")
