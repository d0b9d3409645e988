"""What takes up room on the disk, and the way to make some."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from app import disk
from app.web import formats, pages
from app.web.sessions import Reading, Writing

router = APIRouter(prefix="/disk")


@router.get("")
def show(request: Request, db: Reading) -> Response:
    """All of it, the largest first."""
    return pages.render(request, "disk.html", usage=disk.usage(db))


@router.post("/drop-finished")
def drop_finished(db: Writing) -> Response:
    """Delete what finished runs no longer need."""
    freed = disk.drop_finished(db)
    return pages.redirect("/disk", f"{formats.size(freed)} were freed.")
