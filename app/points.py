"""What was measured of a run at each step: record it, and read it from any number on."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Row, delete, func, insert, or_, select
from sqlalchemy.orm import Session

from app import queue, runs
from app.crashpoints import crashpoint
from app.tables import Point, Run, Sample

Stored = Row[Any]  # a point's columns


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


def record(
    db: Session, run_id: str, attempt: int, measured: Sequence[Measured], **values: Any
) -> None:
    """Store points under the run's own numbers and move its progress, and `values`, with them.

    Points that are stored already are left out: a try may have been heard, and its answer lost.
    Raises LostClaim, and stores nothing, once another attempt has begun.
    """
    # This first: it locks the run's row, so that what is read of it below stays true.
    last = measured[-1]
    runs.update_held(db, run_id, attempt, step=last.step, train_seconds=last.seconds, **values)
    row = db.execute(select(Run.last_number, Run.experiment_id).where(Run.id == run_id)).one()
    measured = _new(db, run_id, measured)
    runs.update_held(db, run_id, attempt, last_number=Run.last_number + len(measured))
    if not measured:
        db.commit()
        return
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
                "number": row.last_number + place,
            }
            for place, point in enumerate(measured, 1)
        ],
    )
    crashpoint("points.stored")
    db.commit()
    crashpoint("points.committed")
    queue.announce(row.experiment_id)


def _new(db: Session, run_id: str, measured: Sequence[Measured]) -> list[Measured]:
    query = select(Point.kind, Point.step).where(
        Point.run_id == run_id, Point.step >= measured[0].step
    )
    stored = {(kind, step) for kind, step in db.execute(query)}
    return [point for point in measured if (point.kind, point.step) not in stored]


def rewind(db: Session, run_id: str, attempt: int, step: int, *, looked: int | None = None) -> None:
    """Take back the points after `step`, and the validation points after the step `looked`, which
    a resumed attempt will measure again; with them what was answered there.
    """
    runs.update_held(db, run_id, attempt, step=step)
    run = db.execute(
        select(Run.last_number, Run.rewinds, Run.experiment_id).where(Run.id == run_id)
    ).one()
    again = Point.step > step
    if looked is not None:
        again |= (Point.kind == "validation") & (Point.step > looked)
    answered = max(0, step if looked is None else looked)
    db.execute(delete(Sample).where(Sample.run_id == run_id, Sample.step > answered))
    gone = db.execute(delete(Point).where(Point.run_id == run_id, again))
    if gone.rowcount:  # type: ignore[attr-defined]
        runs.update_held(db, run_id, attempt, rewinds=[*run.rewinds, [run.last_number, step]])
    crashpoint("points.rewound")
    db.commit()
    queue.announce(run.experiment_id)


def rewound_to(run: Run, number: int) -> int | None:
    """The step that a reader who has seen points up to `number` must go back to, if any."""
    steps = [step for last, step in run.rewinds if 0 < number <= last]
    return min(steps, default=None)


def since(db: Session, seen: Mapping[str, int], limit: int = 5000) -> list[Stored]:
    """Points of these runs with numbers above those seen, each run's in order.

    Without objects of their own: many who follow a run ask for many of them.
    """
    if not seen:
        return []
    newer = or_(*[(Point.run_id == run) & (Point.number > number) for run, number in seen.items()])
    query = select(*Point.__table__.columns).where(newer)
    return list(db.execute(query.order_by(Point.run_id, Point.number).limit(limit)))


def curve(db: Session, run_id: str) -> list[Point]:
    """All points of a run in the order of their steps."""
    query = select(Point).where(Point.run_id == run_id).order_by(Point.step, Point.kind)
    return list(db.scalars(query))


def sampled(db: Session, run_id: str, most: int) -> list[Row[Any]]:
    """Kind, step and loss of every validation, and of about `most` steps evenly spread."""
    last = db.scalar(select(func.max(Point.step)).where(Point.run_id == run_id)) or 0
    every = max(1, -(-last // most))
    wanted = or_(Point.kind != "train", Point.step % every == 0)
    query = select(Point.kind, Point.step, Point.loss).where(Point.run_id == run_id, wanted)
    return list(db.execute(query.order_by(Point.step)))
