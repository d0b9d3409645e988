"""Who may ask, and what every answer carries."""

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app import storage
from app.settings import settings
from app.web import security
from app.web.main import create_app
from tests import web

PAGES = ["/", "/datasets", "/base-models", "/tuned-models", "/experiments", "/nothing", "/now"]


@pytest.fixture
def stranger(home: Path) -> TestClient:
    return web.client(known=False)


@pytest.fixture
def known(home: Path) -> TestClient:
    return web.client()


def ask(headers: list[tuple[bytes, bytes]], path: str = "/healthz", method: str = "GET") -> int:
    """The status of a request with exactly these headers, which no client would send."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    asyncio.run(create_app()(scope, receive, send))
    return int(sent[0]["status"])


# --- The token --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES)
def test_a_stranger_gets_the_login_page_and_nothing_else(stranger: TestClient, path: str) -> None:
    answer = stranger.get(path)
    assert answer.status_code == 401
    assert "Open the studio with its link" in answer.text
    assert storage.token() not in answer.text


@pytest.mark.parametrize(
    "path", ["/api/datasets", "/api/openapi.json", "/api/nothing", "/v1/models"]
)
def test_a_stranger_gets_json_from_the_api(stranger: TestClient, path: str) -> None:
    answer = stranger.get(path)
    assert answer.status_code == 401
    assert "access token" in answer.json()["error"]["message"]
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_a_strangers_form_changes_nothing(stranger: TestClient, known: TestClient) -> None:
    assert stranger.post("/datasets/examples/support_tickets").status_code == 401
    assert stranger.post("/api/datasets/examples/support_tickets").status_code == 401
    assert known.get("/api/datasets").json() == []


def test_health_and_static_files_need_no_token(stranger: TestClient) -> None:
    for path in ("/healthz", "/static/studio.css", "/methods.css"):
        assert stranger.get(path).status_code == 200


def test_a_path_that_only_begins_like_an_open_one_is_closed(stranger: TestClient) -> None:
    for path in ("/healthz/x", "/static", "/statically", "/login/x", "/%73tatic/../datasets"):
        assert stranger.get(path).status_code == 401


def test_the_link_becomes_a_cookie_and_an_address_without_token(stranger: TestClient) -> None:
    token = storage.token()
    answer = stranger.get(f"/datasets?after=1&token={token}&x=a%26b")
    assert (answer.status_code, answer.headers["location"]) == (303, "/datasets?after=1&x=a%26b")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert token not in cookie
    assert stranger.get("/datasets").status_code == 200  # the client keeps the cookie


def test_a_cookie_of_another_token_opens_nothing(
    stranger: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger.get(f"/?token={storage.token()}")
    monkeypatch.setattr(settings, "token", "changed")
    assert stranger.get("/datasets").status_code == 401


@pytest.mark.parametrize("token", ["", "wrong", "Ä", "x" * 10_000])
def test_a_wrong_token_opens_nothing(stranger: TestClient, token: str) -> None:
    assert stranger.get("/", params={"token": token}).status_code == 401
    given = {"Authorization": f"Bearer {token}".encode()}
    assert stranger.get("/api/datasets", headers=given).status_code == 401
    refused = stranger.post("/login", data={"token": token})
    assert refused.status_code == 401
    assert "set-cookie" not in refused.headers


def test_a_token_in_a_forms_address_does_not_count(stranger: TestClient) -> None:
    path = f"/datasets/examples/support_tickets?token={storage.token()}"
    assert stranger.post(path).status_code == 401


def test_the_pasted_token_opens_the_page_that_was_wanted(stranger: TestClient) -> None:
    page = stranger.get("/tuned-models")
    assert '<input type="hidden" name="to" value="/tuned-models">' in page.text
    answer = stranger.post("/login", data={"token": f" {storage.token()}\n", "to": "/tuned-models"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/tuned-models")
    assert stranger.get("/tuned-models").status_code == 200


@pytest.mark.parametrize(
    "to", ["//evil.example", "/\\evil.example", "https://evil.example", "\t//evil", "/\n/evil", ""]
)
def test_nobody_is_sent_to_another_site(stranger: TestClient, to: str) -> None:
    for path in ("/login", "/theme"):
        answer = stranger.post(path, data={"token": storage.token(), "to": to})
        assert answer.headers["location"] == "/"


@pytest.mark.parametrize("path", ["//evil.example/", "///evil.example", "/\\evil.example"])
def test_the_links_own_path_sends_nobody_to_another_site(home: Path, path: str) -> None:
    request = web.client(known=False).build_request("GET", f"/?token={storage.token()}")
    scope = {"type": "http", "method": "GET", "path": path, "headers": [], "scheme": "http"}
    scope |= {"query_string": request.url.query, "server": ("127.0.0.1", 1), "root_path": ""}
    answer = security._stranger(security.Request(scope))
    assert answer is not None
    assert re.match(r"/[^/\\]", answer.headers["location"])


def test_a_fragment_asks_for_the_whole_page_again(stranger: TestClient) -> None:
    answer = stranger.get("/now", headers={"HX-Request": "true"})
    assert (answer.status_code, answer.headers["HX-Refresh"]) == (401, "true")


# --- Host and site ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "127.0.0.1:8000", "[::1]", "[::1]:80", "LOCALHOST:99999"]
)
def test_the_studios_own_names_are_answered(home: Path, host: str) -> None:
    assert ask([(b"host", host.encode())]) == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.com",
        "localhost.evil.com",
        "127.0.0.1.nip.io",
        "0.0.0.0",
        "[::]",
        "localhost@evil.com",
        "a/?x=",
        "localhost/",
        "localhost:x",
        "localhost:80:80",
        "127.1",
    ],
)
def test_other_names_are_refused(home: Path, host: str) -> None:
    assert ask([(b"host", host.encode())]) in (400, 421)


def test_two_hosts_no_host_and_odd_paths_are_refused(home: Path) -> None:
    local = (b"host", b"localhost")
    assert ask([local, (b"host", b"evil.com")]) == 400
    assert ask([]) == 400
    assert ask([(b"host", b"")]) == 400
    assert ask([(b"host", b"localhost evil")]) == 400
    assert ask([local], path="http://localhost/healthz") == 400
    assert ask([local], path="healthz") == 400


def test_the_host_of_the_settings_and_more_hosts_are_answered(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "host", "::")
    monkeypatch.setattr(settings, "allowed_hosts", "Studio.example, box.lan")
    assert ask([(b"host", b"studio.example:8000")]) == 200
    assert ask([(b"host", b"box.lan")]) == 200
    assert ask([(b"host", b"[::]")]) == 421
    monkeypatch.setattr(settings, "host", "fe80::1")
    assert ask([(b"host", b"[fe80::1]:8000")]) == 200


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, True),  # no browser: curl, a program
        ({"Sec-Fetch-Site": "same-origin"}, True),
        ({"Sec-Fetch-Site": "none"}, True),
        ({"Sec-Fetch-Site": "same-site"}, False),
        ({"Sec-Fetch-Site": "cross-site"}, False),
        ({"Sec-Fetch-Site": "cross-site", "Origin": web.BASE}, False),
        ({"Origin": web.BASE}, True),
        ({"Origin": "null"}, False),
        ({"Origin": ""}, False),
        ({"Origin": "http://evil.example"}, False),
        ({"Origin": "http://127.0.0.1:9999"}, False),
        ({"Origin": "http://127.0.0.1:8000.evil.example"}, False),
    ],
)
def test_forms_of_other_sites_are_refused(
    known: TestClient, headers: dict[str, str], allowed: bool
) -> None:
    for path in ("/theme", "/api/datasets/examples/support_tickets"):
        status = known.post(path, headers=headers).status_code
        assert (status != 403) == allowed


def test_reading_from_a_link_on_another_site_is_possible(known: TestClient) -> None:
    assert known.get("/datasets", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200


def test_no_other_site_may_read_answers(known: TestClient) -> None:
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    for answer in (
        known.options("/api/datasets", headers=asked),
        known.get("/api/datasets", headers={"Origin": "http://evil.example"}),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control")]


# --- Headers ----------------------------------------------------------------------------------


def test_every_answer_carries_the_headers(home: Path) -> None:
    app = create_app()
    app.add_api_route("/boom", lambda: 1 / 0)
    known, stranger = web.client(app=app), web.client(app=app, known=False)
    answers = [known.get(path) for path in [*PAGES, "/boom", "/healthz", "/static/studio.css"]]
    answers += [known.get("/api/datasets"), known.get("/static/nothing"), stranger.get("/")]
    answers += [known.post("/"), known.get("/", headers={"Host": "evil.com"})]
    answers += [known.post("/theme", headers={"Origin": "null"})]
    statuses = {answer.status_code for answer in answers}
    assert {200, 401, 403, 404, 405, 421, 500} <= statuses
    for answer in answers:
        policy = answer.headers["Content-Security-Policy"]
        assert "unsafe" not in policy
        assert {"object-src 'none'", "frame-ancestors 'none'", "base-uri 'none'"} <= set(
            policy.split("; ")
        )
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert answer.headers["Referrer-Policy"] == "no-referrer"


def test_pages_are_not_stored_and_marked_files_are(known: TestClient) -> None:
    assert known.get("/datasets").headers["Cache-Control"] == "no-store"
    assert known.get("/static/studio.css").headers["Cache-Control"] == "no-cache"
    assert "immutable" in known.get("/static/studio.css?v=1").headers["Cache-Control"]


@pytest.mark.parametrize("path", ["/static/../app/cli.py", "/static/..%2f..%2fetc%2fpasswd"])
def test_static_gives_nothing_from_elsewhere(known: TestClient, path: str) -> None:
    assert known.get(path).status_code == 404


def test_pages_that_load_scripts_from_elsewhere_are_off(known: TestClient) -> None:
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert known.get(path).status_code == 404
    assert "/api/datasets" in known.get("/api/openapi.json").json()["paths"]
