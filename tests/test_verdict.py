"""The verdict and the pairs: what the data show is said, what they do not show is not."""

import json
from typing import Any

import pytest
from sqlalchemy.orm import Session

from app.comparison import figures, pairs, verdict
from app.tables import Experiment
from app.web import columns
from tests import answered
from tests.answered import BASE, FOUR, Model


def _verdict(db: Session, of: Experiment) -> tuple[figures.Comparison, str]:
    found = figures.compare(db, of)
    return found, " ".join(verdict.of(found, of.task))


def _words(found: figures.Comparison) -> dict[tuple[str, str], str]:
    """By the methods of the pair."""
    methods = {row.key: row.method for row in found.rows}
    return {
        (methods[pair.better], methods[pair.other]): pairs.words(pair, found.labels, found.num_test)
        for pair in found.pairs
    }


def test_a_crippled_method_gets_the_right_verdict(any_db: Session) -> None:
    """Prompt tuning answers one label always, and is the cheapest: named for both, not praised."""
    crippled = Model("prompt_tuning", 0.6, 400, 20, 10_000, stuck_on="delivery")
    of = answered.experiment(any_db, [BASE, crippled, *FOUR[2:]])
    found, said = _verdict(any_db, of)
    assert "Best answers: the data cannot tell LoRA, QLoRA and Full fine tuning apart." in said
    assert "it is better than Prompt tuning by" in said
    assert "Prompt tuning is not shown to be better than always answering the commonest" in said
    assert "Least memory: Prompt tuning, 400 MB at the peak, at the price of answers" in said
    assert (
        "Smallest: Prompt tuning, 10.0 kB saved with the tokenizer, at the price of answers" in said
    )
    assert said.endswith(verdict.SEED)
    seen = {pair: words for pair, words in _words(found).items() if "no difference" not in words}
    assert {other for _, other in seen} == {"base", "prompt_tuning"}
    assert "better than Prompt tuning by" in seen["full", "prompt_tuning"]


def test_a_method_below_the_base_model_is_said_to_be_worse(db: Session) -> None:
    of = answered.experiment(db, [Model("base", 0.7), Model("lora", 0.9), Model("full", 0.3)])
    said = _verdict(db, of)[1]
    assert "LoRA is better than the base model as it is." in said
    assert "Full fine tuning is worse than the base model as it is." in said
    assert "Best answers: LoRA, with accuracy 90.0 % (86.1 to 92.9) on 300 test examples" in said


def test_of_equal_methods_none_is_praised(db: Session) -> None:
    equal = [Model(one.method, 0.9) for one in FOUR[1:]]
    found, said = _verdict(db, answered.experiment(db, [Model("base", 0.9), *equal], 60))
    assert "Best answers: the data cannot tell Prompt tuning, LoRA, QLoRA and Full" in said
    assert "no difference from the base model can be seen" in said
    assert "better than the base" not in said
    assert "Least memory: all take about the same, 800 MB at the peak." in said
    for words in _words(found).values():
        assert "no difference can be seen on 60 examples; about" in words
        assert "would be needed to see one of 3 points" in words


def test_where_enough_examples_show_nothing_it_says_how_large_a_difference_may_be(
    db: Session,
) -> None:
    of = answered.experiment(db, [Model("lora", 0.97), Model("full", 0.97)], 2000)
    (words,) = _words(figures.compare(db, of)).values()
    assert "no difference can be seen on 2,000 examples; if there is one, it lies between" in words


def test_what_was_computed_elsewhere_is_not_called_quicker(db: Session) -> None:
    models = [Model("lora", 0.9, 800, 60), Model("full", 0.9, 2000, 5, device="A GPU")]
    said = _verdict(db, answered.experiment(db, models))[1]
    assert "Quickest: not compared, since the runs were computed on different devices." in said
    assert "The base model has not been scored yet" in said


