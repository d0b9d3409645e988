"""The slider through the answers of a run, in a real browser, with keys and without any script."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect
from sqlalchemy.orm import Session

from app import storage
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
