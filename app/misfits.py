"""Queued runs that fit no worker that is alive: why, and that their history says so."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import not_, select
from sqlalchemy.orm import Session

from app import capacity, runs, workers
from app.capacity import Room
from app.tables import Event, Run

BEGINNING = "No tuning worker that is alive has room for it: "  # of what a history says
MOST = 100  # told of at a time


def why(forecast: dict[str, Any], params: dict[str, Any], rooms: Sequence[Room]) -> str:
    """Why a run of this forecast fits none of these, and what to do."""
    if capacity.needs_gpu(params) and not any(one.gpu for one in rooms):
        return "its optimizer needs a GPU with CUDA, and no worker has one. It waits for one."
    largest = max(rooms, key=lambda one: one.memory_mb)
    devices, most = capacity.devices(params), max(one.devices for one in rooms)
    if devices > most:
        return f"it wants {devices} devices, and the most that a worker has is {most}."
    need = capacity.need(forecast, largest.gpu) or 0.0
    return (
        f"it needs about {need / 1000:.1f} GB of memory, and the largest has "
        f"{largest.memory_mb / 1000:.1f} GB. It waits for a larger one. A shorter "
        "maximum length, activation checkpointing or QLoRA take less."
    )


def tell(db: Session, worker: str) -> None:
    """Say it once in the history of each queued run that fits no tuner alive.

    This looks through the whole queue, so of all tuners only the first does it.
    """
    alive = [one for one in workers.alive(db) if one.kind == "tuner"]
    rooms = list({place for one in alive if (place := workers.room(one))})
    if not rooms or alive[0].id != worker:
        db.rollback()
        return
    told = select(Event.id).where(
        Event.run_id == Run.id, Event.attempt == Run.attempt, Event.message.startswith(BEGINNING)
    )
    found = (
        select(Run.id, Run.attempt, Run.forecast, Run.params)
        .where(*runs.waits_its_turn(), *(not_(capacity.fits(one)) for one in rooms), ~told.exists())
        .order_by(Run.position, Run.id)
        .limit(MOST)
    )
    for row in db.execute(found).all():
        reason = why(row.forecast, row.params, rooms)
        runs.note(db, row.id, row.attempt, BEGINNING + reason, "warning")
    db.commit()
