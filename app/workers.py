"""Which workers are alive: each writes a row and renews it."""

import time

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from app import claims
from app.capacity import Room, is_gpu
from app.tables import Worker

ALIVE_SECONDS = 20.0  # a worker that has not beaten for so long is not counted
FORGET_SECONDS = 3600.0


def _now(db: Session) -> float:
    """Seconds since the epoch, by the server's clock where several machines share one."""
    moment, clock = claims.now(db)
    return moment if clock == "server" else time.time()


def beat(db: Session, worker: Worker) -> None:
    """Say that this worker is alive."""
    worker.beat_at = _now(db)
    mine = update(Worker).where(Worker.id == worker.id).values(beat_at=worker.beat_at)
    if not db.execute(mine).rowcount:  # type: ignore[attr-defined]
        db.merge(worker)
    db.execute(delete(Worker).where(Worker.beat_at < worker.beat_at - FORGET_SECONDS))
    db.commit()


def describe(
    db: Session, worker_id: str, device: str, memory_mb: float | None, num_devices: int = 1
) -> None:
    """Say what the worker has: a process of it that holds torch knows."""
    mine = update(Worker).where(Worker.id == worker_id)
    db.execute(mine.values(device=device, memory_mb=memory_mb, num_devices=num_devices))
    db.commit()


def recall(db: Session, worker: Worker) -> None:
    """Take over into `worker` what a process of it has said that it has."""
    found = db.execute(
        select(Worker.device, Worker.memory_mb, Worker.num_devices).where(Worker.id == worker.id)
    ).first()
    if found:
        worker.device, worker.memory_mb, worker.num_devices = found
    db.commit()


def room(worker: Worker) -> Room | None:
    """What the worker has, with nothing at work on it; None: it has not said so yet."""
    if worker.memory_mb is None:
        return None
    return Room(worker.memory_mb, is_gpu(worker.device), worker.num_devices or 1)


def leave(db: Session, worker_id: str) -> None:
    """The worker has ended of its own accord."""
    db.execute(delete(Worker).where(Worker.id == worker_id))
    db.commit()


def alive(db: Session) -> list[Worker]:
    """Workers heard of just now."""
    query = select(Worker).where(Worker.beat_at > _now(db) - ALIVE_SECONDS)
    return list(db.scalars(query.order_by(Worker.kind, Worker.id)))
