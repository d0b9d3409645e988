"""The trash: what was thrown away can be put back for a day, and then goes for good."""

import contextlib
import time
from typing import Any, NamedTuple

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from app import files, queue, runs, storage, tuned_models
from app.errors import Conflict, NotFound, StudioError
from app.settings import settings
from app.tables import (
    Answer,
    BaseModel,
    Checkpoint,
    Completion,
    Dataset,
    Event,
    Experiment,
    Notice,
    Point,
    Run,
    Sample,
    Vote,
)

# What can be thrown away, in the order of purging: what is needed goes after what needs it.
KINDS: dict[str, type[Any]] = {
    "experiment": Experiment,
    "tuned-model": Run,
    "dataset": Dataset,
    "base-model": BaseModel,
}


class Item(NamedTuple):
    """Something in the trash; `until`: when it goes for good."""

    kind: str
    id: str
    name: str
    num_bytes: int
    trashed_at: float
    until: float


def until(trashed_at: float) -> float:
    """When it goes for good."""
    return trashed_at + settings.trash_hours * 3600


def all(db: Session) -> list[Item]:
    """What can be put back, the last thrown away first."""
    found = [_item(kind, row) for kind in KINDS for row in _trashed(db, kind)]
    return sorted(found, key=lambda item: -item.trashed_at)


def _trashed(db: Session, kind: str) -> list[Any]:
    table = KINDS[kind]
    query = select(table).where(table.trashed_at.is_not(None))
    if kind == "tuned-model":  # the runs of an experiment in the trash are a part of it
        alone = (Experiment.trashed_at.is_(None), Run.deleted_at.is_(None))
        query = query.join(Experiment).where(*alone)
    return list(db.scalars(query.execution_options(populate_existing=True)))


def _item(kind: str, row: Any) -> Item:
    name = tuned_models.name(row) if kind == "tuned-model" else row.name
    num_bytes = sum(storage.size(path) for path in _files(kind, row))
    return Item(kind, row.id, name, num_bytes, row.trashed_at, until(row.trashed_at))


def _files(kind: str, row: Any) -> list[storage.Path]:
    """What lies on the disk for it."""
    if kind == "dataset":
        return [storage.dataset_file(row.id)]
    if kind == "base-model":
        return [storage.base_model_folder(row.id), storage.tokenizer_folder(row.id)]
    ids = [run.id for run in row.runs] if kind == "experiment" else [row.id]
    return [storage.files_of_run(run_id) for run_id in ids]


def _locked(db: Session, kind: str, thing_id: str) -> Any:
    """The row, which stays as it is until the transaction ends. Raises NotFound."""
    table = KINDS.get(kind)
    # NO KEY: a claim refers to the experiment in its own transaction, and must not wait for this.
    if table and db.scalar(
        select(table.id).where(table.id == thing_id).with_for_update(key_share=True)
    ):
        return db.get(table, thing_id, populate_existing=True)
    db.rollback()
    raise NotFound("There is no such thing. It may have been deleted for good already.")


def throw_away(db: Session, kind: str, thing_id: str) -> None:
    """Into the trash with it; once more changes nothing.

    Raises NotFound, or Conflict while it is at work or something outside the trash needs it.
    """
    thing = _locked(db, kind, thing_id)
    try:
        _CHECKS[kind](db, thing)
    except StudioError:
        db.rollback()
        raise
    thing.trashed_at = thing.trashed_at or time.time()
    if kind == "experiment":
        # With the mark on the run itself, one condition on one row keeps it from being claimed.
        mine = update(Run).where(Run.experiment_id == thing.id, Run.trashed_at.is_(None))
        db.execute(mine.values(trashed_at=thing.trashed_at))
    db.commit()
    queue.announce(thing_id)


def _check_experiment(db: Session, experiment: Experiment) -> None:
    # Locked, so that no worker takes one up meanwhile. (SQLite has locked everything already.)
    columns = select(Run.state, Run.whole_state).where(Run.experiment_id == experiment.id)
    for run in db.execute(columns.with_for_update()):
        if run.state in runs.HELD:
            raise Conflict(
                "A run of this experiment is at work. Cancel it first; nothing was deleted."
            )
        _check_whole(run.whole_state)


def _check_whole(state: str) -> None:
    if state == "making":
        raise Conflict(
            "A whole model is being put together from it. Wait until that has ended; nothing was "
            "deleted."
        )


def _check_tuned_model(_db: Session, run: Run) -> None:
    if run.state != "succeeded" or run.deleted_at:
        raise NotFound("There is no such tuned model. Its run has not finished, or it was deleted.")
    _check_whole(run.whole_state)