def test_what_is_about_as_little_has_its_own_figure_as_in_the_table(db: Session) -> None:
    ranks = [(8, 1060, 100), (4, 1030, 100)]
    loras = [Model("lora", 0.9, *took, params={"rank": rank}) for rank, *took in ranks]
    of = answered.experiment(db, [BASE, *loras, Model("full", 0.9, 3000, 200)])
    said = _verdict(db, of)[1]
    assert "Least memory: LoRA · rank 4 with 1.0 GB and LoRA · rank 8 with 1.1 GB at the" in said
    assert "Quickest: LoRA · rank 8 and LoRA · rank 4, 1 min 40 s of training." in said
    assert "Smallest: all take about the same, 5.0 MB saved with the tokenizer." in said
    of = answered.experiment(db, loras)
    assert "Least memory: all take about the same, 1.0 GB to 1.1 GB at" in _verdict(db, of)[1]


def test_what_reads_the_same_in_the_table_is_marked_the_same(db: Session) -> None:
    ranks = [(8, 1040.0), (4, 1030.0)]
    loras = [Model("lora", 0.9, took, params={"rank": rank}) for rank, took in ranks]
    of = answered.experiment(db, [*loras, Model("full", 0.9, 3000)])
    shown = columns.table(db, of)
    place = next(n for n, column in enumerate(shown.costs) if column.label == "Peak memory")
    marks = {line.label: line.cells[place].best for line in shown.cost_lines}
    assert marks == {"LoRA · rank 8": "least", "LoRA · rank 4": "least", "Full fine tuning": ""}


def test_one_run_alone_is_compared_with_nothing_but_the_base(db: Session) -> None:
    said = _verdict(db, answered.experiment(db, [BASE, Model("lora", 0.9)]))[1]
    assert "LoRA reaches accuracy 90.0 %" in said
    assert "there is no other run yet" in said
    assert "LoRA is better than the base model" in said
    assert _verdict(db, answered.experiment(db, [BASE]))[1] == ""


def test_two_runs_of_a_method_can_be_told_apart(db: Session) -> None:
    models = [Model("lora", 0.9, params={"rank": rank}) for rank in (4, 16)]
    found, said = _verdict(db, answered.experiment(db, [*models, Model("full", 0.9)]))
    labels = list(found.labels.values())
    assert labels == ["Base model", "LoRA · rank 4", "LoRA · rank 16", "Full fine tuning"]
    assert "LoRA · rank 4" in said
    again = answered.experiment(db, [Model("lora", 0.9), Model("lora", 0.8)])
    assert list(figures.compare(db, again).labels.values())[1:] == ["LoRA", "LoRA (2)"]


def test_a_run_without_all_its_answers_is_in_no_pair(db: Session) -> None:
    from app.comparison import baselines

    of = answered.experiment(db)
    lora = next(run for run in of.runs if run.method == "lora")
    baselines.store_answers(db, lora.id, [baselines.Given(20, "x", 0.0, 1.0)])
    found = figures.compare(db, of)
    assert len(found.pairs) == 6
    assert all(lora.id not in (pair.better, pair.other) for pair in found.pairs)


@pytest.mark.parametrize("part", ["pairs", "rows"])
def test_pairs_and_intervals_are_json(db: Session, part: str) -> None:
    found = figures.as_dict(figures.compare(db, answered.experiment(db)))
    written: Any = json.loads(json.dumps(found, allow_nan=False))[part]
    if part == "rows":
        assert written[0]["interval"][0] < written[0]["score"] < written[0]["interval"][1]
    else:
        assert len(written) == 10
        assert written[0].keys() >= {"better", "other", "points", "interval", "corrected", "seen"}
        assert written[0]["p_corrected"] >= written[0]["p"]


def test_scores_are_read_once(db: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    of = answered.experiment(db)
    first = figures.compare(db, of)
    monkeypatch.setattr(pairs, "_scores", None)
    assert figures.compare(db, of) == first
