"""The playground: one prompt, put to several models at once, answered side by side."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response, StreamingResponse

from app import completions, database
from app.web import asks, streams
from app.web.pages import redirect, render
from app.web.sessions import Reading, Sent, Writing

router = APIRouter()


def _exists(ask_id: str) -> str:
    # A session of its own, closed before the stream begins.
    with database.reading() as db:
        return completions.of(db, ask_id)[0].ask


@router.get("/playground")
def playground(
    request: Request, db: Reading, ask: str = "", base: str = "", experiment: str = ""
) -> Response:
    """The form, and the answers of an ask."""
    asked = completions.of(db, ask) if ask else []
    form = asks.again(asked) if asked else asks.begin(db, base, experiment)
    return render(request, "playground.html", **asks.page(db, form, asked))


@router.post("/playground")
def put(request: Request, db: Writing, form: Sent) -> Response:
    """Ask, or show the form again with what is wrong."""
    ask = asks.read(form)
    made = asks.submit(db, ask)
    if made is None:
        return render(request, "playground.html", status=422, **asks.page(db, ask))
    return redirect(f"/playground?ask={made}")


@router.post("/playground/{ask_id}/stop")
def stop(db: Writing, ask_id: str) -> Response:
    """Stop all answers; what is written stays."""
    completions.stop(db, ask_id)
    return redirect(f"/playground?ask={ask_id}")


@router.get("/completions/{ask_id}/stream")
async def stream(request: Request, ask_id: Annotated[str, Depends(_exists)]) -> Response:
    """The answers as they are written: a JSON object a line."""
    lines = streams.follow_ask(request.app, ask_id)
    headers = {"X-Accel-Buffering": "no"}
    return StreamingResponse(lines, media_type="application/x-ndjson", headers=headers)
