"""The explorer of answers: who was right, in which order, what differs by word, and the files."""

import csv
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event
from sqlalchemy.orm import Session

from app import database, experiments
from app.comparison import baselines, explorer
from app.comparison.baselines import Given
from app.comparison.explorer import Asked
from app.tables import Experiment, Run
from app.web import wordmarks
from tests import factories, web

PLAIN = Asked("all", "", "", 1.0, "", "row")
SCORED = {"metrics": {"accuracy": 0.5}, "primary": "accuracy"}
FIGURES = {"precision": "bfloat16"}


@pytest.fixture
def browser(db: Session) -> TestClient:
    return web.client()


def _answers(db: Session, owner: str, of: Experiment, scores: list[float], text: str) -> None:
    rows = zip(of.split["test"], scores, strict=True)
    found = [Given(row, f"{text} {n}", score, n / 10) for n, (row, score) in enumerate(rows)]
    baselines.store_answers(db, owner, found)


def _base(db: Session, of: Experiment, scores: list[float], text: str = "base says") -> None:
    baselines.keep(db, of, "bfloat16", scores={"metrics": {"accuracy": 0.1}, "test_loss": 1.0})
    _answers(db, baselines.key(of, "bfloat16"), of, scores, text)


def _run(db: Session, of: Experiment, scores: list[float], text: str, **changes: object) -> Run:
    run = factories.tuned(db, of, scores=SCORED, figures=FIGURES, **changes)
    _answers(db, run.id, of, scores, text)
    return run


Four = tuple[Experiment, Run, Run]


@pytest.fixture
def four(any_db: Session) -> Four:
    """Four examples: the base model is right in the first two, LoRA and full in others."""
    data = factories.dataset(any_db, [(f"question {n}", f"label {n}") for n in range(20)])
    split = {"train": [0], "validation": [1], "test": [10, 11, 12, 13]}
    of = factories.experiment(any_db, data=data, split=split)
    lora = _run(any_db, of, [1, 1, 0, 0], "lora says")
    full = _run(any_db, of, [1, 0, 1, 0], "full says", method="full")
    _base(any_db, experiments.get(any_db, of.id), [1, 1, 0, 0])
    return of, lora, full


def _rows(db: Session, of: Experiment, **asked: object) -> list[int]:
    found = experiments.get(db, of.id)
    models = explorer.models(db, found)
    rows, total = explorer.find(db, found, models, PLAIN._replace(**asked))
    assert total == len(rows)
    return rows


# --- Which examples, in which order -----------------------------------------------------------


def test_filters(any_db: Session, four: Four) -> None:
    of, lora, full = four
    assert _rows(any_db, of) == [10, 11, 12, 13]
    assert _rows(any_db, of, show="all_right") == [10]
    assert _rows(any_db, of, show="all_wrong") == [13]
    assert _rows(any_db, of, show="lost") == [11]
    assert _rows(any_db, of, show="pair", x=lora.id, y=full.id) == [11]
    assert _rows(any_db, of, show="pair", x=full.id, y=lora.id) == [12]
    assert _rows(any_db, of, show="pair", x=full.id, y="base") == [12]
    assert _rows(any_db, of, show="better", x=lora.id, y=full.id) == [11]
    assert _rows(any_db, of, show="pair", x=lora.id, y=lora.id) == []


def test_the_threshold_says_what_is_right(any_db: Session) -> None:
    data = factories.dataset(any_db)
    split = {"train": [0], "validation": [1], "test": [10, 11, 12]}
    of = factories.experiment(any_db, data=data, split=split, task="generation", labels=[])
    one = _run(any_db, of, [0.5, 0.49, 0.9], "one")
    other = _run(any_db, of, [0.4, 0.48, 0.95], "other", params={"rank": 2})
    pair = {"x": one.id, "y": other.id}
    assert explorer.threshold("generation") == 0.5
    assert _rows(any_db, of, show="pair", threshold=0.5, **pair) == [10]
    assert _rows(any_db, of, show="pair", threshold=0.485, **pair) == [10, 11]
    assert _rows(any_db, of, show="better", threshold=0.5, **pair) == [10, 11]
    assert _rows(any_db, of, show="better", sort="difference", **pair) == [10, 11]
    assert _rows(any_db, of, sort="difference") == [10, 12, 11]


