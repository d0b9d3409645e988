"""Renders templates: the Jinja environment, and the answers that page handlers give."""

import hashlib
import re
from functools import cache
from typing import Any
from urllib.parse import quote, unquote

from fastapi import Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from app import naming, storage
from app.methods import METHODS
from app.web import colours, formats

THEMES = ("light", "dark", "system")
_NOTICE = "studio-notice"  # cookie: one sentence for the next page, after a redirect
_UNDO = "studio-undo"  # cookie: kind and id of what was thrown away, for the button beside it
_THROWN = re.compile(r"[a-z-]+/[0-9a-f]+")
_THEME = "studio-theme"


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(storage.templates_folder()),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= formats.FILTERS | {"run_name": naming.name, "param": naming.written}
    made.globals |= {"methods": METHODS, "static": static, "methods_sheet": colours.ADDRESS}
    made.globals["zone"] = formats.zone
    return made


@cache
def static(name: str) -> str:
    """The address of a file in static/, with a mark of its content so that it may be kept."""
    path = storage.static_folder() / name
    mark = hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else "missing"
    return f"/static/{name}?v={mark}"


def render(request: Request, template: str, *, status: int = 200, **values: Any) -> HTMLResponse:
    """A page, or a fragment if the template's name begins with `_`.

    Every template also knows `path`, `theme`, `notice`, `undo`, `methods` and `static(name)`.
    """
    page = not template.startswith("_")
    theme = request.cookies.get(_THEME, "system")
    notice = unquote(request.cookies.get(_NOTICE, "")) if page else ""
    undo = unquote(request.cookies.get(_UNDO, "")) if notice else ""
    text = (
        _environment()
        .get_template(template)
        .render(
            path=request.scope["path"],
            theme=theme if theme in THEMES else "system",
            notice=notice,
            undo=undo if _THROWN.fullmatch(undo) else "",
            status=status,
            **values,
        )
    )
    response = HTMLResponse(text, status_code=status)
    if notice:
        response.delete_cookie(_NOTICE)
        response.delete_cookie(_UNDO)
    return response


def unless_seen(request: Request, template: str, seen: str, shown: dict[str, Any]) -> Response:
    """A fragment that looks again by itself; 204 if the page shows it already: `seen` is its mark."""
    if shown["seen"] == seen:
        return Response(status_code=204)
    return render(request, template, **shown)


def redirect(to: str, notice: str = "", undo: str = "") -> RedirectResponse:
    """Go to a page of the studio after a form (303), which then says the notice once.

    `undo` is kind/id of what went into the trash: the notice then has a button that puts it back.
    """
    response = RedirectResponse(local(to), status_code=303)
    for name, text in ((_NOTICE, notice), (_UNDO, undo)):
        if text:
            value = quote(text[:300], safe="")
            response.set_cookie(name, value, max_age=60, httponly=True, samesite="lax")
    return response


def choose_theme(to: str, theme: str) -> RedirectResponse:
    """Remember light, dark or the system's own, and go back to the page."""
    response = redirect(to)
    if theme in THEMES:
        response.set_cookie(_THEME, theme, max_age=10**8, httponly=True, samesite="lax")
    return response


def local(address: str) -> str:
    """The address if it is a path of the studio, else `/`: nobody is sent elsewhere."""
    plain = address.isprintable() and "\\" not in address
    return address if plain and address.startswith("/") and address[1:2] != "/" else "/"
