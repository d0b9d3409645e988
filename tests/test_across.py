"""Runs of different experiments side by side: on shared test examples, with what else differs."""

from typing import Any

import pytest
from sqlalchemy.orm import Session

from app import runs
from app.comparison import across, baselines
from app.comparison.baselines import Given
from app.errors import Invalid
from app.tables import Dataset, Experiment, Run
from tests import factories, web
from tests.test_more_runs import _text


def _answered(db: Session, of: Experiment, right: set[int]) -> Run:
    """A run that has answered the test examples in `right` rightly."""
    share = len(right) / len(of.split["test"])
    scores = {"metrics": {"accuracy": share}, "primary": "accuracy"}
    run = factories.tuned(db, of, scores=scores, figures={"precision": "bfloat16"})
    answers = [Given(row, "x", float(row in right), 0.1) for row in of.split["test"]]
    baselines.store_answers(db, run.id, answers)
    return run


def _split(**parts: list[int]) -> dict[str, list[int]]:
    return {"train": [0, 1, 2], "validation": [3, 4], "test": [10, 11, 12, 13]} | parts


def _two(db: Session, first: dict[str, Any], second: dict[str, Any]) -> tuple[Run, Run]:
    data: Dataset = factories.dataset(db)
    base = factories.base_model(db)
    one = factories.experiment(db, base, data, name="One", split=_split(), **first)
    second.setdefault("split", _split())
    other = factories.experiment(
        db, second.pop("of", base), second.pop("data", data), name="Two", **second
    )
    return _answered(db, one, {10, 11, 12}), _answered(db, other, {11, 14})


def _shown(db: Session, *found: Run) -> across.Across:
    return across.compare(db, [runs.get(db, run.id) for run in found])


def test_one_split_needs_no_warning(any_db: Session) -> None:
    shown = _shown(any_db, *_two(any_db, {}, {}))
    assert shown.warnings == []
    assert shown.num_common == 4
    assert [line.common for line in shown.lines] == [0.75, 0.25]


def test_other_splits_are_compared_on_what_they_share(db: Session) -> None:
    split = _split(train=[5, 6, 7], test=[11, 12, 14, 15])
    shown = _shown(db, *_two(db, {}, {"split": split}))
    assert shown.num_common == 2
    assert [line.common for line in shown.lines] == [1.0, 0.5]
    [warning] = shown.warnings
    assert "2 test examples are shared" in warning


def test_nothing_shared_is_not_compared(db: Session) -> None:
    shown = _shown(db, *_two(db, {}, {"split": _split(test=[20, 21])}))
    assert (shown.num_common, [line.common for line in shown.lines]) == (0, [None, None])
    assert "share no test example" in shown.warnings[0]
    other = factories.dataset(db, count=40)
    shown = _shown(db, *_two(db, {}, {"data": other}))
    assert shown.num_common == 0
    assert "The datasets differ" in shown.warnings[0]


def test_a_model_that_has_not_answered_all_of_them_is_not_compared(db: Session) -> None:
    one, other = _two(db, {}, {})
    baselines.store_answers(db, one.id, [Given(10, "x", 1.0, 0.1)])
    assert [line.common for line in _shown(db, one, other).lines] == [None, 0.25]


def test_what_else_differs_is_said(db: Session) -> None:
    found = _two(db, {}, {"template": "{{input}}!", "of": factories.base_model(db)})
    assert [one[:17] for one in _shown(db, *found).warnings] == [
        "The templates dif",
        "The base models d",
    ]
    shown = _shown(db, *_two(db, {}, {"task": "generation", "labels": []}))
    assert "The tasks or their labels differ" in shown.warnings[0]
    assert shown.num_common == 0


def test_so_many_at_most(db: Session) -> None:
    of = factories.experiment(db)
    ids = [factories.run(db, of, params={"seed": seed}).id for seed in range(21)]
    with pytest.raises(Invalid, match="at most 20"):
        across.chosen(db, ids, [])


def test_the_page(db: Session) -> None:
    one, other = _two(db, {}, {"template": "{{input}}!"})
    browser = web.client()
    db.commit()
    listed = browser.get("/experiments").text
    assert listed.count('name="runs"') == 2
    assert listed.count('name="experiment"') == 2
    for query in (
        f"runs={one.id},{other.id}",
        f"runs={one.id}&runs={other.id}",
        f"experiment={one.experiment_id}&experiment={other.experiment_id}",
    ):
        page = _text(browser.get(f"/compare?{query}").text)
        assert "The templates differ" in page
        assert "One Tiny 75.0 % 75.0 %" in page
        assert "Two Tiny 25.0 % 50.0 %" in page
    assert "Nothing was chosen" in browser.get("/compare").text
    assert browser.get("/compare?runs=nothing").status_code == 404
