"""The forecast on the form, on a run's page and for programs, and what does not fit being held back."""

import re
import time
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from playwright.sync_api import Browser, expect
from sqlalchemy.orm import Session

from app import database, experiments, lengths, prompts, rehearsals, storage, workers
from app.methods import METHODS
from app.tables import BaseModel, Dataset, Rehearsal, Run, Worker
from app.web import outlooks
from tests import factories, tiny, web
from tests.test_forecast import SMOLLM2
from tests.test_web_browser import opened

Ready = tuple[BaseModel, Dataset]
MEASURED = {
    "peak_memory_mb": 2345.0,
    "step_seconds": 3.2,
    "steps": 2,
    "examples": [[60, 4]] * 8,
    "shared": 20,
    "device": "CPU",
    "device_kind": "cpu",
    "precision": "bfloat16",
    "token_budget": 1024,
}


@pytest.fixture
def browser(db: Session) -> TestClient:
    return web.client()


@pytest.fixture
def ready(db: Session) -> Ready:
    lengths._counted.cache_clear()
    prompts.formatter.cache_clear()
    base_model = factories.base_model(db, shapes=SMOLLM2)
    tiny.tokenizer(storage.base_model_folder(base_model.id))
    return base_model, factories.dataset(db)


def worker(db: Session, memory_mb: float, device: str = "Test CPU", num_devices: int = 1) -> None:
    made = Worker(id=device, kind="tuner", host="here", pid=1, device=device)
    made.memory_mb, made.num_devices = memory_mb, num_devices
    workers.beat(db, made)
    made.beat_at = time.time() + 600  # a slow test does not lose it
    db.merge(made)
    db.commit()


def _form(ready: Ready, **changes: Any) -> dict[str, Any]:
    given = {
        "name": "First",
        "base_model_id": ready[0].id,
        "dataset_id": ready[1].id,
        "filled_for": ready[1].id,
        "task": "classification",
        "labels": "delivery\r\nrefund\r\naccount",
        "template": "Labels: {{labels}}\r\n{{input}}",
        "seed": "1",
        "methods": ["lora", "full"],
    }
    return given | changes


def _cards(page: str) -> dict[str, str]:
    """The forecast of each method, as text without tags."""
    found = {}
    for key in METHODS:
        part = page.split(f'id="{key}-forecast"')[1]
        part = part.split('<p class="fig pace"')[0].split("<summary>How")[0]
        found[key] = re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", part)))
    return found


def _stored(key: str) -> Rehearsal | None:
    with database.reading() as db:
        return rehearsals.find(db, key)


def test_the_form_shows_each_part_against_the_machine(
    browser: TestClient, db: Session, ready: Ready
) -> None:
    before = _cards(browser.get("/experiments/new").text)
    assert all("no tuning worker is alive to compare with" in card for card in before.values())
    assert all("Not known" in card for card in before.values())
    worker(db, 16_000.0)
    cards = _cards(browser.get("/experiments/new").text)
    for card in cards.values():
        assert "Fits" in card
        assert "of 16.0 GB , Test CPU" in card
        for label in outlooks.PARTS.values():
            assert re.search(rf"{label} [\d.]+ [MG]B", card), (label, card)
        assert re.search(r"Time (up to )?[\d]+", card)
        assert "while it runs" in card
        assert "Time: the model's shapes alone, a wide guess." in card
        assert "Rehearse" in card
    assert "Optimizer 1.0 GB" in cards["full"]
    assert 'name="override"' not in browser.get("/experiments/new").text