def test_orders(any_db: Session, four: Four) -> None:
    of, *_ = four
    assert _rows(any_db, of, sort="loss") == [13, 12, 11, 10]
    assert _rows(any_db, of, sort="difference") == [11, 12, 10, 13]


def test_text_is_looked_for_in_example_and_answers(any_db: Session, four: Four) -> None:
    of, *_ = four
    assert _rows(any_db, of, text="QUESTION 11") == [11]
    assert _rows(any_db, of, text="label 12") == [12]
    assert _rows(any_db, of, text="Full says 3") == [13]
    assert _rows(any_db, of, text="says") == [10, 11, 12, 13]
    assert _rows(any_db, of, text="%") == []  # no pattern
    assert _rows(any_db, of, text="label", show="all_wrong") == [13]


@contextmanager
def _counted() -> Iterator[list[str]]:
    told: list[str] = []

    def tell(_c: object, _cursor: object, statement: str, *_rest: object) -> None:
        told.append(statement)

    event.listen(database.engine(), "before_cursor_execute", tell)
    yield told
    event.remove(database.engine(), "before_cursor_execute", tell)


def test_a_page_of_many_examples_reads_a_page(browser: TestClient, db: Session) -> None:
    data = factories.dataset(db, count=2500)
    split = {"train": [0], "validation": [1], "test": list(range(500, 2500))}
    of = factories.experiment(db, data=data, split=split)
    for rank in (1, 2, 3, 4, 5):
        scores = [float(n % (rank + 1) == 0) for n in range(2000)]
        _run(db, of, scores, f"rank {rank} says", params={"rank": rank})
    counts = set()
    for query in ("", "show=all_wrong", "show=pair&sort=difference", "q=says+19", "page=100"):
        with _counted() as told:
            page = browser.get(f"/experiments/{of.id}/answers?{query}").text
        assert page.count("data-step") == 20, query
        read = [one for one in told if "answer.text" in one and "HAVING" not in one]
        assert len(read) == 1
        counts.add(len([one for one in told if one.startswith("SELECT")]))
    assert max(counts) <= 9
    assert "2,000 examples, 1,981 to 2,000" in page
    past = browser.get(f"/experiments/{of.id}/answers?page=101").text
    assert "100 of 100" in past


# --- On the screen ----------------------------------------------------------------------------


def _text(page: str) -> str:
    return " ".join(unescape(re.sub("<[^>]+>", " ", page)).split())


def test_the_page_keeps_its_state_in_the_address(any_db: Session, four: Four) -> None:
    of, lora, full = four
    query = f"show=pair&x={lora.id}&y={full.id}&least=1&q=question&sort=loss"
    any_db.commit()
    browser = web.client()
    page = browser.get(f"/experiments/{of.id}/answers?{query}").text
    assert page.count("data-step") == 1
    assert "Row 12 of the dataset" in page
    assert f'<option value="{lora.id}" selected>LoRA' in page
    assert 'value="pair" selected' in page
    assert 'value="question"' in page
    assert f"answers.csv?{query}".replace("&", "&amp;") in page
    assert "wrong" in page
    strange = browser.get(f"/experiments/{of.id}/answers?show=x&least=nan&x=1&sort=_").text
    assert strange.count("data-step") == 4
    assert "No example is like that" in browser.get(f"/experiments/{of.id}/answers?q=zzz").text
    assert f"/experiments/{of.id}/answers" in browser.get(f"/experiments/{of.id}").text


def test_without_answers_the_page_says_so(browser: TestClient, db: Session) -> None:
    of = factories.experiment(db)
    assert "No answers yet" in browser.get(f"/experiments/{of.id}/answers").text
    assert browser.get("/experiments/none/answers").status_code == 404
    assert browser.get("/experiments/none/answers.csv").status_code == 404


