"""The queue's page and its JSON: order, moves, holding, empty and failed states."""

import re
from datetime import datetime
from zoneinfo import ZoneInfo

import pytest
from fastapi.testclient import TestClient
from playwright.sync_api import expect
from sqlalchemy.orm import Session

from app import order, storage, workers
from app.tables import Worker
from tests import factories, web

KOLKATA = ZoneInfo("Asia/Kolkata")  # half an hour away from every other machine


@pytest.fixture
def browser(home: object) -> TestClient:
    return web.client()


def _queue(db: Session, count: int = 3) -> list[str]:
    of = factories.experiment(db, name="<b>Bold</b>")
    forecast = {"memory_mb": 2500, "seconds": 600}
    return [
        factories.run(db, of, position=float(place), forecast=forecast).id for place in range(count)
    ]


def _alive(db: Session, memory_mb: float = 8000.0) -> None:
    workers.beat(db, Worker(id="w1", kind="tuner", host="here", pid=1))
    workers.describe(db, "w1", "CPU", memory_mb)


def _places(page: str) -> list[str]:
    return re.findall(r'<tr id="line-(\w+)"', page)


def test_the_queue_is_shown_in_order_with_times_and_memory(
    browser: TestClient, db: Session
) -> None:
    _alive(db)
    ids = _queue(db)
    page = browser.get("/queue").text
    assert _places(page) == ids
    assert "0 running, 3 waiting" in page
    assert "2.5 GB" in page
    assert (
        len(re.findall(r"<time datetime=\"[^\"]+\" data-clock>[\w ]*\d\d:\d\d</time>", page)) == 6
    )
    assert "&lt;b&gt;Bold&lt;/b&gt;" in page
    assert re.search(r'href="/queue"[^>]* aria-current="page"', page)


def test_an_empty_queue_says_what_to_do(browser: TestClient, db: Session) -> None:
    page = browser.get("/queue").text
    assert "Nothing runs and nothing waits" in page
    assert 'href="/experiments/new"' in page


def test_a_queue_without_workers_says_so(browser: TestClient, db: Session) -> None:
    _queue(db)
    assert "No tuning worker is running" in browser.get("/queue").text


def test_a_run_that_fits_no_worker_says_so(browser: TestClient, db: Session) -> None:
    _queue(db, 1)
    _alive(db, 1000.0)
    page = browser.get("/queue").text
    assert "Fits no worker" in page
    assert "it needs about 2.5 GB of memory, and the largest has 1.0 GB" in page


def test_runs_are_moved_without_script_and_the_keyboard_stays(
    browser: TestClient, db: Session
) -> None:
    first, second, third = _queue(db)
    answer = browser.post(f"/queue/{third}/next", data={"page": "1"})
    assert answer.status_code == 303
    page = browser.get(answer.headers["location"]).text
    assert _places(page) == [third, first, second]
    (button,) = re.findall(r"<button[^>]*autofocus[^>]*>", page)
    assert f'id="next-{third}"' in button
    browser.post(f"/queue/{second}/up")
    browser.post(f"/queue/{third}/down")
    assert _places(browser.get("/queue/lines").text) == [second, third, first]


def test_a_run_that_has_begun_is_not_moved(browser: TestClient, db: Session) -> None:
    run = factories.run(db, state="running")
    answer = browser.post(f"/queue/{run.id}/up")
    assert answer.status_code == 409
    assert "has no place in the queue now. Nothing was changed." in answer.text
    assert browser.post("/queue/nothing/up").status_code == 404
    assert browser.post(f"/queue/{run.id}/away").status_code == 422


def test_the_queue_is_held_and_released_in_sight_of_everyone(
    browser: TestClient, db: Session
) -> None:
    (run,) = _queue(db, 1)
    experiment = browser.get(f"/api/runs/{run}").json()["experiment_id"]
    assert "is held" not in browser.get("/queue").text
    assert browser.post("/queue/hold").headers["location"] == "/queue?focus=held"
    assert "Release the queue" in browser.get("/queue").text
    for path in ("/", "/now", "/queue", "/queue/held", f"/experiments/{experiment}"):
        text = re.sub(r"<[^>]+>", "", browser.get(path).text)
        assert "queue is held since just now: what runs goes on, nothing new begins." in text, path
    browser.post("/queue/release")
    assert order.held_since(db) is None
    assert "is held" not in browser.get(f"/experiments/{experiment}").text


def test_json_says_and_does_the_same(browser: TestClient, db: Session) -> None:
    _alive(db)
    first, second, third = _queue(db)
    found = browser.get("/api/queue").json()
    assert [line["id"] for line in found["queued"]] == [first, second, third]
    assert found["queued"][0]["ends_at"] - found["queued"][0]["starts_at"] == pytest.approx(600)
    assert found["tuners"] == [{"id": "w1", "device": "CPU", "memory_mb": 8000.0}]
    moved = browser.post(f"/api/queue/{third}/next").json()
    assert [line["id"] for line in moved["queued"]] == [third, first, second]
    assert browser.post("/api/queue/hold").json()["held_since"] > 0
    assert browser.get("/api/queue").json()["held_since"] > 0
    assert browser.post("/api/queue/release").json() == {"held_since": None}
    assert browser.post("/api/queue/nothing/up").status_code == 404


@pytest.mark.browser
def test_times_are_by_the_readers_clock(home: object, db: Session) -> None:
    _alive(db)
    _queue(db, 1)
    with web.served() as address, web.chromium() as chromium:
        page = chromium.new_page(base_url=address, timezone_id="Asia/Kolkata")
        page.goto(f"/?token={storage.token()}")
        page.goto("/queue")
        begins = page.locator("time[data-clock]").first
        for _ in range(2):  # at first, and when the page has looked again by itself
            there = datetime.strptime(begins.get_attribute("datetime") or "", "%Y-%m-%dT%H:%M:%S%z")
            expect(begins).to_have_text(re.compile(f"{there.astimezone(KOLKATA):%H:%M}$"))
            expect(page.locator("[data-zone]")).to_have_text("your clock")
            with page.expect_response("**/queue/lines**"):
                pass


@pytest.mark.browser
def test_the_keyboard_stays_at_the_run_that_it_moves(home: object, db: Session) -> None:
    _alive(db)
    first, second, third = _queue(db)
    with web.served() as address, web.chromium() as chromium:
        page = chromium.new_page(base_url=address)
        page.goto(f"/?token={storage.token()}")
        page.goto("/queue")
        rows, held = page.locator("tr[id]"), page.locator("#held")
        page.locator(f"#up-{third}").focus()
        for ids in ([first, third, second], [third, first, second], [third, first, second]):
            with page.expect_response("**/queue?**"):
                page.keyboard.press("Enter")
            for place, run_id in enumerate(ids):
                expect(rows.nth(place)).to_have_id(f"line-{run_id}")
            expect(page.locator(f"#up-{third}")).to_be_focused()
        with page.expect_response("**/queue/lines**"):
            pass  # the page looks again by itself
        expect(page.locator(f"#up-{third}")).to_be_focused()
        held.focus()
        page.keyboard.press("Enter")
        expect(held).to_have_text("Release the queue")
        expect(held).to_be_focused()
