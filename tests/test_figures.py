"""The side-by-side: what was measured stands in its row, what was not stays empty."""

import json
from typing import Any

import pytest
from sqlalchemy.orm import Session

from app import experiments
from app.comparison import baselines, figures, intervals
from app.comparison.baselines import Given
from app.tables import Experiment, Run
from tests import factories

FIGURES = {
    "precision": "bfloat16",
    "trainable_parameters": 2_500,
    "total_parameters": 1_000_000,
    "peak_memory_mb": 812.5,
    "size_bytes": 10_240,
    "tokens_per_second": 410.0,
    "device": "A processor",
}
FORECAST = {"memory_mb": 900.0, "train_seconds": 55.0}
SCORES = {
    "metrics": {"accuracy": 0.9, "macro_f1": 0.8},
    "primary": "accuracy",
    "test_loss": 0.31,
    "num_test": 15,
    "intervals": {"macro_f1": [0.6, 0.9], "test_loss": [0.2, 0.4]},
    "first_token_seconds": 0.2,
    "answer_tokens_per_second": 31.5,
}


def _compare(db: Session, of: Experiment) -> figures.Comparison:
    return figures.compare(db, experiments.get(db, of.id))


def _finished(db: Session, of: Experiment, **changes: Any) -> Run:
    given = {"best_loss": 0.25, "train_seconds": 61.5, "figures": FIGURES, "scores": SCORES}
    given["forecast"] = FORECAST
    return factories.tuned(db, of, **given | changes)


def test_before_anything_was_measured(db: Session) -> None:
    of = factories.experiment(db)
    run = factories.run(db, of)
    found = _compare(db, of)
    assert found.metric == "accuracy"
    assert [row.key for row in found.rows] == ["base", run.id]
    for row in found.rows:
        assert (row.score, row.metrics, row.validation_loss, row.test_loss) == (
            None,
            {},
            None,
            None,
        )
        assert (row.train_seconds, row.peak_memory_mb, row.size_bytes) == (None, None, None)
    assert [row.state for row in found.rows] == ["", "queued"]


def test_what_was_measured_stands_in_its_row(any_db: Session) -> None:
    of = factories.experiment(any_db)
    run = _finished(any_db, of)
    row = _compare(any_db, of).rows[1]
    assert row._asdict() == {
        "key": run.id,
        "label": "LoRA",
        "method": "lora",
        "state": "succeeded",
        "score": 0.9,
        "interval": intervals.wilson(13.5, 15),
        "metrics": {"accuracy": 0.9, "macro_f1": 0.8},
        "intervals": {
            "accuracy": intervals.wilson(13.5, 15),
            "macro_f1": (0.6, 0.9),
            "test_loss": (0.2, 0.4),
        },
        "validation_loss": 0.25,
        "test_loss": 0.31,
        "perplexity": pytest.approx(1.3634, abs=1e-4),
        "train_seconds": 61.5,
        "peak_memory_mb": 812.5,
        "tokens_per_second": 410.0,
        "energy_wh": None,
        "first_token_seconds": 0.2,
        "answer_tokens_per_second": 31.5,
        "trainable": 2_500,
        "total": 1_000_000,
        "share": 0.0025,
        "size_bytes": 10_240,
        "device": "A processor",
        "forecast": {"memory_mb": 900.0, "train_seconds": 55.0},
    }


def test_the_base_models_row(any_db: Session) -> None:
    of = factories.experiment(any_db)
    _finished(any_db, of)
    assert _compare(any_db, of).rows[0].score is None
    other = SCORES | {"metrics": {"accuracy": 0.4}, "test_loss": 3.0}
    baselines.keep(any_db, of, "float32", validation_loss=9.9, scores=SCORES)
    assert _compare(any_db, of).rows[0].score is None  # measured in another precision
    baselines.keep(any_db, of, "bfloat16", validation_loss=2.5, scores=other)
    row = _compare(any_db, of).rows[0]
    assert (row.score, row.validation_loss, row.test_loss, row.state) == (
        0.4,
        2.5,
        3.0,
        "succeeded",
    )
    assert (row.trainable, row.share, row.total) == (0, 0.0, 1_000_000)


