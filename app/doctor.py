"""`studio doctor`: every invariant, checked and mended while the studio runs."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from sqlalchemy import delete, or_, select, text, update
from sqlalchemy.orm import Session

from app import (
    base_models,
    claims,
    completions,
    files,
    invariants,
    leftovers,
    queue,
    registry,
    runs,
    storage,
    supervisor,
    tuned_models,
    workers,
)
from app.errors import InTrash, LostClaim
from app.settings import settings
from app.storage import Path
from app.tables import BaseModel, Checkpoint, Completion, Experiment, Point, Run

LATER = 1.0  # seconds until a second look: what is wrong in both is wrong

Mend = Callable[[Session], None]


class Finding(NamedTuple):
    """Something that must not be. `advice`: what mending does or, without `mend`, what to do."""

    sentence: str
    advice: str
    mend: Mend | None = None


def examine(db: Session) -> list[Finding]:
    """All that is wrong, each told in a sentence."""
    checks = (
        *(_database, _leases, _points, _left_open, _rules, _checkpoints),
        *(_base_models, _whole_models, _files, _surroundings),
    )
    return [finding for check in checks for finding in check(db)]


def _database(db: Session) -> Iterator[Finding]:
    if settings.database_url:
        return
    for row in db.execute(text("PRAGMA quick_check")):
        if row[0] != "ok":
            yield Finding(f"The database file is damaged: {row[0]}.", "Restore the last backup.")
    for row in db.execute(text("PRAGMA foreign_key_check")):
        yield Finding(f"A row of {row[0]} refers to nothing.", "Restore the last backup.")
    db.commit()


def _leases(db: Session) -> Iterator[Finding]:
    """Runs that are held in name alone; and leases that are left on runs that nobody holds."""
    moment, clock = claims.now(db)
    lost = or_(Run.lease_until.is_(None), Run.clock != clock, Run.lease_until < moment)
    for run in db.scalars(select(Run).where(Run.state.in_(runs.HELD), lost)).all():
        yield Finding(
            f"Run {run.id} is {run.state}, but no worker holds it.",
            "It goes back to where it can go on from, with what was saved.",
            _putting_back(run.id, run.attempt),
        )
    inside = (Run.state.in_(runs.HELD), Experiment.trashed_at.is_not(None))
    for run in db.scalars(select(Run).join(Experiment).where(*inside)).all():
        yield Finding(f"Run {run.id} is {run.state} in the trash.", "Put its experiment back.")
    left = or_(Run.worker.is_not(None), Run.lease_until.is_not(None), Run.clock.is_not(None))
    loose = (Run.state.not_in(runs.HELD), left)
    for run_id in db.scalars(select(Run.id).where(*loose)).all():
        none = {"worker": None, "lease_until": None, "clock": None}
        clear = update(Run).where(Run.id == run_id, *loose).values(**none)
        sentence = f"Run {run_id} is not worked on, but a lease on it is left."
        yield Finding(sentence, "The lease is taken off.", _executing(clear))
    db.commit()


def _putting_back(run_id: str, attempt: int) -> Mend:
    def mend(db: Session) -> None:
        reason = "Its worker was gone when the studio was examined."
        try:
            claims.put_back(db, run_id, attempt, reason)
        except InTrash:
            runs.settle(db, run_id, attempt, reason)
        except LostClaim:
            db.rollback()  # another worker swept it at the same moment

    return mend


def _executing(statement: Any) -> Mend:
    def mend(db: Session) -> None:
        db.execute(statement.execution_options(synchronize_session=False))
        db.commit()

    return mend


def _points(db: Session) -> Iterator[Finding]:
    beyond = select(Point.run_id, Run.last_number).join(Run, Run.id == Point.run_id)
    for run_id, last in db.execute(beyond.where(Point.number > Run.last_number).distinct()).all():
        gone = delete(Point).where(Point.run_id == run_id, Point.number > last)
        yield Finding(
            f"Run {run_id} has points beyond number {last}, its last.",
            "They are taken back; a run that goes on measures them again.",
            _executing(gone),
        )
    db.commit()


def _left_open(db: Session) -> Iterator[Finding]:
    """What generating workers began that are gone."""
    alive = [worker.id for worker in workers.alive(db)]
    making = select(Run.id).where(Run.whole_state == "making", Run.whole_worker.not_in(alive))
    for run_id in db.scalars(making).all():
        sentence = f"The whole model of run {run_id} is being made by a worker that is gone."
        mend = _freeing(tuned_models.free_orphans, alive)
        yield Finding(sentence, "The next worker makes it.", mend)
    asked = Completion.state.in_(("running", "stopping")) & Completion.worker.not_in(alive)
    if count := len(db.scalars(select(Completion.id).where(asked)).all()):
        sentence = f"{count} answer(s) are being written by a worker that is gone."
        mend = _freeing(completions.fail_orphans, alive)
        yield Finding(sentence, "They are said to have failed; ask again.", mend)
    preparing = (BaseModel.state == "preparing", BaseModel.worker.not_in([*alive, "set-up"]))
    for name in db.scalars(select(BaseModel.name).where(*preparing)).all():
        sentence = f"{name} is being prepared by a worker that is gone."
        mend = _freeing(base_models.free_orphans, [*alive, "set-up"])
        yield Finding(sentence, "The next worker prepares it.", mend)
    db.commit()


def _freeing(act: Callable[[Session, list[str]], None], alive: list[str]) -> Mend:
    return lambda db: act(db, alive)


_ADVICE = {
    "tuned_models_are_whole": "Restore it from a backup, or delete the tuned model and tune anew.",
    "datasets_have_files": "Restore it from a backup, or delete the dataset and upload it again.",
}
# Told of above, with what mends it.
_TOLD = {"held_runs_have_a_lease", "checkpoints_are_there"}


def _rules(db: Session) -> Iterator[Finding]:
    """What app/invariants.py says; workers at work change files between looks, so look twice."""
    first = _look(db)
    if first:
        time.sleep(LATER)
        for found in first & _look(db):
            advice = _ADVICE.get(found.rule, "This is a fault of the studio: please report it.")
            yield Finding(f"{found.row_id}: {found.sentence}", advice)


def _look(db: Session) -> set[invariants.Finding]:
    figures = {run.id: run.figures for run in db.execute(select(Run.id, Run.figures))}
    found = {one for one in invariants.check(db) if one.rule not in _TOLD}
    db.commit()
    return {
        one
        for one in found
        if "numbered above" not in one.sentence  # told of above
        if not ("'last'" in one.sentence and figures[one.row_id].get("last_dropped"))
    }


def _checkpoints(db: Session) -> Iterator[Finding]:
    for key in [_key(one) for one in db.scalars(select(Checkpoint)) if not _is_good(one)]:
        db.commit()
        one = db.get(Checkpoint, key, populate_existing=True)
        if one and not _is_good(one):  # and not just pruned
            gone = delete(Checkpoint).where(
                Checkpoint.run_id == key[0], Checkpoint.step == key[1], Checkpoint.attempt == key[2]
            )
            sentence = f"The checkpoint of step {one.step} of run {one.run_id} is not whole."
            advice = "It is forgotten; the run goes on from an older one."
            yield Finding(sentence, advice, _executing(gone))
    db.commit()


def _key(one: Checkpoint) -> tuple[str, int, int]:
    return one.run_id, one.step, one.attempt


def _is_good(one: Checkpoint) -> bool:
    folder = storage.checkpoint_folder(*_key(one))
    if not folder.exists() and files.is_published(folder):
        return True  # on another machine
    return registry.is_good(folder, one.digest)


def _base_models(db: Session) -> Iterator[Finding]:
    for model in db.scalars(select(BaseModel).where(BaseModel.state == "ready")):
        folder = storage.base_model_folder(model.id)
        if not storage.parts(folder) and not files.is_published(folder):
            sentence = f"The files of the base model {model.name} are missing."
            yield Finding(sentence, "Restore them from a backup; what was tuned on it needs them.")
    db.commit()


def _whole_models(db: Session) -> Iterator[Finding]:
    ready = (Run.whole_state == "ready", Run.deleted_at.is_(None))
    for run_id, attempt in db.execute(select(Run.id, Run.attempt).where(*ready)):
        folder = storage.files_of_run(run_id) / "whole"
        if not storage.parts(folder) and not files.is_published(folder, attempt):
            again = update(Run).where(Run.id == run_id, *ready).values(whole_state="")
            sentence = f"The whole model of run {run_id} is missing."
            yield Finding(sentence, "It can be asked for again.", _executing(again))
    db.commit()


def _files(db: Session) -> Iterator[Finding]:
    for path, why, _ in leftovers.find(db):
        size = f"{storage.size(path) / 1e6:,.1f} MB"
        sentence = f"{storage.home_name(path)} {why} ({size})."
        yield Finding(sentence, "It is removed.", _removing(path))


def _removing(path: Path) -> Mend:
    return lambda _db: storage.remove(path)


def _surroundings(_db: Session) -> Iterator[Finding]:
    if storage.home().stat().st_mode & 0o077:
        sentence = f"Others of this machine may look into {storage.home()}."
        yield Finding(sentence, "It is closed to them.", lambda _: storage.home().chmod(0o700))
    if (settings.redis_url or supervisor.is_running()) and not queue.is_up():
        yield Finding(
            "The broker does not answer. Nothing is lost: workers look by themselves.",
            "Start it again, or see to STUDIO_REDIS_URL.",
        )
