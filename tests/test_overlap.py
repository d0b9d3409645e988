"""Test examples that are trained on, too: counted, and said wherever scores are shown or planned."""

import io
import re
from html import unescape

import pytest
from fastapi.testclient import TestClient
from rich.console import Console
from sqlalchemy.orm import Session

from app import datasets, experiments, overlap, results, storage
from app.comparison import figures
from app.tables import Dataset, Experiment
from tests import answered, factories, web

SPLIT = {"train": [0, 1, 2], "validation": [3], "test": [4, 5, 6, 7]}
ROWS = [
    ("A small car", "good"),
    ("a   bad\tcar ", "bad"),
    ("Nothing", "bad"),
    ("In the validation part alone", "good"),
    ("a SMALL car", "bad"),  # in the training part but for case
    ("A bad car", "bad"),  # but for spaces
    ("In the validation part alone", "good"),
    ("New", "good"),
]
SAID = "2 of the 4 test examples stand in the training part too, with the same input"


@pytest.fixture
def browser(db: Session) -> TestClient:
    return web.client()


def _text(page: str) -> str:
    return " ".join(unescape(re.sub("<[^>]+>", " ", page)).split())


def _doubled(db: Session) -> Dataset:
    """Every input stands in it three times."""
    return factories.dataset(db, [(f"Message {n // 3}", "refund") for n in range(240)])


def test_inputs_count_whatever_their_case_and_spaces(db: Session) -> None:
    data = factories.dataset(db, ROWS)
    assert overlap.count(data, SPLIT) == 2
    assert overlap.count(data, SPLIT | {"test": [7]}) == 0
    gone = factories.dataset(db, ROWS)
    storage.remove(storage.dataset_file(gone.id))
    assert overlap.count(gone, SPLIT) is None


def test_they_are_said_in_a_sentence() -> None:
    assert overlap.words(1234, 2000).startswith("1,234 of the 2,000 test examples stand in")
    assert overlap.words(1, 50).startswith("1 of the 50 test examples stands in")
    assert overlap.words(0, 50) == overlap.words(None, 50) == ""


def test_the_experiment_the_report_and_the_json_say_it(db: Session, browser: TestClient) -> None:
    of = factories.experiment(db, data=factories.dataset(db, ROWS), split=SPLIT)
    factories.run(db, of)
    clean = answered.experiment(db, num_test=60)
    db.commit()
    for path in ("", "/comparison", "/report"):  # before anything is scored, too
        assert SAID in _text(browser.get(f"/experiments/{of.id}{path}").text)
        assert "training part too" not in browser.get(f"/experiments/{clean.id}{path}").text
    for one, number in ((of, 2), (clean, 0)):
        told = browser.get(f"/api/experiments/{one.id}/comparison").json()
        assert told["num_trained_on"] == number


def test_the_form_says_it_before_anything_starts(db: Session, browser: TestClient) -> None:
    data, base = _doubled(db), factories.base_model(db)
    page = _text(browser.get(f"/experiments/new?dataset={data.id}&base={base.id}").text)
    found = overlap.count(data, datasets.split(240, 1))
    assert found
    assert f"{found} of the 50 test examples stand in the training part too" in page
    sent = {"dataset_id": data.id, "base_model_id": base.id, "task": "generation", "seed": "5"}
    other = overlap.count(data, datasets.split(240, 5))
    assert other not in (None, found)
    fresh = browser.post("/experiments/preview", data=sent).text
    assert (
        f'id="overlap" hx-swap-oob="true"><p class="notice warn under">{other} of the 50' in fresh
    )
    for seed in ("", "x", "9" * 5000):
        wrong = browser.post("/experiments/preview", data=sent | {"seed": seed})
        assert "training part too" not in wrong.text
        assert wrong.status_code == 200


def test_the_command_line_says_it_under_its_table(db: Session) -> None:
    def said(of: Experiment) -> str:
        found = experiments.get(db, of.id)
        text = io.StringIO()
        table = results.Result(found, figures.compare(db, found), []).table()
        Console(file=text, width=200).print(table)
        return " ".join(text.getvalue().split())

    of = factories.experiment(db, data=factories.dataset(db, ROWS), split=SPLIT)
    assert "Always the commonest label: 50.0 % 2 of the 4 test examples" in said(of)
    assert "training part" not in said(answered.experiment(db, num_test=60))
