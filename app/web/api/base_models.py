"""Base models as JSON."""

from typing import Any, Literal

import pydantic
from fastapi import APIRouter
from fastapi.responses import Response

from app import base_models, trash
from app.tables import BaseModel
from app.web.sessions import Reading, Writing

router = APIRouter(prefix="/base-models", tags=["base models"])
COLUMNS = (
    *("id", "name", "source", "address", "state", "progress", "error", "licence", "note"),
    *("architecture", "quantization", "shapes", "has_chat", "created_at"),
)


class NewBaseModel(pydantic.BaseModel):
    """Where a base model comes from: an id of the model hub, or a folder's name in `models`."""

    source: Literal["hub", "folder"] = "hub"
    address: str


def _plain(base_model: BaseModel) -> dict[str, Any]:
    plain = {name: getattr(base_model, name) for name in COLUMNS}
    return plain | {"methods": base_models.methods_for(base_model)}


@router.get("")
def list_all(db: Reading) -> list[dict[str, Any]]:
    """Every base model."""
    return [_plain(base_model) for base_model in base_models.all(db)]


@router.post("", status_code=202)
def add(db: Writing, wanted: NewBaseModel) -> dict[str, Any]:
    """Add one; `state` says when it is ready."""
    return _plain(base_models.add(db, wanted.source, wanted.address))


@router.get("/{base_model_id}")
def show(db: Reading, base_model_id: str) -> dict[str, Any]:
    """One base model."""
    return _plain(base_models.get(db, base_model_id))


@router.post("/{base_model_id}/retry", status_code=202)
def retry(db: Writing, base_model_id: str) -> dict[str, Any]:
    """Prepare a failed one again."""
    base_models.retry(db, base_model_id)
    return _plain(base_models.get(db, base_model_id))


@router.delete("/{base_model_id}", status_code=204)
def delete(db: Writing, base_model_id: str) -> Response:
    """Throw it away; `/api/trash` gives it back for a day. Refused while it is needed."""
    trash.throw_away(db, "base-model", base_model_id)
    return Response(status_code=204)
