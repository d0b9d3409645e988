"""The trash as JSON."""

from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from app import trash
from app.web.sessions import Reading, Writing

router = APIRouter(prefix="/trash", tags=["trash"])


@router.get("")
def list_all(db: Reading) -> list[dict[str, Any]]:
    """What can be put back; `until` says how long."""
    return [item._asdict() for item in trash.all(db)]


@router.post("/{kind}/{thing_id}/put-back", status_code=204)
def put_back(db: Writing, kind: str, thing_id: str) -> Response:
    """Out of the trash, with what it needs. Kinds: experiment, dataset, base-model, tuned-model."""
    trash.put_back(db, kind, thing_id)
    return Response(status_code=204)


@router.delete("/{kind}/{thing_id}", status_code=204)
def delete(db: Writing, kind: str, thing_id: str) -> Response:
    """Delete for good what is in the trash."""
    trash.purge(db, kind, thing_id)
    return Response(status_code=204)