def test_the_base_models_loss_is_shown_before_its_scores(db: Session) -> None:
    of = factories.experiment(db)
    factories.run(db, of, state="running", figures={"precision": "bfloat16"})
    baselines.keep(db, of, "bfloat16", validation_loss=2.5)
    row = _compare(db, of).rows[0]
    assert (row.validation_loss, row.score, row.state) == (2.5, None, "")


@pytest.mark.parametrize(
    "changes",
    [
        {"template": "Other: {{input}}"},
        {"labels": ["delivery", "refund"]},
        {"split": {"train": [0], "validation": [1], "test": [2]}},
        {"task": "generation"},
    ],
)
def test_experiments_share_the_base_models_figures_only_if_they_ask_the_same(
    db: Session, changes: dict[str, Any]
) -> None:
    of = factories.experiment(db)
    baselines.keep(db, of, "bfloat16", validation_loss=2.5)
    same = factories.experiment(db, of.base_model, of.dataset, name="Again", seed=9)
    other = factories.experiment(db, of.base_model, of.dataset, **changes)
    for one in (same, other):
        factories.run(db, one, figures={"precision": "bfloat16"})
    assert _compare(db, same).rows[0].validation_loss == 2.5
    assert _compare(db, other).rows[0].validation_loss is None


def test_rows_stand_in_the_order_of_the_methods(db: Session) -> None:
    of = factories.experiment(db)
    for place, method in enumerate(("full", "qlora", "lora", "prompt_tuning", "lora")):
        factories.run(db, of, method=method, position=float(place))
    found = [row.method for row in _compare(db, of).rows]
    assert found == ["base", "prompt_tuning", "lora", "lora", "qlora", "full"]


def test_always_the_commonest_label(db: Session) -> None:
    """The commonest of the training rows, scored on the test rows."""
    rows = [(f"Text {n}", "a" if n < 4 else "b") for n in range(12)]
    data = factories.dataset(db, rows)
    split = {"train": [0, 1, 4], "validation": [2], "test": [3, 5, 6, 7, 8]}
    of = factories.experiment(db, data=data, labels=["a", "b"], split=split)
    assert _compare(db, of).majority == 0.2
    assert _compare(db, of).num_test == 5
    free = factories.experiment(db, data=data, task="generation", labels=[], split=split)
    assert _compare(db, free).majority is None


def test_answers_stand_side_by_side_in_the_order_of_the_rows(any_db: Session) -> None:
    of = factories.experiment(any_db)
    full = _finished(any_db, of, method="full")
    lora = _finished(any_db, of, method="lora")
    baselines.keep(any_db, of, "bfloat16", scores=SCORES)
    test = of.split["test"]
    base_key = baselines.key(of, "bfloat16")
    for owner, text in ((base_key, "the base"), (full.id, "full"), (lora.id, "lora")):
        answers = [Given(row, f"{text} {row}", 0.5, 1.0) for row in test]
        baselines.store_answers(any_db, owner, answers[:-1] if owner == full.id else answers)
    of = experiments.get(any_db, of.id)
    found = figures.answers(any_db, of, limit=1000)
    assert [example.row for example in found] == test
    first, last = found[0], found[-1]
    assert first.input == f"Message {first.row} about my order"
    assert first.expected in factories.LABELS
    assert first.answers == [
        (f"the base {first.row}", 0.5),
        (f"lora {first.row}", 0.5),
        (f"full {first.row}", 0.5),
    ]
    assert last.answers[2] is None


def test_answers_come_in_pages(db: Session) -> None:
    of = factories.experiment(db)
    _finished(db, of)
    test = of.split["test"]
    of = experiments.get(db, of.id)
    pages = [figures.answers(db, of, start=start, limit=4) for start in range(0, len(test), 4)]
    assert [len(page) for page in pages][:-1] == [4] * (len(pages) - 1)
    assert [example.row for page in pages for example in page] == test
    assert pages[0][0].answers == [None, None]
    assert figures.answers(db, of, start=len(test)) == []


def test_it_can_be_written_as_json(db: Session) -> None:
    of = factories.experiment(db)
    _finished(db, of)
    written = json.loads(json.dumps(figures.as_dict(_compare(db, of)), allow_nan=False))
    assert written["rows"][1]["score"] == 0.9
    assert written["num_test"] == len(of.split["test"])
