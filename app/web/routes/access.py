"""How a browser gets in, and what it remembers of its person: the theme."""

from typing import Annotated

from fastapi import APIRouter, Form, Request
from fastapi.responses import Response

from app.web import pages, security

router = APIRouter()
Text = Annotated[str, Form()]


@router.post("/login")
def log_in(request: Request, token: Text = "", to: Text = "/") -> Response:
    """Take the pasted token, or say that it is not the one."""
    if security.is_token(token.strip()):
        return security.welcome(request, to)
    return pages.render(request, "login.html", status=401, wrong=True)


@router.post("/theme")
def theme(theme: Text = "system", to: Text = "/") -> Response:
    """Light, dark, or what the system says."""
    return pages.choose_theme(to, theme)
