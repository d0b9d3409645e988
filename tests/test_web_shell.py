"""What all pages share: refusals, theme, notices, the methods' stylesheet, health, limits."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from app import errors, storage, workers
from app.methods import METHODS
from app.settings import settings
from app.tables import Worker
from app.web import formats, pages
from app.web.main import create_app
from tests import factories, web

TEMPLATES = sorted(storage.templates_folder().glob("*.html"))


@pytest.fixture
def browser(home: Path) -> TestClient:
    return web.client()


def failing(error: Exception) -> TestClient:
    """A studio in which /boom and /api/boom raise the error."""

    def boom() -> None:
        raise error

    app = create_app()
    for path in ("/boom", "/api/boom", "/bo{rest}"):
        app.add_api_route(path, boom, methods=["GET", "POST"])
    return web.client(app=app)


# --- Refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (errors.NotFound, 404),
        (errors.Invalid, 422),
        (errors.TooLarge, 413),
        (errors.Conflict, 409),
        (errors.Unavailable, 503),
    ],
)
def test_an_error_is_a_sentence_in_the_shape_that_was_asked_for(
    home: Path, kind: type[errors.StudioError], status: int
) -> None:
    browser = failing(kind("It <b>broke</b>.\nNothing was lost.", field="rank"))
    page = browser.get("/boom")
    assert page.status_code == status
    assert "It &lt;b&gt;broke&lt;/b&gt;.\nNothing was lost." in page.text
    assert "Back to the studio" in page.text
    told = browser.get("/api/boom")
    assert told.status_code == status
    assert told.json() == {
        "error": {"message": "It <b>broke</b>.\nNothing was lost.", "field": "rank"}
    }
    part = browser.get("/boom", headers={"HX-Request": "true"})
    assert (part.status_code, part.headers["HX-Retarget"]) == (status, "#status")
    assert "<html" not in part.text


def test_an_error_of_the_studios_own_shows_nothing_of_itself(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    browser = failing(RuntimeError("secret detail"))
    for path in ("/boom", "/api/boom"):
        answer = browser.get(path)
        assert answer.status_code == 500
        assert "secret" not in answer.text
        assert "Traceback" not in answer.text
        assert "safe" in answer.text
    assert "secret detail" in caplog.text


def test_a_path_cannot_write_lines_into_the_log(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        failing(RuntimeError("x")).get("/bo%0AERROR%20forged%1b[31m")
    assert caplog.records
    for record in caplog.records:
        assert "\n" not in record.getMessage()
        assert "\x1b" not in record.getMessage()


def test_a_database_that_does_not_answer_is_said_so(home: Path) -> None:
    answer = failing(OperationalError("SELECT 1", {}, Exception("locked"))).get("/boom")
    assert answer.status_code == 503
    assert "database does not answer" in answer.text
    assert answer.headers["Retry-After"]


@pytest.mark.parametrize("path", ["/nothing", "/datasets/000000000000", "/tuned-models/x", "/a//b"])
def test_what_is_not_there_is_404(browser: TestClient, path: str) -> None:
    page = browser.get(path)
    assert page.status_code == 404
    assert "Not found" in page.text
    assert browser.get(f"/api{path}").json()["error"]["message"].endswith(".")


def test_a_wrong_method_is_405_with_a_sentence(browser: TestClient) -> None:
    answer = browser.delete("/datasets")
    assert answer.status_code == 405
    assert "does not take that kind of request" in answer.text
    assert "GET" in answer.headers["Allow"]


def test_what_is_missing_in_a_request_is_named(browser: TestClient) -> None:
    answer = browser.post("/api/base-models", json={"source": "hub"})
    assert answer.status_code == 422
    assert answer.json()["error"] == {"message": "address is missing.", "field": "address"}
    assert (
        browser.post(
            "/api/base-models", content="{", headers={"Content-Type": "application/json"}
        ).status_code
        == 422
    )
    assert "file is missing." in browser.post("/datasets", data={"name": "x"}).text


# --- Frame ------------------------------------------------------------------------------------


def test_every_page_leads_to_trash_and_disk_and_so_does_the_notice_of_a_deletion(
    browser: TestClient, db: Session
) -> None:
    for path in ("/", "/datasets", "/disk", "/nothing"):
        foot = browser.get(path).text.partition('<footer class="foot">')[2]
        assert 'href="/trash"' in foot
        assert 'href="/disk"' in foot
    made = factories.dataset(db)
    browser.post(f"/datasets/{made.id}/delete")
    notice = re.search(r'<div class="toast">.*?</div>', browser.get("/datasets").text)
    assert notice
    assert 'href="/trash"' in notice[0]
    assert f'action="/trash/dataset/{made.id}/put-back"' in notice[0]
    assert '<footer class="foot">' not in web.client(known=False).get("/").text


def test_the_theme_is_on_the_page_without_script(browser: TestClient) -> None:
    assert '<html lang="en" data-theme="system">' in browser.get("/datasets").text
    answer = browser.post("/theme", data={"theme": "dark", "to": "/datasets"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/datasets")
    page = browser.get("/datasets").text
    assert '<html lang="en" data-theme="dark">' in page
    assert re.search(r'value="dark" aria-pressed="true"', page)


def test_a_theme_that_is_none_is_not_kept(browser: TestClient) -> None:
    browser.post("/theme", data={"theme": '"><script>'})
    browser.cookies.set("studio-theme", '"><script>')
    assert 'data-theme="system"' in browser.get("/datasets").text


def test_a_notice_is_shown_once_as_text(browser: TestClient) -> None:
    notice = "Größe: <b>5</b> ✓; a, b=c"
    browser.cookies.set(
        "studio-notice",
        pages.redirect("/", notice).raw_headers[-1][1].decode().split("=", 1)[1].split(";")[0],
    )
    page = browser.get("/datasets")
    assert "Größe: &lt;b&gt;5&lt;/b&gt; ✓; a, b=c" in page.text
    assert 'studio-notice=""' in page.headers["set-cookie"]


def test_the_place_one_is_at_is_marked(browser: TestClient) -> None:
    assert re.search(r'href="/datasets"[^>]* aria-current="page"', browser.get("/datasets").text)
    page = browser.get("/datasets/nothing").text
    assert re.search(r'href="/datasets"[^>]* aria-current="true"', page)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_templates_hold_nothing_that_the_policy_forbids(template: Path) -> None:
    source = template.read_text()
    assert not re.search(r"\sstyle\s*=", source)
    assert not re.search(r"\son[a-z]+\s*=\s*[\"']", source)
    assert not re.search(r"hx-on|hx-vals\s*=\s*[\"']js:|<style|javascript:", source)
    assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", source))
    assert not re.search(r"(src|href)=[\"'](https?:)?//", source)
    # A text of the template's own may be marked as safe; never a value.
    assert not re.search(r"[^'\"\s]\s*\|\s*safe", source)
    assert "autoescape" not in source


def test_the_methods_stylesheet_has_each_method(browser: TestClient) -> None:
    sheet = browser.get("/methods.css")
    assert sheet.headers["content-type"].startswith("text/css")
    for method in METHODS.values():
        assert f"light-dark({method.light}, {method.dark})" in sheet.text
        assert f".method-{method.key} " in sheet.text
        assert method.dash in sheet.text
    assert ".method-base " in sheet.text


def test_health_tells_database_broker_and_workers(browser: TestClient, db: Session) -> None:
    workers.beat(db, Worker(id="w1", kind="tuner", host="here", pid=1))
    answer = browser.get("/healthz").json()
    assert answer == {
        "status": "degraded",  # no broker in this test
        "database": "ok",
        "broker": "away",
        "workers": {"tuner": 1, "generator": 0},
    }


# --- How much a request may carry -------------------------------------------------------------


def test_a_form_that_is_too_large_is_refused(browser: TestClient) -> None:
    answer = browser.post("/theme", data={"theme": "x" * 2_000_001})
    assert answer.status_code == 413
    assert "Nothing was stored" in answer.text


def test_an_upload_over_the_limit_is_refused_and_leaves_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "max_upload_mb", 1)
    token = {"Authorization": f"Bearer {storage.token()}"}
    line = json.dumps({"input": "x" * 1000, "output": "y"}).encode() + b"\n"
    with web.served() as address, httpx.Client(base_url=address, headers=token) as browser:
        for path in ("/datasets", "/api/datasets"):
            answer = browser.post(path, files={"file": ("a.jsonl", line * 1500)})
            assert answer.status_code == 413
            assert "larger than 1 MB" in answer.text
        assert browser.get("/api/datasets").json() == []
    assert list(storage.dataset_file("x").parent.iterdir()) == []


def test_an_upload_without_a_length_is_stopped_at_the_limit(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "max_upload_mb", 1)
    sent = 0

    def body() -> Any:
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.csv"\r\n\r\n'
        while sent < 200_000_000:
            sent += 65536
            yield b"x" * 65536

    headers = {
        "Authorization": f"Bearer {storage.token()}",
        "Content-Type": "multipart/form-data; boundary=b",
    }
    with web.served() as address:
        try:
            status = httpx.post(f"{address}/datasets", content=body(), headers=headers).status_code
        except httpx.WriteError:  # the studio has hung up, as it may
            status = 413
    assert status == 413
    assert sent < 20_000_000


# --- Figures in words -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (formats.size(999), "999 B"),
        (formats.size(52_000), "52.0 kB"),
        (formats.size(269_060_552), "269 MB"),
        (formats.size(999_960_000), "1.0 GB"),
        (formats.size(None), formats.NOTHING),
        (formats.duration(0.0), "0.0 s"),
        (formats.duration(59.6), "1 min 00 s"),
        (formats.duration(3599.6), "1 h 00 min"),
        (formats.duration(86400 * 3), "72 h 00 min"),
        (formats.figure(0.0), "0"),
        (formats.figure(0.00001), "0.00001"),
        (formats.figure(2.34567), "2.3457"),
        (formats.percent(0.9449), "94.5 %"),
        (formats.short("a\nb" * 50, 5), "a ba …"),
    ],
)
def test_figures_are_said_in_units(said: str, words: str) -> None:
    assert said == words
