"""Every answer that says no, in the shape its asker understands: page, fragment or JSON."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException

from app import errors, space, trash
from app.web import pages

log = logging.getLogger("studio.web")

STATUS: dict[type[errors.StudioError], int] = {
    errors.NotFound: 404,
    errors.Invalid: 422,
    errors.TooLarge: 413,
    errors.Conflict: 409,
    errors.Unavailable: 503,
}
TITLES = {
    400: "This request cannot be read",
    401: "Please open the studio with its link",
    403: "Refused",
    404: "Not found",
    405: "Not possible here",
    409: "Not possible at present",
    413: "Too large",
    421: "Not this studio's address",
    422: "Please check what you entered",
    503: "Not available at present",
}
_SENTENCES = {
    404: "There is nothing at this address. It may have been deleted.",
    405: "This address does not take that kind of request.",
    413: "More was sent than this form takes. Send less.",
}


def refuse(
    request: Request, status: int, message: str, field: str | None = None, **more: Any
) -> Response:
    """The refusal, with a title by its status; `more` is for programs."""
    path = request.scope["path"]
    if path.startswith(("/api/", "/v1/")):
        body = {"error": {"message": message, "field": field, **more}}
        return JSONResponse(body, status_code=status)
    title = TITLES.get(status, "Something went wrong in the studio")
    if request.headers.get("HX-Request") == "true":
        fragment = pages.render(
            request, "_refusal.html", status=status, title=title, message=message
        )
        # Whatever the form was to replace stays; the sentence goes where all notices appear.
        fragment.headers["HX-Retarget"] = "#status"
        fragment.headers["HX-Reswap"] = "innerHTML"
        return fragment
    return pages.render(request, "error.html", status=status, title=title, message=message)


def stranger(request: Request) -> Response:
    """Ask who has not shown the token for it."""
    message = "The studio wants its access token with each request, as `Authorization: Bearer ...`."
    if request.scope["path"].startswith(("/api/", "/v1/")):
        response = refuse(request, 401, message)
        response.headers["WWW-Authenticate"] = "Bearer"
        return response
    response = pages.render(request, "login.html", status=401, wrong=False)
    if request.headers.get("HX-Request") == "true":
        response.headers["HX-Refresh"] = "true"  # the whole page asks, not a part of it
    return response


def unforeseen(request: Request, error: Exception) -> Response:
    """A fault of the studio's own: the log has the details, the page has none."""
    log.error("%s %r failed", request.method, request.scope["path"], exc_info=error)
    return refuse(
        request,
        500,
        "The studio met an error of its own. What was stored before is safe. "
        "Try again; if it happens again, the log in the home folder says more.",
    )


def status_of(error: errors.StudioError) -> int:
    """The HTTP status for that kind of error."""
    return next((code for kind, code in STATUS.items() if isinstance(error, kind)), 500)


def _studio_error(request: Request, error: Any) -> Response:
    path, fragment = request.scope["path"], request.headers.get("HX-Request") == "true"
    if isinstance(error, errors.InTrash) and not path.startswith("/api/") and not fragment:
        until = trash.until(error.trashed_at)
        return pages.render(request, "trashed.html", status=404, thing=error, until=until)
    more = {"columns": error.columns} if isinstance(error, errors.UnknownColumns) else {}
    return refuse(request, status_of(error), error.message, error.field, **more)


def _no_database(request: Request, error: Exception) -> Response:
    log.error("The database did not answer", exc_info=error)
    message = "The database does not answer. Nothing was changed; try again in a few seconds."
    response = refuse(request, 503, message)
    response.headers["Retry-After"] = "5"
    return response


def _no_room(request: Request, error: Exception) -> Response:
    if not space.is_full(error):
        return unforeseen(request, error)
    message = "The disk is full. Nothing was stored; make room, then try again."
    return refuse(request, 503, message)


def _http_error(request: Request, error: Any) -> Response:
    standard = TITLES.get(error.status_code) is None or error.status_code in (404, 405)
    message = _SENTENCES.get(error.status_code) if standard else None
    response = refuse(request, error.status_code, message or str(error.detail))
    response.headers.update(error.headers or {})
    return response


def _not_understood(request: Request, error: Any) -> Response:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:])
    sentences = {sentence(problem) for problem in error.errors()[:10]}
    return refuse(request, 422, "\n".join(sorted(sentences)), field or None)


def sentence(problem: Any) -> str:
    """One of pydantic's problems as a sentence with the name of its field."""
    name = ".".join(str(part) for part in problem["loc"][1:]) or "The request"
    if problem["type"] == "missing":
        return f"{name} is missing."
    return f"{name}: {str(problem['msg']).rstrip('.')}."


def install(app: FastAPI) -> None:
    """Give the app these answers."""
    app.add_exception_handler(errors.StudioError, _studio_error)
    app.add_exception_handler(OperationalError, _no_database)
    app.add_exception_handler(OSError, _no_room)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _not_understood)