def test_what_does_not_fit_says_the_change_and_waits_for_a_deliberate_word(
    browser: TestClient, db: Session, ready: Ready
) -> None:
    worker(db, 2500.0)
    page = browser.post("/experiments/new", data=_form(ready)).text
    card = _cards(page)["full"]
    assert "Does not fit" in card
    assert "Test CPU has 2.5 GB" in card
    assert "QLoRA instead makes it fit: about" in card
    assert "Start Full fine tuning although it does not fit" in page
    refused = browser.post("/experiments", data=_form(ready))
    assert refused.status_code == 422
    text = unescape(refused.text)
    assert "Nothing was started, because this fits no tuning worker that is alive." in text
    assert '<a href="#override">' in text
    assert 'id="override"' in text
    with database.reading() as read:
        assert experiments.all(read) == []
    done = browser.post("/experiments", data=_form(ready, override="on"))
    assert done.status_code == 303
    with database.reading() as read:
        (made,) = experiments.all(read)
        told = {run.method: run.forecast.get("override") for run in made.runs}
    assert told == {"lora": None, "full": True}


def test_a_tight_one_says_so_and_starts(browser: TestClient, db: Session, ready: Ready) -> None:
    worker(db, 16_000.0)
    asked = {"methods": ["full"]}
    card = browser.post("/experiments/new", data=_form(ready, **asked)).text
    need = re.search(r'forecast-need">([\d.]+) GB', card.split('id="full-forecast"')[1])
    assert need
    worker(db, float(need[1]) * 1000 * 1.07)
    assert "Tight" in _cards(browser.post("/experiments/new", data=_form(ready)).text)["full"]
    assert browser.post("/experiments", data=_form(ready, **asked)).status_code == 303


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("Test CPU", "of 24.1 GB , Test CPU"),
        ("GPU Test", "of 24.1 GB on each of 2, GPU Test"),
    ],
)
def test_memory_of_each_device_is_told_of_gpus_alone(
    browser: TestClient, db: Session, ready: Ready, device: str, words: str
) -> None:
    worker(db, 24_100.0, device, 2)
    assert words in _cards(browser.get("/experiments/new").text)["lora"]


def test_each_machine_has_its_own_verdict(browser: TestClient, db: Session, ready: Ready) -> None:
    worker(db, 2500.0)
    worker(db, 80_000.0, "GPU <b>large</b>")
    page = browser.get("/experiments/new").text
    assert "<b>large" not in page
    full = _cards(page)["full"]
    assert "of 80.0 GB , GPU <b>large</b>" in full
    assert "Test CPU, 2.5 GB Does not fit" in full
    assert 'name="override"' not in page


def test_it_follows_the_parameters_out_of_band(browser: TestClient, ready: Ready) -> None:
    def need(**changes: str) -> float:
        page = browser.post("/experiments/preview", data=_form(ready, **changes)).text
        part = page.split('id="lora-forecast" hx-swap-oob="true"')[1]
        found = re.search(r'forecast-need">([\d.]+) GB', part)
        assert found
        return float(found[1])

    assert need(**{"lora.batch_size": "16"}) > need(**{"lora.batch_size": "2"})
    wrong = browser.post("/experiments/preview", data=_form(ready, **{"lora.rank": "x"})).text
    assert "Told again once the parameters are right." in _cards(wrong)["lora"]
    assert 'id="override-line" hx-swap-oob="true"' in wrong
    no = browser.post("/experiments/preview", data=_form(ready, template="No place")).text
    assert "The template needs {{input}}" in _cards(no)["lora"]


def test_a_learning_rate_far_from_what_is_usual_is_doubted_not_refused(
    browser: TestClient, ready: Ready
) -> None:
    sent = _form(ready, **{"lora.learning_rate": "0.3", "full.learning_rate": "0.0001"})
    cards = _cards(browser.post("/experiments/new", data=sent).text)
    doubt = "A learning rate of 0.3 is far too high: training may diverge. For LoRA, 0.00005 to 0.002 is usual."
    assert doubt in cards["lora"]
    assert "far too" not in cards["full"]
    low = METHODS["prompt_tuning"].schema(learning_rate=1e-5)
    assert "far too low: little may be learned" in METHODS["prompt_tuning"].doubt(low)
    assert not any(method.doubt(method.schema()) for method in METHODS.values())


