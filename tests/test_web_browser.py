"""The shell in a real browser: policy, themes, narrow screens, upload, keys, and no script at all."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect
from sqlalchemy.orm import Session

from app import base_models, storage
from tests import factories, web
from tests.test_web_datasets import HOSTILE

pytestmark = pytest.mark.browser
PAGES = ["/", "/datasets", "/base-models", "/tuned-models", "/nothing"]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with web.chromium() as browser:
        yield browser


@pytest.fixture
def address(home: Path) -> Iterator[str]:
    with web.served() as served:
        yield served


def opened(context: BrowserContext, address: str) -> tuple[Page, list[str]]:
    """A page that knows the token, and the list in which its complaints will be."""
    page, complaints = context.new_page(), []
    page.on("console", lambda one: complaints.append(one.text) if one.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append("dialog"), dialog.dismiss()))
    page.goto(f"{address}/?token={storage.token()}")
    return page, complaints


@pytest.fixture
def page(chromium: Browser, address: str) -> Iterator[Page]:
    context = chromium.new_context(base_url=address)
    page, complaints = opened(context, address)
    yield page
    assert [one for one in complaints if "status of 4" not in one] == []
    context.close()


def lines(count: int) -> bytes:
    rows = [{"input": f"text {n}", "output": f"label {n % 3}"} for n in range(count)]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def upload(page: Page, content: bytes) -> None:
    page.goto("/datasets")
    sent = {"name": "mine.jsonl", "mimeType": "application/json", "buffer": content}
    page.set_input_files("#file", sent)
    page.click("text=Upload >> nth=-1")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 420])
def test_pages_with_hostile_text_keep_the_policy_and_the_width(
    chromium: Browser, address: str, db: Session, theme: str, width: int
) -> None:
    for text in HOSTILE:
        data = factories.dataset(db, [(text, text)] * 3, name=text, report={"labels": {text: 3}})
        base = factories.base_model(db, name=text, address=text, note=text, error=text)
        experiment = factories.experiment(db, base, data, name=text, labels=[text])
        run = factories.tuned(db, experiment)
        factories.run(db, experiment, state="running", error=text)
    context = chromium.new_context(
        base_url=address, viewport={"width": width, "height": 800}, color_scheme=theme
    )
    page, complaints = opened(context, address)
    for path in [*PAGES, f"/datasets/{data.id}", f"/tuned-models/{run.id}"]:
        page.goto(path)
        wider = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert (path, wider) == (path, 0)
        ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 22, 22)"}[theme]
    assert [one for one in complaints if "status of 404" not in one] == []
    context.close()


def test_a_refused_file_is_explained_in_place_and_a_good_one_opens(page: Page) -> None:
    upload(page, lines(50) + b'{"input": "only"}\n')
    expect(page.locator("#refused")).to_contain_text("Line 51:")
    expect(page.locator("#refused")).to_be_visible()
    assert page.url.endswith("/datasets")
    upload(page, lines(60))
    expect(page.locator("h1")).to_have_text("mine")
    expect(page.locator("tbody >> nth=0")).to_contain_text("text 0")


def test_columns_that_are_not_known_are_chosen_with_the_file_still_there(page: Page) -> None:
    upload(page, lines(60).replace(b'"input"', b'"frage"').replace(b'"output"', b'"antwort"'))
    expect(page.locator("#refused")).to_contain_text("the fields are: frage, antwort")
    assert page.locator("#choices option").evaluate_all("all => all.map((one) => one.value)") == [
        "frage",
        "antwort",
    ]
    page.fill("#input_column", "frage")
    page.fill("#output_column", "antwort")
    page.click("text=Upload >> nth=-1")
    expect(page.locator("tbody >> nth=0")).to_contain_text("text 0")


def test_everything_works_without_script(chromium: Browser, address: str) -> None:
    context = chromium.new_context(base_url=address, java_script_enabled=False)
    page, _ = opened(context, address)
    upload(page, lines(50) + b'{"input": "only"}\n')
    expect(page.locator("#refused")).to_contain_text("Line 51:")
    upload(page, lines(60))
    expect(page.locator("h1")).to_have_text("mine")
    expect(page.get_by_role("status")).to_contain_text("60 examples were added")
    page.click("text=Delete this dataset")
    page.click("text=Delete the dataset")
    expect(page.get_by_role("status")).to_contain_text("The dataset is in the trash")
    page.click("text=Undo")
    expect(page.get_by_role("status")).to_contain_text("It is back")
    expect(page.locator("h1")).to_have_text("mine")
    page.click("text=Dark")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    context.close()


def test_the_theme_changes_at_once_and_stays(page: Page) -> None:
    page.goto("/datasets")
    page.evaluate("window.same = true")
    with page.expect_response("**/theme"):
        page.click("text=Dark")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    assert page.evaluate("window.same")  # no reload
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    expect(page.get_by_role("button", name="Dark")).to_have_attribute("aria-pressed", "true")


def test_keys_go_places_but_not_while_typing(page: Page) -> None:
    page.goto("/")
    page.keyboard.type("gd")
    expect(page).to_have_url(re.compile("/datasets$"))
    page.focus("#name")
    page.keyboard.type("gt")
    assert page.input_value("#name") == "gt"
    assert page.url.endswith("/datasets")


def test_the_keyboard_reaches_the_content_first(page: Page) -> None:
    page.goto("/datasets")
    page.keyboard.press("Tab")
    expect(page.locator(":focus")).to_have_text("Skip to the content")
    page.keyboard.press("Enter")
    expect(page.locator(":focus")).to_have_id("main")


def test_a_base_models_card_follows_its_preparation(page: Page, db: Session) -> None:
    made = factories.base_model(db, state="preparing", progress="1 of 2 MB")
    page.goto("/base-models")
    card = page.locator(f"[id='{made.id}']")
    expect(card).to_contain_text("1 of 2 MB")
    base_models.progress(db, made.id, "2 of 2 MB")
    expect(card).to_contain_text("2 of 2 MB")
    base_models.finish(db, made.id, licence="MIT")
    expect(card).to_contain_text("Ready")
    expect(card).to_contain_text("MIT")
    expect(card).not_to_have_attribute("hx-get", f"/base-models/{made.id}/state")


def test_a_refusal_of_a_part_is_said_in_the_status_region(page: Page, db: Session) -> None:
    made = factories.base_model(db, state="preparing")
    page.goto("/base-models")
    db.delete(made)
    db.commit()
    expect(page.get_by_role("status")).to_contain_text("There is no such base model")
    expect(page.locator(f"[id='{made.id}']")).to_be_visible()  # what was there stays
