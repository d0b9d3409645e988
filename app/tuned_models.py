"""Tuned models: what finished runs left, to list, prompt and take away."""

from collections.abc import Sequence

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app import methods, naming, queue
from app.errors import Conflict, InTrash, NotFound
from app.files import last_model, tuned_model, whole_model
from app.storage import Path
from app.tables import Run


def all(db: Session) -> list[Run]:
    """The runs whose tuned model is there, newest first."""
    query = select(Run).where(
        Run.state == "succeeded", Run.deleted_at.is_(None), Run.trashed_at.is_(None)
    )
    return list(db.scalars(query.order_by(Run.finished_at.desc())))


def get(db: Session, run_id: str) -> Run:
    """The run that left a tuned model. Raises NotFound."""
    query = select(Run).where(Run.id == run_id, Run.state == "succeeded", Run.deleted_at.is_(None))
    run = db.scalar(query.execution_options(populate_existing=True))
    if run is None:
        raise NotFound("There is no such tuned model. Its run has not finished, or it was deleted.")
    if run.trashed_at:
        raise InTrash("tuned-model", run.id, name(run), run.trashed_at)
    return run


def name(run: Run) -> str:
    """What a person knows it by."""
    return f"{naming.name(run)} of {run.experiment.name}"


def folder_name(run: Run, which: str) -> str:
    """A name for the archive that says what is in it; safe in any file system."""
    words = "".join(
        letter if letter.isascii() and letter.isalnum() else " " for letter in run.experiment.name
    )
    return "-".join([*words.lower().split()[:6], run.method.replace("_", "-"), which, run.id[:6]])


def files(run: Run, which: str) -> list[tuple[str, Path]]:
    """What to download: `tuned` is what the run saved (PEFT's adapter, or the whole model of full
    tuning), `last` its state after the last step, `whole` the merged copy.

    Pairs of a name inside the archive and the file. Raises NotFound, or Conflict while not ready.
    """
    folders = {
        "tuned": tuned_model,
        "last": last_model,
        "whole": whole_model,
    }
    if which not in folders:
        raise NotFound("There is no such download. Choose tuned, last or whole.")
    if which == "whole" and run.whole_state != "ready":
        raise Conflict("The whole model has not been put together yet. Ask for it first.")
    folder = folders[which](run.id, run.attempt)
    found = [(part.name, part) for part in sorted(folder.glob("*")) if part.is_file()]
    if not found:
        raise NotFound("The files of this model are gone from the studio's folder.")
    return found


def ask_whole(db: Session, run_id: str) -> None:
    """Have the adapter merged into the base model, for a download of the whole."""
    run = get(db, run_id)
    if not methods.get(run.method).merges:
        raise Conflict(
            f"{methods.get(run.method).label} leaves nothing that can be merged into the weights: "
            "download what was tuned, and load it with PEFT on the base model."
        )
    db.execute(
        update(Run)
        .where(Run.id == run_id, Run.whole_state.in_(("", "failed")))
        .values(whole_state="waiting", whole_error=None)
    )
    db.commit()
    queue.ring("generator")


def claim_whole(db: Session, worker: str) -> Run | None:
    """Take one merged copy to make, or None."""
    wanted = (Run.whole_state == "waiting", Run.trashed_at.is_(None))
    run = db.scalar(select(Run).where(*wanted).limit(1))
    taken = run and _move_whole(db, run.id, "waiting", "making", whole_worker=worker)
    return run if taken else None


def _move_whole(db: Session, run_id: str, source: str, target: str, **values: str | None) -> bool:
    result = db.execute(
        update(Run)
        .where(Run.id == run_id, Run.whole_state == source, Run.trashed_at.is_(None))
        .values(whole_state=target, **values)
    )
    db.commit()
    return bool(result.rowcount)  # type: ignore[attr-defined]


def finish_whole(db: Session, run_id: str) -> None:
    """The merged copy is there."""
    _move_whole(db, run_id, "making", "ready")


def fail_whole(db: Session, run_id: str, reason: str) -> None:
    """The merged copy could not be made, for the reason given."""
    _move_whole(db, run_id, "making", "failed", whole_error=reason)


def free_orphans(db: Session, alive: Sequence[str]) -> None:
    """Put back the copies that workers no longer alive were making."""
    lost = select(Run.id).where(Run.whole_state == "making", Run.whole_worker.not_in(alive))
    for run_id in db.scalars(lost).all():
        _move_whole(db, run_id, "making", "waiting")
    db.commit()
