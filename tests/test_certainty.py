"""Every metric of every task has an interval that holds it, and pooled ones are the libraries'."""

import numpy as np
import pytest

from app.comparison import certainty, intervals, scores

LABELS = ["a", "b", "c", "d"]


def _texts(total: int, seed: int = 1) -> list[tuple[str, str]]:
    """Sentences and answers that share some of their words."""
    chance = np.random.default_rng(seed)
    words = np.array([*"abcdefghij", "cat", "dog", "house", "runs", "sits"])
    made = []
    for _ in range(total):
        expected = chance.choice(words, 8)
        answer = np.where(chance.random(8) < 0.6, expected, chance.choice(words, 8))
        made.append((" ".join(expected), " ".join(answer)))
    return made


def _classes(total: int, seed: int = 1) -> list[tuple[str, str]]:
    chance = np.random.default_rng(seed)
    expected = chance.choice(LABELS, total, p=[0.4, 0.3, 0.2, 0.1])
    wrong = chance.choice([*LABELS, "none"], total)
    answers = np.where(chance.random(total) < 0.8, expected, wrong)
    return [(str(one), str(other)) for one, other in zip(expected, answers, strict=True)]


@pytest.mark.parametrize("task", scores.METRICS)
def test_every_metric_lies_in_its_interval(task: str) -> None:
    pairs = _classes(60) if task == "classification" else _texts(60)
    labels = LABELS if task == "classification" else []
    found = scores.summary(task, labels, pairs)
    made = certainty.of_metrics(task, labels, pairs)
    assert made.keys() == found.keys()
    for name, one in made.items():
        assert 0 <= one.low <= found[name] <= one.high <= 1, name
        assert 0.01 < one.high - one.low < 0.4, name
    assert made == certainty.of_metrics(task, labels, pairs)


def test_right_or_wrong_has_wilsons() -> None:
    pairs = _classes(60)
    found = scores.summary("classification", LABELS, pairs)["accuracy"]
    made = certainty.of_metrics("classification", LABELS, pairs)["accuracy"]
    assert made == intervals.wilson(round(found * 60), 60)


@pytest.mark.parametrize("metric", ["macro_f1", "chrf"])
def test_a_pooled_metrics_interval_is_about_what_many_samples_show(metric: str) -> None:
    """Its width is that of the metric's values over fresh samples of as many examples."""
    task, make = {"macro_f1": ("classification", _classes), "chrf": ("generation", _texts)}[metric]
    values = [scores.summary(task, LABELS, make(150, seed))[metric] for seed in range(2, 60)]
    one = certainty.of_metrics(task, LABELS, make(150))[metric]
    assert one.high - one.low == pytest.approx(2 * 1.96 * np.std(values), rel=0.35)


def test_nothing_but_right_answers_still_leaves_doubt() -> None:
    right = [(label, label) for label in LABELS] * 10
    for one in certainty.of_metrics("classification", LABELS, right).values():
        assert one.low < 0.93
        assert one.high == pytest.approx(1)
    same = [("the same words", "the same words")] * 40
    for one in certainty.of_metrics("generation", [], same).values():
        assert one.low < 0.93


def test_a_losss_interval_is_over_examples_and_not_over_tokens() -> None:
    chance = np.random.default_rng(2)
    tokens = [int(one) for one in chance.integers(1, 30, 200)]
    totals = [
        float(one) * length for one, length in zip(chance.gamma(4, 0.2, 200), tokens, strict=True)
    ]
    one = certainty.of_loss(totals, tokens)
    assert one.low < sum(totals) / sum(tokens) < one.high
    assert 0.03 < one.high - one.low < 0.3
