"""Who may ask: the Host and cross-site checks, the token, and the headers of every answer."""

import hashlib
import hmac
import re
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from fastapi import Request
from fastapi.responses import RedirectResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import storage
from app.settings import settings
from app.web import pages, refusals

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "object-src 'none'; base-uri 'none'; frame-ancestors 'none'; form-action 'self'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_OPEN = ("/healthz", "/methods.css", "/login", "/theme")
_SAFE = ("GET", "HEAD", "OPTIONS")
_HOST = re.compile(r"(\[[0-9a-f:.]{2,45}\]|[a-z0-9._-]{1,253})(:[0-9]{1,5})?")


class Guard:
    """The outermost layer: refuses what may not come in, and marks what goes out.

    Decisions rest on `scope["path"]`, never on an address built from the Host header.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request = Request(scope)
        started = False

        async def marked(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                _mark(MutableHeaders(scope=message), scope)
            await send(message)

        try:
            refusal = _wrong_address(request) or _cross_site(request) or _stranger(request)
            await (refusal or self.app)(scope, receive, marked)
        except Exception as error:
            if started:
                raise
            await refusals.unforeseen(request, error)(scope, receive, marked)


def _mark(headers: MutableHeaders, scope: Scope) -> None:
    headers.update(HEADERS)
    path = scope["path"]
    if path.startswith("/static/") or path == "/methods.css":
        # A mark of the content in the address; a font never changes under its name.
        marked = scope["query_string"].startswith(b"v=") or path.endswith(".woff2")
        headers["Cache-Control"] = "max-age=31536000, immutable" if marked else "no-cache"
    else:
        headers.setdefault("Cache-Control", "no-store")


def _wrong_address(request: Request) -> Response | None:
    """Against DNS rebinding: only names that are known to be this studio's."""
    hosts = request.headers.getlist("host")
    match = _HOST.fullmatch(hosts[0].lower()) if len(hosts) == 1 else None
    if match is None or not request.scope["path"].startswith("/"):
        return refusals.refuse(request, 400, "The request names no host, or a malformed one.")
    if match[1] in _own_names():
        return None
    return refusals.refuse(
        request,
        421,
        "The studio does not answer to the name in the address bar. If that name is yours, start "
        "the studio with STUDIO_ALLOWED_HOSTS set to it.",
    )


def _own_names() -> set[str]:
    more = {name.strip().lower() for name in settings.allowed_hosts.split(",") if name.strip()}
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return ({host.lower(), "localhost", "127.0.0.1", "[::1]"} | more) - {"0.0.0.0", "[::]"}


def _cross_site(request: Request) -> Response | None:
    """Against forged requests, by what browsers say of where a request comes from."""
    if request.method in _SAFE:
        return None
    site = request.headers.get("sec-fetch-site")
    origin = request.headers.get("origin")
    if site is None:  # an old browser, plain HTTP under a LAN address, or no browser at all
        allowed = origin is None or urlsplit(origin).netloc == request.headers["host"]
    else:
        allowed = site in ("same-origin", "none")
    if allowed:
        return None
    return refusals.refuse(
        request, 403, "This request came from another site. Nothing was changed; use the studio."
    )


def _stranger(request: Request) -> Response | None:
    """Asks for the token; a link with the token becomes a cookie and an address without it."""
    path = request.scope["path"]
    query = parse_qsl(request.url.query, keep_blank_values=True)
    given = [value for name, value in query if name == "token"]
    if given and request.method in _SAFE and is_token(given[0]):
        rest = urlencode([(name, value) for name, value in query if name != "token"])
        plain = quote("/" + path.lstrip("/"))
        return welcome(request, f"{plain}?{rest}" if rest else plain)
    if path.startswith("/static/") or path in _OPEN or is_known(request):
        return None
    return refusals.stranger(request)


def is_known(request: Request) -> bool:
    """Whether the request carries the cookie or the token itself as a bearer."""
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and is_token(token.strip()):
        return True
    name, value = _cookie()
    return hmac.compare_digest(request.cookies.get(name, "").encode(), value.encode())


def is_token(given: str) -> bool:
    """Compared in a time that says nothing about how much of it was right."""
    return hmac.compare_digest(given.encode(errors="replace"), storage.token().encode())


def welcome(request: Request, to: str) -> RedirectResponse:
    """Give the cookie and go to the page.

    Lax and not strict, else a link opened from a terminal would meet the login page.
    """
    response = RedirectResponse(pages.local(to), status_code=303)
    name, value = _cookie()
    secure = request.url.scheme == "https"
    response.set_cookie(name, value, max_age=10**8, httponly=True, samesite="lax", secure=secure)
    return response


def _cookie() -> tuple[str, str]:
    # Cookies know no ports: the name keeps two studios on one machine apart.
    key = storage.token().encode()
    digest = hmac.new(key, b"studio cookie", hashlib.sha256).hexdigest()
    return f"studio-{digest[:8]}", digest[8:]
