"""The slider through the answers of a run, in a real browser, with keys and without any script."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect
from sqlalchemy.orm import Session

from app import runs, storage
from app.tables import Sample
from tests import factories, web
from tests.test_web_browser import opened

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with web.chromium() as browser:
        yield browser


@pytest.fixture
def address(home: object) -> Iterator[str]:
    with web.served() as served:
        yield served


def _paths(db: Session) -> list[str]:
    of = factories.experiment(db, watch=["Where is it?"])
    run = factories.run(db, of, state="succeeded", finished_at=1.0, step=20, num_steps=20)
    for step in (0, 10, 20):
        db.add(Sample(run_id=run.id, step=step, place=0, attempt=1, text=f"answer {step}"))
    db.commit()
    return [f"/runs/{run.id}", f"/experiments/{of.id}/samples"]


def test_keys_go_through_the_moments(chromium: Browser, address: str, db: Session) -> None:
    for path, word in zip(_paths(db), ("Step 10", "50 % of the training"), strict=True):
        context = chromium.new_context(base_url=address)
        page, complaints = opened(context, address)
        page.goto(path)
        cells = page.locator("[data-moment] td")
        expect(cells.and_(page.locator(":visible"))).to_contain_text(["answer 20"])
        page.focus("#moment")
        page.keyboard.press("ArrowLeft")
        expect(page.locator("output")).to_have_text(word)
        expect(page.locator("#moment")).to_have_attribute("aria-valuetext", word)
        expect(cells.and_(page.locator(":visible"))).to_contain_text(["answer 10"])
        page.keyboard.press("Home")
        expect(cells.and_(page.locator(":visible"))).to_contain_text(["answer 0"])
        assert complaints == []
        context.close()


def test_without_scripts_all_moments_stand_below_each_other(
    chromium: Browser, address: str, db: Session
) -> None:
    headers = {"Authorization": f"Bearer {storage.token()}"}
    for path in _paths(db):
        context = chromium.new_context(
            base_url=address, java_script_enabled=False, extra_http_headers=headers
        )
        page = context.new_page()
        page.goto(path)
        expect(page.locator("#moment")).to_be_hidden()
        for text in ("answer 0", "answer 10", "answer 20"):
            expect(page.locator("td", has_text=text)).to_be_visible()
        assert page.locator("[data-moment] h3:visible").count() == 3
        context.close()


def _answered(db: Session, run_id: str, step: int) -> None:
    db.add(Sample(run_id=run_id, step=step, place=0, attempt=1, text=f"answer {step}"))
    db.commit()


@pytest.mark.parametrize(
    ("path", "words", "shown"),
    [
        ("/runs/{run}", "Step {}", (10, 20)),
        ("/experiments/{of}/samples", "{} % of the training", (25, 50)),
    ],
)
def test_answers_come_by_themselves_and_leave_the_reader_where_he_is(
    chromium: Browser, address: str, db: Session, path: str, words: str, shown: tuple[int, int]
) -> None:
    of = factories.experiment(db, watch=["Where is it?"])
    run = factories.run(db, of, state="running", num_steps=40)
    context = chromium.new_context(base_url=address)
    page, complaints = opened(context, address)
    page.goto(path.format(run=run.id, of=of.id))
    expect(page.locator("#moments")).to_contain_text("No answers yet")
    expect(page.locator("#moment")).to_be_hidden()
    for step in (0, 10, 20):
        _answered(db, run.id, step)
    told, cells = page.locator("output"), page.locator("[data-moment] td:visible")
    chosen, newest = map(words.format, shown)
    expect(told).to_have_text(newest, timeout=10_000)  # whoever has chosen nothing follows
    page.focus("#moment")
    page.keyboard.press("ArrowLeft")
    expect(told).to_have_text(chosen)
    _answered(db, run.id, 30)
    expect(page.locator("#moment")).to_have_attribute("max", "3", timeout=10_000)
    expect(told).to_have_text(chosen)
    expect(cells).to_contain_text(["answer 10"])
    expect(page.locator("#moment")).to_be_focused()
    page.keyboard.press("End")
    expect(cells).to_contain_text(["answer 30"])
    assert complaints == []
    context.close()


def test_a_table_that_the_keyboard_is_in_stays_and_the_end_is_the_end(
    chromium: Browser, address: str, db: Session
) -> None:
    of = factories.experiment(db, watch=["Where is it?"])
    run = factories.run(db, of, state="running", num_steps=40)
    _answered(db, run.id, 0)
    context = chromium.new_context(base_url=address)
    page, complaints = opened(context, address)
    page.goto(f"/runs/{run.id}")
    page.focus("#at-0")
    _answered(db, run.id, 10)
    expect(page.locator("#at-10")).to_be_attached(timeout=10_000)
    expect(page.locator("#at-0")).to_be_focused()
    expect(page.locator("output")).to_have_text("Step 0")
    runs.finish(db, run.id, 1)
    expect(page.locator("#moments[hx-get]")).to_have_count(0, timeout=10_000)
    expect(page.locator("#at-0")).to_be_focused()
    assert complaints == []
    context.close()
