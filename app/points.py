"""What was measured of a run at each step: record it, and read it from any number on."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sqlalchemy import delete, insert, or_, select
from sqlalchemy.orm import Session

from app import queue, runs
from app.tables import Point, Run


class Measured(NamedTuple):
    """One measurement: kind is train or validation. Loss: nats per target token."""

    kind: str
    step: int
    epoch: float
    loss: float | None
    learning_rate: float | None
    grad_norm: float | None
    tokens_per_second: float | None
    memory_mb: float | None
    seconds: float
    tokens: int


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def record(db: Session, run_id: str, attempt: int, measured: Sequence[Measured]) -> None:
    """Store points under the run's own numbers and move its progress with them.

    Raises LostClaim, and stores nothing, once another attempt has begun.
    """
    # This first: it locks the run's row, so that what is read of it below stays true.
    last = measured[-1]
    runs.update_held(
        db,
        run_id,
        attempt,
        step=last.step,
        train_seconds=last.seconds,
        last_number=Run.last_number + len(measured),
    )
    row = db.execute(
        select(Run.last_number, Run.best_loss, Run.experiment_id).where(Run.id == run_id)
    ).one()
    first = row.last_number - len(measured) + 1
    db.execute(
        insert(Point),
        [
            {
                **{
                    name: _finite(value) if isinstance(value, float) else value
                    for name, value in point._asdict().items()
                },
                "run_id": run_id,
                "attempt": attempt,
                "number": first + place,
            }
            for place, point in enumerate(measured)
        ],
    )
    db.commit()
    queue.announce(row.experiment_id)


def rewind(db: Session, run_id: str, attempt: int, step: int) -> None:
    """Take back the points after `step`, which a resumed attempt will measure again."""
    runs.update_held(db, run_id, attempt, step=step)
    run = db.execute(
        select(Run.last_number, Run.rewinds, Run.experiment_id).where(Run.id == run_id)
    ).one()
    gone = db.execute(delete(Point).where(Point.run_id == run_id, Point.step > step))
    if gone.rowcount:  # type: ignore[attr-defined]
        runs.update_held(db, run_id, attempt, rewinds=[*run.rewinds, [run.last_number, step]])
    db.commit()
    queue.announce(run.experiment_id)


def rewound_to(run: Run, number: int) -> int | None:
    """The step that a reader who has seen points up to `number` must go back to, if any."""
    steps = [step for last, step in run.rewinds if 0 < number <= last]
    return min(steps, default=None)


def since(db: Session, seen: Mapping[str, int], limit: int = 5000) -> list[Point]:
    """Points of these runs with numbers above those seen, each run's in order."""
    if not seen:
        return []
    newer = or_(*[(Point.run_id == run) & (Point.number > number) for run, number in seen.items()])
    query = select(Point).where(newer).order_by(Point.run_id, Point.number).limit(limit)
    return list(db.scalars(query))


def curve(db: Session, run_id: str) -> list[Point]:
    """All points of a run in the order of their steps."""
    query = select(Point).where(Point.run_id == run_id).order_by(Point.step, Point.kind)
    return list(db.scalars(query))
