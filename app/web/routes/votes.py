"""The blind vote: one ballot after the other, and the result."""

from typing import Annotated

from fastapi import APIRouter, Form, Request
from fastapi.responses import Response

from app import experiments
from app.comparison import votes
from app.web import voting
from app.web.pages import redirect, render
from app.web.sessions import Known, Reading, Writing

router = APIRouter(prefix="/experiments/{experiment_id}/vote")
Voter = Annotated[str, Form()]  # as the page was shown to: another tab may have changed it


@router.get("")
def ballot(request: Request, db: Reading, experiment_id: str) -> Response:
    """The next example with its answers, or the result once all have been voted on."""
    found = experiments.get(db, experiment_id)
    return render(request, "vote.html", **voting.page(db, found, voting.voter(request)))


@router.get("/result")
def result(request: Request, db: Reading, experiment_id: str) -> Response:
    """What the votes add up to so far."""
    found = experiments.get(db, experiment_id)
    return render(
        request, "vote.html", **voting.page(db, found, voting.voter(request), result=True)
    )


@router.post("")
def cast(
    db: Writing,
    experiment_id: str,
    row: Annotated[int, Form()],
    choice: Annotated[int, Form()],
    mark: Annotated[str, Form()],
    voter: Voter = "",
) -> Response:
    """Keep the vote, and go on to the next example."""
    votes.cast(db, experiments.get(db, experiment_id), row, choice, mark, votes.voter(voter))
    return redirect(f"/experiments/{experiment_id}/vote")


@router.post("/name")
def name(experiment_id: Known, voter: Voter = "") -> Response:
    """Vote under this name from now on; without one, together with all who gave none."""
    return voting.remember(f"/experiments/{experiment_id}/vote", voter)


@router.post("/undo")
def undo(db: Writing, experiment_id: str, voter: Voter = "") -> Response:
    """Take back the voter's own last vote; its example is asked again."""
    votes.undo(db, experiments.get(db, experiment_id), votes.voter(voter))
    return redirect(f"/experiments/{experiment_id}/vote")
