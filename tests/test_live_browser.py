"""The screens that move, in a real browser: curves, panels, comparison, form and playground."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect
from sqlalchemy.orm import Session

from app import completions, lengths, points, prompts, runs, storage
from app.comparison import baselines
from app.comparison.baselines import Given
from app.tables import Experiment, Run
from tests import factories, tiny, web
from tests.factories import measured

pytestmark = pytest.mark.browser
HOSTILE = "<img src=x onerror=alert(1)> \"q\" 'q' {{ 7 }}"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with web.chromium() as browser:
        yield browser


@pytest.fixture
def page(chromium: Browser, home: Path) -> Iterator[Page]:
    """A page that knows the token; it may complain of nothing but refusals."""
    with web.served() as address:
        context = chromium.new_context(base_url=address, viewport={"width": 1280, "height": 900})
        page, complaints = context.new_page(), []
        page.on("console", lambda one: complaints.append(one.text) if one.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: dialog.accept())
        page.goto(f"/?token={storage.token()}")
        yield page
        quiet = ("status of 4", "ERR_INTERNET_DISCONNECTED")
        assert [one for one in complaints if not any(part in one for part in quiet)] == []
        context.close()


@pytest.fixture
def of(db: Session) -> Experiment:
    """LoRA training and full tuning in the queue."""
    of = factories.experiment(db, name=HOSTILE)
    factories.run(db, of, id="a" * 12, state="running", num_steps=40)
    factories.run(db, of, id="b" * 12, method="full")
    db.refresh(of)
    db.commit()
    return of


def record(db: Session, *steps: int, kind: str = "train", loss: float = 1.5) -> None:
    points.record(db, "a" * 12, 1, [measured(step, kind, loss=loss) for step in steps])


def reading(page: Page, run: str = "a" * 12) -> Any:
    return page.locator(f"[data-run='{run}'] [data-read]")


def test_the_curve_and_the_panel_move_by_themselves(
    page: Page, db: Session, of: Experiment
) -> None:
    page.goto(f"/experiments/{of.id}")
    panel = page.locator("#run-" + "a" * 12)
    expect(page.locator("#live")).to_have_text("Live")
    for step in range(1, 12):
        record(db, step, loss=2.0)
    expect(reading(page)).to_have_text("2.000 (raw 2.000)", timeout=2000)
    expect(panel.locator("[data-field=steps]")).to_have_text("step 11 of 40")
    expect(panel.locator("[data-field=left]")).to_have_text(re.compile(r"\d+ to \d+ s"))
    record(db, 11, kind="validation", loss=1.25)
    expect(reading(page)).to_have_text("2.000 (raw 2.000), validation 1.250 at step 11")
    page.reload()
    expect(reading(page)).to_have_text("2.000 (raw 2.000), validation 1.250 at step 11")


def test_a_broken_connection_and_a_resume_leave_the_curve_whole(
    page: Page, db: Session, of: Experiment
) -> None:
    page.goto(f"/experiments/{of.id}")
    record(db, *range(1, 9), loss=3.0)
    expect(reading(page)).to_have_text("3.000 (raw 3.000)")
    page.context.set_offline(True)
    points.rewind(db, "a" * 12, 1, 4)
    record(db, 5, 6, loss=1.0)
    page.context.set_offline(False)
    expect(reading(page)).to_contain_text("(raw 1.000)", timeout=15_000)
    page.locator("[data-plot]").focus()
    told = []
    for key in ("Home", *["ArrowRight"] * 6):
        page.keyboard.press(key)
        told.append((page.locator("[data-at]").inner_text(), reading(page).inner_text()[-6:-1]))
    # The cursor stays at step 6: what was taken back is gone.
    steps = [f"step {step}" for step in (1, 2, 3, 4, 5, 6, 6)]
    assert told == list(zip(steps, ["3.000"] * 4 + ["1.000"] * 3, strict=True))
    expect(page.locator("[data-chart] [role=status]")).to_contain_text("step 6. LoRA:")


def test_what_is_no_number_is_said_and_zero_is_drawn(
    page: Page, db: Session, of: Experiment
) -> None:
    record(db, 1, loss=0.0)
    page.goto(f"/experiments/{of.id}")
    expect(reading(page)).to_have_text("0.000 (raw 0.000)")
    expect(page.locator("input[name=log]")).to_be_disabled()  # zero has no logarithm
    record(db, 2, loss=math.nan)
    expect(reading(page)).to_have_text("not a number (raw not a number)")
    record(db, 3, loss=0.0)
    expect(reading(page)).to_have_text("0.000 (raw 0.000)")


def test_the_axis_and_the_smoothing_are_kept_in_the_address(
    page: Page, db: Session, of: Experiment
) -> None:
    record(db, 1, loss=1.0)
    record(db, 2, loss=2.0)
    page.goto(f"/experiments/{of.id}?smooth=0.5")
    # 0.5 * 1 and then half of that plus 0.5 * 2, over the weight gathered: 1.25 / 0.75
    expect(reading(page)).to_have_text("1.667 (raw 2.000)")
    page.locator("input[name=x][value=tokens] + span").click()
    page.locator("input[name=log]").check()
    expect(page).to_have_url(re.compile(r"\?smooth=0\.5&x=tokens&log=1$"))
    page.locator("[data-toggle]").last.uncheck()
    expect(page).to_have_url(re.compile(f"&off={'b' * 12}$"))
    page.reload()
    expect(page.locator("[data-toggle]").last).not_to_be_checked()
    expect(page.locator("[data-toggle]").first).to_be_checked()
    expect(page.locator("input[name=x][value=tokens]")).to_be_checked()
    expect(page.locator("input[name=log]")).to_be_checked()


def test_when_a_run_ends_its_panel_and_the_comparison_follow(
    page: Page, db: Session, of: Experiment
) -> None:
    record(db, 1)
    page.goto(f"/experiments/{of.id}")
    expect(page.locator("#comparison")).to_contain_text("Nothing to compare yet")
    page.locator("#pause-" + "a" * 12).focus()
    scores = {"metrics": {"accuracy": 0.75}, "primary": "accuracy", "num_test": 15}
    baselines.store_answers(
        db, "a" * 12, [Given(row, HOSTILE, 1.0, 1.0) for row in of.split["test"]]
    )
    runs.finish(db, "a" * 12, 1, scores=scores)
    expect(page.locator("#comparison")).to_contain_text("75.0 %")
    expect(page.locator("#answers")).to_contain_text(HOSTILE)
    expect(page.locator("#run-" + "a" * 12)).to_contain_text("Done")
    expect(page.locator("#pause-" + "a" * 12)).to_have_count(0)
    expect(page.locator("#said")).to_have_text("LoRA: Done")
    expect(page.locator("#run-" + "a" * 12 + "-title")).to_be_focused()
    page.locator("#cancel-" + "b" * 12).click()
    expect(page.locator("#live")).to_have_text("All runs have ended")
    page.locator("#retry-" + "b" * 12).click()
    page.wait_for_url(re.compile("#run-"))
    expect(page.locator("[data-panel]")).to_have_count(3)
    expect(page.locator("#live")).to_have_text("Live")


def test_the_form_adapts_previews_and_keeps_the_keyboard(page: Page, db: Session) -> None:
    prompts.formatter.cache_clear()
    lengths._counted.cache_clear()
    base = factories.base_model(db)
    tiny.tokenizer(storage.base_model_folder(base.id))
    factories.dataset(db, [(HOSTILE, label) for label in ("yes", "no") * 30])
    page.goto("/experiments/new")
    expect(page.locator("#preview")).to_contain_text(f"{HOSTILE}")
    page.locator("#template").fill("Is it so? {{input}}")
    expect(page.locator("#preview")).to_contain_text(f"Is it so? {HOSTILE}<|im_end|>")
    expect(page.locator("#template")).to_be_focused()
    page.locator(".method-lora summary", has_text="Parameters").click()
    page.locator("#lora-batch_size").fill("5")
    expect(page.locator("#lora-pace")).to_have_text("5 examples an update, 15 updates in all")
    page.locator("#task").focus()
    page.locator("#task").select_option("summarization")
    expect(page.locator("#labels")).to_have_count(0)
    expect(page.locator("#template")).to_have_value("Is it so? {{input}}")  # the person's own
    expect(page.locator("#task")).to_be_focused()
    page.locator("#name").fill("")
    page.get_by_role("button", name="Start tuning").click()
    expect(page.locator("#problems")).to_be_focused()
    page.locator("#problems a").click()
    expect(page.locator("#name")).to_have_attribute("aria-invalid", "true")
    page.locator("#name").fill(HOSTILE)
    page.get_by_role("button", name="Start tuning").click()
    expect(page.locator("h1")).to_have_text(HOSTILE)


def test_answers_are_written_side_by_side_to_the_last_blank(
    page: Page, db: Session, of: Experiment
) -> None:
    tuned: Run = factories.tuned(db, of, method="qlora")
    page.goto(f"/playground?experiment={of.id}")
    page.locator("#input").fill("Where?")
    page.keyboard.press("Control+Enter")
    columns = page.locator("[data-completion]")
    expect(columns).to_have_count(2)
    expect(columns.first).to_contain_text("Waiting for a generating worker")
    base, other = completions.claim_ask(db, "w1")
    assert (base.run_id, other.run_id) == (None, tuned.id)
    expect(columns.first).to_contain_text("Loading the model")
    texts = [" A", " A\n\t ", f" A\n\t {HOSTILE}  é😀\n"]
    for text in texts:
        completions.write(db, base, text=text, num_tokens=3, tokens_per_second=9.0)
        expect(columns.first.locator("[data-part=text]")).to_have_js_property("textContent", text)
    completions.end(db, base)
    expect(columns.first).to_contain_text("9.0 tokens/s")
    page.locator("[data-stop] button").click()
    expect(columns.last).to_contain_text("Stopping")
    completions.end(db, other)
    expect(columns.last).to_contain_text("Stopped")
    expect(page.locator("[data-stop]")).to_be_hidden()
    expect(page.locator("#recent")).to_contain_text("Where?")
    page.locator("#input").fill(" ")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#problems")).to_be_focused()
    expect(page.locator("#input")).to_have_value(" ")


# Keeps what would be shown, and shows it all the same; a page can be told that nobody sees it.
NOTIFIED = """
window.told = [];
window.Notification = class extends Notification {
  constructor(title, options) { super(title, options); window.told.push([title, options.body]); }
};
window.hide = (hidden) => {
  Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
};
"""


def test_a_person_who_asked_for_it_is_told_when_the_runs_have_ended(
    page: Page, db: Session, of: Experiment
) -> None:
    page.context.grant_permissions(["notifications"])
    page.add_init_script(NOTIFIED)
    page.goto(f"/experiments/{of.id}")
    button = page.get_by_role("button", name="Tell me when it ends")
    expect(button).to_have_attribute("aria-pressed", "false")
    expect(page.locator("#live")).to_have_text("Live")
    button.click()
    expect(button).to_have_attribute("aria-pressed", "true")
    page.reload()
    expect(button).to_have_attribute("aria-pressed", "true")  # remembered
    expect(page.locator("#live")).to_have_text("Live")
    page.evaluate("hide(true)")  # the stream goes on all the same
    runs.cancel(db, "b" * 12)
    runs.finish(db, "a" * 12, 1)
    expect(button).to_have_count(0)
    ((title, body),) = page.evaluate("told")
    assert title == HOSTILE
    assert body == "LoRA: Done\nFull fine tuning: Cancelled"
    page.reload()
    expect(page.locator("#live")).to_have_text("All runs have ended")
    page.wait_for_timeout(300)
    assert page.evaluate("told") == []  # what had ended before is no news


def test_nobody_is_told_who_did_not_ask(page: Page, db: Session, of: Experiment) -> None:
    page.context.grant_permissions(["notifications"])
    page.add_init_script(NOTIFIED)
    page.goto(f"/experiments/{of.id}")
    button = page.get_by_role("button", name="Tell me when it ends")
    for pressed in ("true", "false"):
        button.click()
        expect(button).to_have_attribute("aria-pressed", pressed)
    page.evaluate("hide(true)")  # gives its connection back
    record(db, 1)
    page.wait_for_timeout(500)
    expect(reading(page)).not_to_contain_text("raw")
    page.evaluate("hide(false)")
    expect(reading(page)).to_contain_text("raw")
    runs.cancel(db, "b" * 12)
    runs.finish(db, "a" * 12, 1)
    expect(page.locator("#live")).to_have_text("All runs have ended")
    assert page.evaluate("told") == []


def test_a_browser_that_refuses_is_explained(page: Page, of: Experiment) -> None:
    page.goto(f"/experiments/{of.id}")
    page.context.clear_permissions()
    page.evaluate("Notification.requestPermission = async () => 'denied'")
    page.get_by_role("button", name="Tell me when it ends").click()
    expect(page.locator("#status")).to_contain_text("Allow notifications")
