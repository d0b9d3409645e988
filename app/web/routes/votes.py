"""The blind vote: one ballot after the other, and the result."""

from typing import Annotated

from fastapi import APIRouter, Form, Request
from fastapi.responses import Response

from app import experiments
from app.comparison import votes
from app.web import voting
from app.web.pages import redirect, render
from app.web.sessions import Reading, Writing

router = APIRouter(prefix="/experiments/{experiment_id}/vote")


@router.get("")
def ballot(request: Request, db: Reading, experiment_id: str) -> Response:
    """The next example with its answers, or the result once all have been voted on."""
    found = experiments.get(db, experiment_id)
    return render(request, "vote.html", **voting.page(db, found))


@router.get("/result")
def result(request: Request, db: Reading, experiment_id: str) -> Response:
    """What the votes add up to so far."""
    found = experiments.get(db, experiment_id)
    return render(request, "vote.html", **voting.page(db, found, result=True))


@router.post("")
def cast(
    db: Writing,
    experiment_id: str,
    row: Annotated[int, Form()],
    choice: Annotated[int, Form()],
    mark: Annotated[str, Form()],
) -> Response:
    """Keep the vote, and go on to the next example."""
    votes.cast(db, experiments.get(db, experiment_id), row, choice, mark)
    return redirect(f"/experiments/{experiment_id}/vote")


@router.post("/undo")
def undo(db: Writing, experiment_id: str) -> Response:
    """Take back the last vote; its example is asked again."""
    votes.undo(db, experiments.get(db, experiment_id))
    return redirect(f"/experiments/{experiment_id}/vote")