def test_the_error_of_the_last_runs_is_shown(
    browser: TestClient, db: Session, ready: Ready
) -> None:
    browser.post("/experiments", data=_form(ready, methods=["lora"]))
    with database.session() as write:
        (made,) = experiments.all(write)
        (run,) = made.runs
        told = run.forecast
        for share in (0.9, 1.25):
            figures = {"peak_memory_mb": share * told["memory_mb"], "device_kind": "cpu"}
            of = {"forecast": told, "figures": figures, "train_seconds": told["train_seconds"]}
            now = time.time()
            seconds = share * told["seconds"]
            kept = factories.tuned(write, made, **of, attempt=1, started_at=now - seconds)
            write.get(Run, kept.id).finished_at = now  # type: ignore[union-attr]
            write.commit()
    card = _cards(browser.get("/experiments/new").text)["lora"]
    assert "last 2 runs: memory -20 to +11 %, time -20 to +11 %" in card
    assert "Memory: the last runs here. Time: the last runs here." in card
    page = unescape(browser.get(f"/runs/{kept.id}").text)
    assert "Forecast and measured" in page
    assert re.search(r"Peak memory</th>.*?-20 %", page, re.DOTALL)
    shown = browser.get(f"/api/runs/{kept.id}").json()["forecast"]
    assert shown["memory_mb"] == told["memory_mb"]


def test_rehearsing_from_the_form(browser: TestClient, db: Session, ready: Ready) -> None:
    sent = _form(ready, **{"lora.rank": "4", "lora.batch_size": "8"})
    page = browser.post("/experiments/rehearse", data=sent | {"rehearse": "lora"}).text
    assert "waits until a tuning worker is free" in _cards(page)["lora"]
    assert 'hx-select="#lora-forecast" hx-include="#draft"' in page
    assert "Rehearse" in _cards(page)["full"]
    assert re.search(r'name="name" value="First"', page)
    with database.session() as write:
        asked = rehearsals.claim(write, "w1")
        assert asked
        assert asked.params["rank"] == 4
        rehearsals.progress(write, asked.key, "Training 2 steps")
        assert (
            "Training 2 steps…" in _cards(browser.post("/experiments/new", data=sent).text)["lora"]
        )
        rehearsals.finish(write, asked.key, MEASURED)
    card = _cards(browser.post("/experiments/new", data=sent).text)["lora"]
    assert "Rehearsed: 2.3 GB and 3.2 s for a step" in card
    assert "Memory: the rehearsal of this configuration." in card
    assert "Rehearse again" in card
    other = _cards(browser.post("/experiments/new", data=sent | {"lora.rank": "5"}).text)["lora"]
    assert "Two steps on the longest batch" in other
    browser.post("/experiments/rehearse", data=sent | {"rehearse": "lora"})
    with database.session() as write:
        rehearsals.claim(write, "w1")
        rehearsals.fail(write, asked.key, "The machine <b>had</b> no memory.")
    page = browser.post("/experiments/new", data=sent).text
    assert "The machine &lt;b&gt;had&lt;/b&gt; no memory." in page


@pytest.mark.parametrize(
    "changes", [{"rehearse": "none"}, {"template": "No place"}, {"lora.rank": "x"}]
)
def test_what_cannot_be_rehearsed_is_not(
    browser: TestClient, db: Session, ready: Ready, changes: dict[str, str]
) -> None:
    sent = _form(ready) | {"rehearse": "lora"} | changes
    assert browser.post("/experiments/rehearse", data=sent).status_code == 200
    with database.session() as write:
        assert rehearsals.claim(write, "w1") is None


# --- For programs -------------------------------------------------------------------------------


