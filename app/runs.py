"""The life of a run: the table of states, and who may move a run from one to another."""

import time
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from app import database, forecast, queue
from app.crashpoints import crashpoint
from app.errors import Conflict, InTrash, LostClaim, NotFound
from app.settings import settings
from app.tables import Event, Experiment, Notice, Run, new_id

# From each state, where a run may go. Final states lead nowhere.
MOVES: dict[str, frozenset[str]] = {
    "queued": frozenset({"running", "cancelled", "paused"}),
    "running": frozenset({"succeeded", "failed", "cancelling", "pausing", "queued", "waiting"}),
    "cancelling": frozenset({"cancelled"}),
    "pausing": frozenset({"paused", "cancelling"}),
    "paused": frozenset({"queued", "cancelled"}),
    "waiting": frozenset({"queued", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
STATES = tuple(MOVES)
FINAL = frozenset(state for state, later in MOVES.items() if not later)
HELD = frozenset({"running", "pausing", "cancelling"})  # a worker holds a lease on it


def get(db: Session, run_id: str) -> Run:
    """The run, read afresh. Raises NotFound."""
    run = db.scalar(select(Run).where(Run.id == run_id).execution_options(populate_existing=True))
    if run is None:
        raise NotFound("There is no such run. It may have been deleted with its experiment.")
    of = run.experiment
    if of.trashed_at:  # never of a run that is held: its experiment cannot be thrown away
        raise InTrash("experiment", of.id, of.name, of.trashed_at)
    return run


def move(
    db: Session, run_id: str, sources: frozenset[str], target: str, *conditions: Any, **values: Any
) -> bool:
    """Move the run if it is in one of the sources (and meets the conditions); whether it did.

    The one place where a state changes: one conditional UPDATE, not committed here.
    """
    for source in sources:
        assert target in MOVES[source], f"{source} -> {target} is no move"
    if target in FINAL:
        values.setdefault("finished_at", time.time())
    if target not in HELD:
        values |= {"worker": None, "lease_until": None, "clock": None, "phase": ""}
    result = db.execute(
        update(Run)
        .where(Run.id == run_id, Run.state.in_(sources), *conditions)
        .values(state=target, **values)
        .execution_options(synchronize_session=False)
    )
    return bool(result.rowcount)  # type: ignore[attr-defined]


def held_by(attempt: int) -> tuple[Any, ...]:
    """The condition that fences a worker's write: its attempt is still the run's."""
    return (Run.attempt == attempt, Run.state.in_(HELD))


def update_held(db: Session, run_id: str, attempt: int, **values: Any) -> None:
    """Change columns of a run that this attempt still holds; not committed here.

    Raises LostClaim once another attempt has begun or the run has ended.
    """
    database.wake_or_lose(db, settings.lease_seconds / 3)
    result = db.execute(
        update(Run)
        .where(Run.id == run_id, *held_by(attempt))
        .values(**values)
        .execution_options(synchronize_session=False)
    )
    if not result.rowcount:  # type: ignore[attr-defined]
        db.rollback()
        raise LostClaim(f"Attempt {attempt} no longer holds run {run_id}.")


def lock(db: Session, run_id: str, attempt: int) -> None:
    """Keep everyone else from moving the run until the transaction ends. Raises LostClaim."""
    update_held(db, run_id, attempt, step=Run.step)


def note(db: Session, run_id: str, attempt: int, message: str, level: str = "info") -> None:
    """Add a line to the run's history; not committed here."""
    db.add(Event(run_id=run_id, attempt=attempt, level=level, message=message))


def tell(db: Session, run_id: str, attempt: int, message: str, level: str = "info") -> None:
    """Add a line to the history of a run that this attempt holds."""
    lock(db, run_id, attempt)
    note(db, run_id, attempt, message, level)
    db.commit()


def history(db: Session, run_id: str) -> list[Event]:
    """What happened to the run, oldest first."""
    return list(db.scalars(select(Event).where(Event.run_id == run_id).order_by(Event.id)))


def state(db: Session, run_id: str, attempt: int) -> str:
    """The state that others have put a held run into. Raises LostClaim."""
    found = db.scalar(select(Run.state).where(Run.id == run_id, *held_by(attempt)))
    if found is None:
        raise LostClaim(f"Attempt {attempt} no longer holds run {run_id}.")
    return found


def progress(db: Session, run_id: str, attempt: int, **values: Any) -> None:
    """Store what a worker knows of its run, such as phase or figures, and wake the watchers."""
    update_held(db, run_id, attempt, **values)
    db.commit()
    announce(db, run_id)


def announce(db: Session, run_id: str) -> None:
    """Wake the streams that follow the run's experiment."""
    experiment = db.scalar(select(Run.experiment_id).where(Run.id == run_id))
    db.commit()
    if experiment:
        queue.announce(experiment)


def _told(db: Session, run_id: str, message: str, level: str = "info") -> None:
    run = db.execute(select(Run.attempt, Run.state).where(Run.id == run_id)).one()
    note(db, run_id, run.attempt, message, level)
    if run.state in FINAL and settings.webhook_url:
        db.add(Notice(run_id=run_id))
    crashpoint("run.moved")
    db.commit()
    announce(db, run_id)


def finish(db: Session, run_id: str, attempt: int, **values: Any) -> None:
    """The run has succeeded; unless someone cancels it at this moment. Raises LostClaim."""
    if not move(
        db,
        run_id,
        frozenset({"running"}),
        "succeeded",
        Run.attempt == attempt,
        error=None,
        **values,
    ):
        db.rollback()
        raise LostClaim("The run was cancelled or taken over before it could end.")
    crashpoint("run.finishing")
    _told(db, run_id, "Finished.")
    crashpoint("run.finished")


def fail(db: Session, run_id: str, attempt: int, message: str) -> None:
    """The run has failed, with the reason in words. A run being cancelled ends cancelled."""
    fenced = Run.attempt == attempt
    if move(db, run_id, frozenset({"running"}), "failed", fenced, error=message):
        _told(db, run_id, message, "error")
    else:
        db.rollback()
        settle(db, run_id, attempt, message)


def settle(db: Session, run_id: str, attempt: int, reason: str) -> None:
    """A worker lets go of its run: it ends cancelled or paused if asked to, else goes back."""
    fenced = Run.attempt == attempt
    if move(db, run_id, frozenset({"cancelling"}), "cancelled", fenced):
        _told(db, run_id, "Cancelled.")
    elif move(db, run_id, frozenset({"pausing"}), "paused", fenced):
        _told(db, run_id, "Paused; what was trained is kept.")
    elif move(db, run_id, frozenset({"running"}), "queued", fenced):
        _told(db, run_id, reason)
    else:
        db.rollback()
        raise LostClaim("The run is not this attempt's any more.")


def cancel(db: Session, run_id: str) -> None:
    """Stop the run for good: at once if it waits, within one micro-batch if it runs."""
    get(db, run_id)
    idle = frozenset({"queued", "paused", "waiting"})
    if move(db, run_id, idle, "cancelled"):
        _told(db, run_id, "Cancelled.")
    elif move(db, run_id, frozenset({"running", "pausing"}), "cancelling"):
        _told(db, run_id, "Cancelling.")
    else:
        _refuse(db, run_id, "be cancelled")


def pause(db: Session, run_id: str) -> None:
    """Keep what was trained and give the place back; a queued run is just held."""
    get(db, run_id)
    if move(db, run_id, frozenset({"queued"}), "paused"):
        _told(db, run_id, "Paused before it was taken up.")
    elif move(db, run_id, frozenset({"running"}), "pausing"):
        _told(db, run_id, "Pausing.")
    else:
        _refuse(db, run_id, "be paused")


def resume(db: Session, run_id: str) -> None:
    """Put a paused or waiting run back into the queue."""
    get(db, run_id)
    if not move(db, run_id, frozenset({"paused", "waiting"}), "queued", stuck=0, error=None):
        _refuse(db, run_id, "go on")
    _told(db, run_id, "Back in the queue.")
    queue.ring("tuner")


def _refuse(db: Session, run_id: str, what: str) -> None:
    db.rollback()
    raise Conflict(
        f"This run is {get(db, run_id).state} and cannot {what} now. Nothing was changed."
    )


def retry(db: Session, run_id: str) -> Run:
    """A new run with the parameters of one that failed or was cancelled, at the queue's end."""
    # Locked, so that nobody throws the experiment away before the new run is part of it.
    mine = select(Run.experiment_id).where(Run.id == run_id).scalar_subquery()
    db.execute(select(Experiment.id).where(Experiment.id == mine).with_for_update(read=True))
    old = get(db, run_id)
    if old.state not in {"failed", "cancelled"}:
        _refuse(db, run_id, "be tried again")
    new = Run(id=new_id(), experiment_id=old.experiment_id, method=old.method, params=old.params)
    kept = {name: old.forecast[name] for name in ("override",) if name in old.forecast}
    new.forecast = forecast.make(db, old.experiment, old.method, old.params) | kept
    new.position = behind(db)
    db.add(new)
    db.commit()
    queue.ring("tuner")
    queue.announce(old.experiment_id)
    return new


def waits_its_turn() -> tuple[Any, ...]:
    """The condition that a run has a place in the queue: it waits, and not in the trash."""
    return (Run.state == "queued", Run.trashed_at.is_(None))


def behind(db: Session) -> float:
    """A position behind all that are queued, even if the clock has been put back since."""
    last = db.scalar(select(func.max(Run.position)).where(Run.state == "queued"))
    return max(time.time(), (last or 0.0) + 0.001)
