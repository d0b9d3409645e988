"""The order of the queue: run next, one place up or down, and holding the whole queue."""

import time
from typing import Any, Literal

from sqlalchemy import delete, func, select, tuple_, update
from sqlalchemy.orm import Session

from app import database, queue, runs
from app.errors import Conflict
from app.tables import Choice, Run

Move = Literal["next", "up", "down"]
_HELD = "queue held"  # the key of a choice that is there as long as the queue is held
_TURN = "order of the queue"


def not_held() -> Any:
    """The condition that the queue is not held, for the very statement that takes a run."""
    return ~select(Choice.key).where(Choice.key == _HELD).exists()


def held_since(db: Session) -> float | None:
    """When someone held the queue; None: it is not held."""
    found = db.scalar(select(Choice.value).where(Choice.key == _HELD))
    return found["since"] if found else None


def hold(db: Session) -> None:
    """Have nothing taken out of the queue until it is released; what runs goes on."""
    database.take_turns(db, _TURN)
    if held_since(db) is None:
        db.add(Choice(key=_HELD, value={"since": time.time()}))
    db.commit()


def release(db: Session) -> None:
    """Let the workers take from the queue again."""
    db.execute(delete(Choice).where(Choice.key == _HELD))
    db.commit()
    queue.ring("tuner")


def move(db: Session, run_id: str, where: Move) -> None:
    """Put a queued run first, or one place up or down; where there is no place it stays.

    Raises Conflict if it is not in the queue.
    """
    database.take_turns(db, _TURN)
    place = _place(db, run_id, where)
    if place is None:  # two at the same place, or no number left between them
        _number_anew(db)
        place = _place(db, run_id, where)
    db.execute(
        update(Run)
        .where(Run.id == run_id, Run.state == "queued")
        .values(position=place)
        .execution_options(synchronize_session=False)
    )
    db.commit()


def _place(db: Session, run_id: str, where: Move) -> float | None:
    """The position that the run shall have; None: there is no number left for it."""
    run = runs.get(db, run_id)
    if run.state != "queued":
        db.rollback()
        raise Conflict(
            f"This run is {run.state} and has no place in the queue now. Nothing was changed."
        )
    own = tuple_(Run.position, Run.id)
    others = select(Run.position).where(*runs.waits_its_turn())
    before = others.where(Run.position <= run.position, own < (run.position, run.id))
    after = others.where(Run.position >= run.position, own > (run.position, run.id))
    on, back = (Run.position, Run.id), (Run.position.desc(), Run.id.desc())
    if where == "next":
        passed = [*db.scalars(before.order_by(*on).limit(1))]
    elif where == "up":
        passed = [*db.scalars(before.order_by(*back).limit(2))]
    else:
        passed = [*db.scalars(after.order_by(*on).limit(2))]
    if not passed:
        return run.position
    return _beyond(passed, 1 if where == "down" else -1)


def _beyond(passed: list[float], direction: int) -> float | None:
    """Beyond the first of these, and before the second if there is one; None: no number is."""
    if len(passed) == 1:
        return passed[0] + direction
    low, high = sorted(passed)
    middle = (low + high) / 2
    return middle if low < middle < high else None


def _number_anew(db: Session) -> None:
    """Give all runs that have not ended positions one apart, in the order that they have.

    The last keeps its own, so that runs yet to come are still behind it.
    """
    open_runs = Run.state.not_in(runs.FINAL)
    count, top = db.execute(select(func.count(), func.max(Run.position)).where(open_runs)).one()
    place = func.row_number().over(order_by=(Run.position, Run.id))
    numbered = select(Run.id, (top - count + place).label("place")).where(open_runs).subquery()
    db.execute(
        update(Run)
        .where(Run.id == numbered.c.id)
        .values(position=numbered.c.place)
        .execution_options(synchronize_session=False)
    )


def at_work(db: Session) -> list[Run]:
    """Runs that a worker holds, in the order that they had in the queue."""
    held = select(Run).where(Run.state.in_(runs.HELD))
    return list(db.scalars(held.order_by(Run.position, Run.id)))


def count_waiting(db: Session) -> int:
    """How many runs have neither begun nor ended: queued, paused, or waiting for disk space."""
    waiting = select(func.count()).where(
        Run.state.not_in(runs.FINAL | runs.HELD), Run.trashed_at.is_(None)
    )
    return db.scalar(waiting) or 0