def _check_dataset(db: Session, dataset: Dataset) -> None:
    _check_unused(db, "dataset", Experiment.dataset_id == dataset.id, Experiment.trashed_at)


def _check_base_model(db: Session, model: BaseModel) -> None:
    _check_unused(db, "base model", Experiment.base_model_id == model.id, Experiment.trashed_at)
    if model.state == "preparing":
        raise Conflict(f"{model.name} is being prepared. Wait until that has ended.")


def _check_unused(db: Session, what: str, uses: Any, trashed_at: Any = None) -> None:
    """Raises Conflict if an experiment uses it; with `trashed_at` one outside the trash."""
    outside = () if trashed_at is None else (trashed_at.is_(None),)
    user = db.scalar(select(Experiment.name).where(uses, *outside).limit(1))
    if user is not None:
        raise Conflict(
            f"The experiment {user!r} uses this {what}. Delete the experiment first; nothing was "
            "deleted."
        )


_CHECKS: dict[str, Any] = {
    "experiment": _check_experiment,
    "tuned-model": _check_tuned_model,
    "dataset": _check_dataset,
    "base-model": _check_base_model,
}


def put_back(db: Session, kind: str, thing_id: str) -> None:
    """Out of the trash, with what it needs. Raises NotFound if it has gone for good."""
    thing = _locked(db, kind, thing_id)
    if kind == "tuned-model" and thing.experiment.trashed_at:
        put_back(db, "experiment", thing.experiment_id)
    if kind == "experiment":
        mine = update(Run).where(Run.experiment_id == thing.id, Run.trashed_at == thing.trashed_at)
        db.execute(mine.values(trashed_at=None))
        thing.dataset.trashed_at = thing.base_model.trashed_at = None
    thing.trashed_at = None
    db.commit()
    queue.ring("tuner")


def purge(db: Session, kind: str, thing_id: str) -> None:
    """Delete what is in the trash for good. Raises NotFound, or Conflict while it is needed.

    Rows first, files after: of a purge that breaks off only files are left, which nobody needs
    and `studio doctor` removes.
    """
    thing = _locked(db, kind, thing_id)
    paths = _files(kind, thing)
    try:
        if not thing.trashed_at:
            raise Conflict("It is not in the trash any more; nothing was deleted.")
        _PURGES[kind](db, thing)
    except StudioError:
        db.rollback()
        raise
    db.commit()
    for path in paths:
        files.remove(path)


def _purge_experiment(db: Session, experiment: Experiment) -> None:
    ids = list(db.scalars(select(Run.id).where(Run.experiment_id == experiment.id)))
    db.execute(delete(Answer).where(Answer.owner.in_(ids)))
    for table in (Point, Sample, Event, Completion, Checkpoint, Notice):
        db.execute(delete(table).where(table.run_id.in_(ids)))
    db.execute(delete(Vote).where(Vote.experiment_id == experiment.id))
    db.execute(delete(Run).where(Run.id.in_(ids)))
    db.execute(delete(Experiment).where(Experiment.id == experiment.id))


def _purge_tuned_model(db: Session, run: Run) -> None:
    """The run with its curve and its scores stays."""
    run.deleted_at, run.trashed_at, run.whole_state = time.time(), None, ""
    db.execute(delete(Checkpoint).where(Checkpoint.run_id == run.id))


def _purge_dataset(db: Session, dataset: Dataset) -> None:
    _check_unused(db, "dataset", Experiment.dataset_id == dataset.id)
    db.execute(delete(Dataset).where(Dataset.id == dataset.id))


def _purge_base_model(db: Session, model: BaseModel) -> None:
    _check_unused(db, "base model", Experiment.base_model_id == model.id)
    db.execute(delete(Completion).where(Completion.base_model_id == model.id))
    db.execute(delete(BaseModel).where(BaseModel.id == model.id))


_PURGES: dict[str, Any] = {
    "experiment": _purge_experiment,
    "tuned-model": _purge_tuned_model,
    "dataset": _purge_dataset,
    "base-model": _purge_base_model,
}


def sweep(db: Session) -> int:
    """Purge what has been in the trash long enough; how many things."""
    due = time.time() - settings.trash_hours * 3600
    gone = 0
    for kind in KINDS:
        for row in [row.id for row in _trashed(db, kind) if row.trashed_at <= due]:
            # Another worker was faster, or an experiment that went later still needs it.
            with contextlib.suppress(StudioError):
                purge(db, kind, row)
                gone += 1
    db.commit()
    return gone
