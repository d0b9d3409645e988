"""Base models: those there are, how far they are, and the form that adds one."""

from typing import Annotated

from fastapi import APIRouter, Form, Request
from fastapi.responses import Response
from sqlalchemy.orm import Session

from app import base_models, storage, trash
from app.errors import StudioError
from app.web import pages, refusals
from app.web.sessions import Reading, Writing

router = APIRouter(prefix="/base-models")
Text = Annotated[str, Form()]


def _page(
    request: Request, db: Session, address: str = "", refused: StudioError | None = None
) -> Response:
    return pages.render(
        request,
        "base_models.html",
        status=refusals.status_of(refused) if refused else 200,
        base_models=base_models.all(db),
        folders=base_models.folders(),
        models_folder=storage.models_folder(),
        methods_for=base_models.methods_for,
        address=address,
        refused=refused,
    )


@router.get("")
def list_all(request: Request, db: Reading) -> Response:
    """Every base model, and the ways to add one."""
    return _page(request, db)


@router.post("")
def add(request: Request, db: Writing, source: Text = "hub", address: Text = "") -> Response:
    """Add one from the hub or the models folder, or say on the form why not."""
    try:
        added = base_models.add(db, source, address.strip())
    except StudioError as refused:
        return _page(request, db, address, refused)
    return pages.redirect(f"/base-models#{added.id}", f"{added.name} is being made ready.")


@router.get("/{base_model_id}/state")
def state(request: Request, db: Reading, base_model_id: str) -> Response:
    """One model's card, which looks again by itself while a worker prepares it."""
    base_model = base_models.get(db, base_model_id)
    return pages.render(
        request, "_base_model.html", base_model=base_model, methods_for=base_models.methods_for
    )


@router.post("/{base_model_id}/retry")
def retry(db: Writing, base_model_id: str) -> Response:
    """Prepare a failed one again."""
    base_models.retry(db, base_model_id)
    return pages.redirect(f"/base-models#{base_model_id}")


@router.post("/{base_model_id}/delete")
def delete(db: Writing, base_model_id: str) -> Response:
    """Throw it away; for a day it can be put back."""
    trash.throw_away(db, "base-model", base_model_id)
    return pages.redirect(
        "/base-models", "The base model is in the trash.", undo=f"base-model/{base_model_id}"
    )
