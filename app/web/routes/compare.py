"""The page that sets runs of different experiments side by side."""

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from app import experiments
from app.comparison import across
from app.web.pages import render
from app.web.sessions import Reading

router = APIRouter(prefix="/compare")
Ids = Annotated[tuple[str, ...], Query()]


@router.get("")
def compare(
    request: Request,
    db: Reading,
    runs: Ids = (),
    experiment: Ids = (),
) -> Response:
    """The runs named (with commas, or one by one) and all scored runs of the experiments named."""
    ids = [key for one in runs for key in one.split(",") if key]
    found = across.chosen(db, ids, [experiments.get(db, key) for key in experiment])
    shown = across.compare(db, found)
    return render(request, "compare.html", runs=found, shown=shown)
