"""The queue as JSON."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query

from app import order, schedule
from app.web.sessions import Reading, Writing

router = APIRouter(prefix="/queue", tags=["queue"])


@router.get("")
def show(db: Reading, page: Annotated[int, Query(ge=1, le=10_000)] = 1) -> dict[str, Any]:
    """What runs, and a page of what waits, in order, with the start and end that are forecast."""
    found = schedule.show(db, page)
    tuners = [
        {"id": one.id, "device": one.device, "memory_mb": one.memory_mb} for one in found.tuners
    ]
    running, queued = ([line._asdict() for line in part] for part in (found.running, found.queued))
    return found._asdict() | {"running": running, "queued": queued, "tuners": tuners}


@router.post("/{action}")
def set_held(db: Writing, action: Literal["hold", "release"]) -> dict[str, Any]:
    """Have nothing new begin, or let it."""
    {"hold": order.hold, "release": order.release}[action](db)
    return {"held_since": order.held_since(db)}


@router.post("/{run_id}/{where}")
def move(db: Writing, run_id: str, where: order.Move) -> dict[str, Any]:
    """Run next, or one place up or down; the first page of the queue afterwards."""
    order.move(db, run_id, where)
    return show(db)
