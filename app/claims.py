"""Who works on which run: the order of the queue, claims, leases, and putting back what was lost."""

import contextlib
import time

from sqlalchemy import or_, select, text, update
from sqlalchemy.orm import Session

from app import queue, runs, space
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


def claim_next(db: Session, worker: str) -> Run | None:
    """Take the first run of the queue for this worker, or None.

    One conditional UPDATE: of two workers that want the same run exactly one gets it.
    """
    moment, clock = now(db)
    for run_id in db.scalars(
        select(Run.id).where(Run.state == "queued").order_by(Run.position, Run.id).limit(5)
    ).all():
        taken = runs.move(
            db,
            run_id,
            frozenset({"queued"}),
            "running",
            worker=worker,
            attempt=Run.attempt + 1,
            lease_until=moment + settings.lease_seconds,
            clock=clock,
            phase="loading",
        )
        if taken:
            run = runs.get(db, run_id)
            run.started_at = run.started_at or time.time()
            message = "Taken up." if run.attempt == 1 else f"Taken up again at step {run.step}."
            runs.note(db, run_id, run.attempt, message)
            crashpoint("claim.noted")
            db.commit()
            crashpoint("claim.committed")
            queue.announce(run.experiment_id)
            return run
    db.commit()
    return None


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