HOSTILE = '<script>alert(1)</script> <ins onclick="x">"\'&amp;'


def test_hostile_answers_are_text(browser: TestClient, db: Session) -> None:
    data = factories.dataset(db, [(HOSTILE, f"{HOSTILE} right")] * 20, name=HOSTILE)
    split = {"train": [0], "validation": [1], "test": [10, 11]}
    of = factories.experiment(db, data=data, split=split, name=HOSTILE, task="generation")
    _run(db, of, [0.4, 0.6], HOSTILE)
    page = browser.get(f"/experiments/{of.id}/answers?q={'%3Cscript%3E'}").text
    assert page.count("data-step") == 2
    assert "<script>alert" not in page
    assert "<ins onclick" not in page
    assert "<del>right</del>" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_differences_are_marked_by_word() -> None:
    found = wordmarks.marked("the order was late today", "the parcel was late")
    assert found == [
        ("same", "the "),
        ("del", "order "),
        ("ins", "parcel "),
        ("same", "was late"),
        ("del", "today"),
    ]
    assert wordmarks.marked("same", "same") == [("same", "same")]
    assert wordmarks.marked("delivery", "refund") == [("same", "refund")]  # nothing in common
    assert wordmarks.marked("one\n\ttwo", "one\n\tthree two") == [
        ("same", "one\n\t"),
        ("ins", "three "),
        ("same", "two"),
    ]
    long = "word " * 5000
    assert wordmarks.marked("word", long) == [("same", long)]
    assert wordmarks.marked("x", "") == [("same", "")]


# --- Files ------------------------------------------------------------------------------------


def test_no_cell_of_the_file_is_a_formula(browser: TestClient, db: Session) -> None:
    bad = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "'=1", 'plain, "quoted"\nline']
    data = factories.dataset(db, [(text, text) for text in bad] * 3)
    split = {"train": [20], "validation": [21], "test": list(range(8))}
    of = factories.experiment(db, data=data, split=split)
    run = factories.tuned(db, of, scores=SCORED, figures=FIGURES)
    baselines.store_answers(db, run.id, [Given(n, text, 1.0, 0.25) for n, text in enumerate(bad)])
    response = browser.get(f"/experiments/{of.id}/answers.csv")
    assert response.headers["content-type"].startswith("text/csv")
    assert "attachment" in response.headers["content-disposition"]
    head, *rows = csv.reader(io.StringIO(response.text, newline=""))
    assert head == ["row", "input", "expected", "LoRA", "LoRA: score", "LoRA: loss"]
    assert [row[0] for row in rows] == [str(n) for n in range(1, 9)]
    for row, text in zip(rows, bad, strict=True):
        kept = text if text[0] in "'p" else f"'{text}"
        assert row[1:4] == [kept] * 3
        assert row[4:] == ["1.0", "0.25"]
        assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for cell in row)


def test_the_files_hold_the_filters_examples(any_db: Session, four: Four) -> None:
    of, lora, full = four
    any_db.commit()
    browser = web.client()
    query = f"show=pair&x={lora.id}&y={full.id}"
    lines = browser.get(f"/experiments/{of.id}/answers.jsonl?{query}").text.splitlines()
    [told] = map(json.loads, lines)
    assert (told["row"], told["input"], told["expected"]) == (12, "question 11", "label 11")
    assert [(one["name"], one["text"], one["score"]) for one in told["answers"]] == [
        ("Base model", "base says 1", 1.0),
        ("LoRA", "lora says 1", 1.0),
        ("Full fine tuning", "full says 1", 0.0),
    ]
    everything = browser.get(f"/experiments/{of.id}/answers.jsonl").text
    assert len(everything.splitlines()) == 4
    nothing = browser.get(f"/experiments/{of.id}/answers.csv?q=zzz").text
    assert len(nothing.splitlines()) == 1
