"""Tuned models: what finished runs left, to look at, take away and delete."""

from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response

from app import naming, trash, tuned_models
from app.comparison import scores
from app.web import archives, pages, snippets
from app.web.sessions import Reading, Writing

router = APIRouter(prefix="/tuned-models")


@router.get("")
def list_all(request: Request, db: Reading) -> Response:
    """Every tuned model, newest first."""
    return pages.render(
        request, "tuned_models.html", tuned_models=tuned_models.all(db), metrics=scores.METRICS
    )


@router.get("/{run_id}")
def show(request: Request, db: Reading, run_id: str) -> Response:
    """One tuned model: figures, downloads, and how to load it elsewhere."""
    run = tuned_models.get(db, run_id)
    return pages.render(
        request,
        "tuned_model.html",
        run=run,
        settings=naming.settings(run),
        metrics=scores.METRICS[run.experiment.task],
        code=snippets.loading(run, "tuned"),
    )


@router.get("/{run_id}/files/{which}.zip")
def download(db: Reading, run_id: str, which: Literal["tuned", "last", "whole"]) -> Response:
    """What was tuned, its last state, or the whole model."""
    return archives.tuned_model(db, tuned_models.get(db, run_id), which)


@router.get("/{run_id}/whole")
def whole(request: Request, db: Reading, run_id: str) -> Response:
    """How far the whole model is: the part of the page that looks again by itself."""
    return pages.render(request, "_whole.html", run=tuned_models.get(db, run_id))


@router.post("/{run_id}/whole")
def ask_whole(db: Writing, run_id: str) -> Response:
    """Have the whole model put together by a worker."""
    tuned_models.ask_whole(db, run_id)
    return pages.redirect(f"/tuned-models/{run_id}#downloads")


@router.post("/{run_id}/delete")
def delete(db: Writing, run_id: str) -> Response:
    """Throw it away; for a day it can be put back."""
    trash.throw_away(db, "tuned-model", run_id)
    return pages.redirect(
        "/tuned-models", "The tuned model is in the trash.", undo=f"tuned-model/{run_id}"
    )
