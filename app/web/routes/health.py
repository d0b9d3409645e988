"""For whoever watches over the studio, without a token: is it well, and who works?"""

from collections import Counter
from typing import Any

from fastapi import APIRouter
from sqlalchemy.exc import SQLAlchemyError

from app import database, queue, workers

router = APIRouter()


@router.get("/healthz")
def health() -> dict[str, Any]:
    """Database, broker, and how many workers of each kind were heard of just now."""
    kinds, broker = _kinds(), queue.is_up()
    return {
        "status": "ok" if broker and kinds is not None else "degraded",
        "database": "away" if kinds is None else "ok",
        "broker": "ok" if broker else "away",
        "workers": {kind: (kinds or {}).get(kind, 0) for kind in queue.TASKS},
    }


def _kinds() -> dict[str, int] | None:
    try:
        with database.reading() as db:
            return Counter(worker.kind for worker in workers.alive(db))
    except SQLAlchemyError:
        return None
