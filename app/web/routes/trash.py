"""The trash: what is in it, and the way back out."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from app import trash
from app.web import pages
from app.web.sessions import Reading, Writing

router = APIRouter(prefix="/trash")
PLACES = {
    "experiment": "/experiments/{}",
    "dataset": "/datasets/{}",
    "base-model": "/base-models#{}",
    "tuned-model": "/tuned-models/{}",
}


@router.get("")
def show(request: Request, db: Reading) -> Response:
    """What can be put back."""
    return pages.render(request, "trash.html", items=trash.all(db))


@router.post("/{kind}/{thing_id}/put-back")
def put_back(db: Writing, kind: str, thing_id: str) -> Response:
    """As if it had never been thrown away."""
    trash.put_back(db, kind, thing_id)
    return pages.redirect(PLACES[kind].format(thing_id), "It is back.")


@router.post("/{kind}/{thing_id}/delete")
def delete(db: Writing, kind: str, thing_id: str) -> Response:
    """For good, at once."""
    trash.purge(db, kind, thing_id)
    return pages.redirect("/trash", "It is deleted for good.")
