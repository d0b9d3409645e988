"""The queue's page: what runs and what waits, in order, and moving, holding and releasing it."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import Response
from sqlalchemy.orm import Session

from app import order, schedule
from app.web.pages import redirect, render
from app.web.sessions import Reading, Writing

router = APIRouter(prefix="/queue")
Page = Annotated[int, Query(ge=1, le=10_000)]
SentPage = Annotated[int, Form(ge=1, le=10_000)]


def _shown(db: Session, page: int, focus: str = "") -> dict[str, Any]:
    return {"queue": schedule.show(db, page), "focus": focus}


@router.get("")
def show(request: Request, db: Reading, page: Page = 1, focus: str = "") -> Response:
    """The page; `focus` is the button that was pressed, so that the keyboard stays there."""
    return render(request, "queue.html", **_shown(db, page, focus))


@router.get("/lines")
def lines(request: Request, db: Reading, page: Page = 1) -> Response:
    """The part of the page that looks again by itself."""
    return render(request, "_queue.html", **_shown(db, page))


@router.get("/held")
def held(request: Request, db: Reading) -> Response:
    """Whether the queue is held, for other pages."""
    return render(request, "_held.html", held_since=order.held_since(db))


@router.post("/{action}")
def set_held(db: Writing, action: Literal["hold", "release"]) -> Response:
    """Have nothing new begin, or let it."""
    {"hold": order.hold, "release": order.release}[action](db)
    return redirect("/queue?focus=held")


@router.post("/{run_id}/{where}")
def move(db: Writing, run_id: str, where: order.Move, page: SentPage = 1) -> Response:
    """Run next, or one place up or down; then back to where one was."""
    order.move(db, run_id, where)
    return redirect(f"/queue?page={page}&focus={where}-{run_id}")