def test_programs_ask_the_same_questions(browser: TestClient, db: Session, ready: Ready) -> None:
    worker(db, 2500.0)
    asked: dict[str, Any] = {
        "name": "By program",
        "base_model_id": ready[0].id,
        "dataset_id": ready[1].id,
        "task": "classification",
        "methods": {"lora": {"rank": 4}, "full": {}},
    }
    told = browser.post("/api/experiments/forecast", json=asked).json()
    assert told["full"]["verdict"] == "too-large"
    assert told["full"]["advice"].startswith("QLoRA instead makes it fit")
    assert told["lora"]["verdict"] in {"fits", "tight"}
    assert told["lora"]["rehearsal"] is None
    assert told["lora"]["forecast"]["seconds_low"] < told["lora"]["forecast"]["seconds_high"]
    done = browser.post("/api/experiments/rehearse", json=asked)
    assert done.status_code == 202
    assert done.json()["lora"]["rehearsal"]["state"] == "waiting"
    refused = browser.post("/api/experiments", json=asked)
    assert refused.status_code == 422
    assert refused.json()["error"]["field"] == "override"
    assert browser.post("/api/experiments", json=asked | {"override": True}).status_code == 201
    wrong = browser.post(
        "/api/experiments/forecast", json=asked | {"methods": {"lora": {"rank": 0}}}
    )
    assert wrong.status_code == 422


# --- In a real browser --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with web.chromium() as one:
        yield one


@pytest.fixture
def address(home: Path) -> Iterator[str]:
    with web.served() as served:
        yield served


@pytest.mark.browser
def test_the_forecast_follows_the_form_and_the_rehearsal(
    chromium: Browser, address: str, db: Session, ready: Ready
) -> None:
    worker(db, 2500.0)
    context = chromium.new_context(base_url=address)
    page, complaints = opened(context, address)
    page.goto("/experiments/new")
    full, lora = page.locator("#full-forecast"), page.locator("#lora-forecast")
    expect(full).to_contain_text("Does not fit")
    expect(page.locator("#override-line")).to_contain_text("Start Full fine tuning although")
    page.uncheck("#use-full")
    expect(page.locator("#override-line")).not_to_contain_text("although")
    before = lora.locator(".forecast-need").inner_text()
    page.locator("[aria-labelledby=lora-title] summary", has_text="Parameters").click()
    page.fill("#lora-batch_size", "16")
    expect(lora.locator(".forecast-need")).not_to_have_text(before)
    expect(page.locator("#lora-batch_size")).to_be_focused()
    lora.get_by_role("button", name="Rehearse LoRA").click()
    expect(lora.get_by_role("status")).to_contain_text("waits until a tuning worker is free")
    asked = rehearsals.claim(db, "w1")
    assert asked
    assert asked.params["batch_size"] == 16
    rehearsals.progress(db, asked.key, "Training 2 steps on the 16 longest examples")
    expect(lora.get_by_role("status")).to_contain_text("Training 2 steps")
    rehearsals.finish(db, asked.key, MEASURED)
    expect(lora).to_contain_text("Rehearsed: 2.3 GB")
    expect(page.locator("#lora-batch_size")).to_have_value("16")
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") == 0
    assert complaints == []
    context.close()


@pytest.mark.browser
def test_without_script_it_stands_on_the_page(
    chromium: Browser, address: str, db: Session, ready: Ready
) -> None:
    worker(db, 2500.0)
    context = chromium.new_context(base_url=address, java_script_enabled=False)
    page, _ = opened(context, address)
    page.goto("/experiments/new")
    expect(page.locator("#full-forecast")).to_contain_text("Does not fit")
    page.get_by_role("button", name="Rehearse LoRA").click()
    expect(page.locator("#lora-forecast")).to_contain_text("waits until a tuning worker is free")
    page.get_by_role("button", name="Start tuning").click()
    expect(page.locator("#problems")).to_contain_text("fits no tuning worker that is alive")
    page.check("#override")
    page.get_by_role("button", name="Start tuning").click()
    expect(page.locator("h1")).to_have_text("Messages")
    context.close()
