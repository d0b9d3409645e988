"""Who works on which run: claims in the queue's order, leases, and putting back what was lost."""

import contextlib
import time

from sqlalchemy import func, or_, select, text, update
from sqlalchemy.orm import Session

from app import order, queue, runs, space
from app.capacity import Room, Taken, devices, fits, need, needs_gpu
from app.crashpoints import crashpoint
from app.errors import LostClaim
from app.settings import settings
from app.tables import Run

MOST_STUCK = 3  # attempts lost with nothing saved between them, after which a run fails


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def now(db: Session) -> tuple[float, str]:
    """Seconds on the clock that leases count by, and the clock's name.

    On PostgreSQL the server's. On one machine the monotonic clock, which stands still while a
    laptop sleeps and never jumps, with the id of the boot that it counts from.
    """
    if db.get_bind().dialect.name == "postgresql":
        moment = db.scalar(text("SELECT extract(epoch FROM clock_timestamp())"))
        return float(moment or 0), "server"
    return time.monotonic(), _boot_id()


def claim_next(db: Session, worker: str, place: Room | None = None) -> Run | None:
    """Take the first run of the queue that fits into the worker, or None. No place given: all fit.

    One conditional UPDATE: of two workers that want the same run exactly one gets it. Nothing is
    taken while the queue is held.
    """
    moment, clock = now(db)
    while (run_id := _first(db, place)) is not None:
        taken = runs.move(
            db,
            run_id,
            frozenset({"queued"}),
            "running",
            order.not_held(),
            Run.trashed_at.is_(None),
            worker=worker,
            attempt=Run.attempt + 1,
            lease_until=moment + settings.lease_seconds,
            clock=clock,
            phase="loading",
            started_at=func.coalesce(Run.started_at, time.time()),
        )
        if taken:
            run = runs.get(db, run_id)
            message = "Taken up." if run.attempt == 1 else f"Taken up again at step {run.step}."
            runs.note(db, run_id, run.attempt, message)
            crashpoint("claim.noted")
            db.commit()
            crashpoint("claim.committed")
            queue.announce(run.experiment_id)
            return run
    db.commit()
    return None


def _first(db: Session, place: Room | None) -> str | None:
    """The first queued run that may be taken, passing over those that others take just now.

    Small runs may overtake a large one, but not for ever. The first run that would fit into the
    empty worker is the next; while it does not fit beside what is at work there, only such runs
    go before it as will, by forecast, have ended by the time that it fits. Whatever is at work longer
    than forecast counts as ending now, so then nothing overtakes, and the worker runs itself empty.
    """
    queued = select(Run.id).where(*runs.waits_its_turn(), order.not_held())
    if place and place.taken:
        columns = select(Run.forecast, Run.params).where(
            *runs.waits_its_turn(), fits(place.emptied())
        )
        head = db.execute(columns.order_by(Run.position, Run.id).limit(1)).first()
        if head is None:
            return None
        wants = Taken(
            need(head.forecast, place.gpu), 0.0, devices(head.params), needs_gpu(head.params)
        )
        if not place.holds(wants):
            seconds = Run.forecast["seconds"].as_float()
            queued = queued.where(seconds <= place.wait(wants))
    if place:
        queued = queued.where(fits(place))
    queued = queued.order_by(Run.position, Run.id).limit(1)
    return db.scalar(queued.with_for_update(of=Run, skip_locked=True))


def beat(db: Session, run_id: str, attempt: int) -> None:
    """Renew the lease of a run that this attempt holds; of another's nothing changes."""
    moment, clock = now(db)
    db.execute(
        update(Run)
        .where(Run.id == run_id, *runs.held_by(attempt))
        .values(lease_until=moment + settings.lease_seconds, clock=clock)
        .execution_options(synchronize_session=False)
    )
    db.commit()


def put_back(db: Session, run_id: str, attempt: int, reason: str) -> None:
    """A worker lost this run without saving: back to the queue, or failed if it never gets on.

    Raises LostClaim if the run is not this attempt's any more.
    """
    run = runs.get(db, run_id)
    stuck = run.stuck + 1  # a checkpoint sets it to zero
    if run.state == "running" and stuck >= MOST_STUCK:
        runs.fail(
            db,
            run_id,
            attempt,
            f"{reason} It was lost {stuck} times with nothing saved in between, so it is not tried "
            "again. What it had saved is kept; see its history for the reasons.",
        )
        return
    runs.update_held(db, run_id, attempt, stuck=stuck)
    crashpoint("put_back.counted")
    runs.settle(db, run_id, attempt, f"{reason} Back in the queue; it goes on from what was saved.")
    queue.ring("tuner")


def sweep(db: Session) -> int:
    """Put back the runs whose lease has ended; how many. And those that there is room for again."""
    space.wake(db)
    moment, clock = now(db)
    expired = db.execute(
        select(Run.id, Run.attempt, Run.worker).where(
            Run.state.in_(runs.HELD), or_(Run.clock != clock, Run.lease_until < moment)
        )
    ).all()
    db.commit()
    for run_id, attempt, worker in expired:
        with contextlib.suppress(LostClaim):  # another worker swept it at the same moment
            put_back(db, run_id, attempt, f"Its worker {worker} stopped answering.")
    return len(expired)
