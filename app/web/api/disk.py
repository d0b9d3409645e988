"""The disk as JSON; sizes are bytes."""

from typing import Any

from fastapi import APIRouter

from app import disk
from app.web.sessions import Reading, Writing

router = APIRouter(prefix="/disk", tags=["disk"])


@router.get("")
def usage(db: Reading) -> dict[str, Any]:
    """What takes up room, the largest first; `frees` is what deleting it would free."""
    found = disk.usage(db)
    return found._asdict() | {"entries": [entry._asdict() for entry in found.entries]}


@router.post("/drop-finished")
def drop_finished(db: Writing) -> dict[str, int]:
    """Delete checkpoints and last states of runs that have ended."""
    return {"freed": disk.drop_finished(db)}
