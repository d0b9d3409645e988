"""The 95 % interval of every metric of a task: for whoever has all the answers at hand."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from app.comparison import intervals, scores
from app.comparison.intervals import Array, Interval
from app.comparison.scores import Pair


def of_metrics(task: str, labels: Sequence[str], pairs: Sequence[Pair]) -> dict[str, Interval]:
    """By name of the metric, for what `scores.summary` finds over the same pairs.

    Wilson's where an example is right or wrong, else by the bootstrap over the examples.
    """
    found = scores.summary(task, labels, pairs)
    whole = {"macro_f1": _macro_f1, "chrf": _chrf}
    made = {name: of_share(found[name], len(pairs)) for name in found if is_share(name)}
    made |= {name: whole[name](labels, pairs, found[name]) for name in found if name in whole}
    rest = [name for name in found if name not in made]
    if rest:
        each = [scores.each(task, labels, *pair) for pair in pairs]
        table = np.array([[one[name] for name in rest] for one in each])
        made |= dict(zip(rest, intervals.of_means(table, intervals.means(table)), strict=True))
    return made


def is_share(metric: str) -> bool:
    """Whether the metric is a share of right answers."""
    return metric in scores.RIGHT_OR_WRONG


def of_share(share: float, total: int) -> Interval:
    """Of a share of so many examples."""
    return intervals.wilson(share * total, total)


def of_loss(totals: Sequence[float], tokens: Sequence[int]) -> Interval:
    """Of the loss per token over all examples, by the bootstrap: the examples are what is drawn."""
    above, below = np.array(totals), np.array(tokens, dtype=float)
    drawn = intervals.resampled(len(above), lambda counts: (counts @ above) / (counts @ below))
    return intervals.corrected(drawn, float(above.sum() / below.sum()))


def _macro_f1(labels: Sequence[str], pairs: Sequence[Pair], found: float) -> Interval:
    named = scores.named(labels, pairs)
    places = {label: place for place, label in enumerate(sorted({pair[0] for pair in named}))}
    right, wanted, given = np.zeros((3, len(named), len(places)), dtype=np.float32)
    for row, (expected, answer) in enumerate(named):
        right[row, places[expected]] = expected == answer
        wanted[row, places[expected]] = 1
        if answer in places:
            given[row, places[answer]] = 1

    def statistic(counts: Any) -> Any:
        held = counts @ wanted
        there = held > 0  # a draw may hold none of a label
        f1 = 2 * (counts @ right) / np.maximum(held + counts @ given, 1)
        return np.where(there, f1, 0).sum(1) / there.sum(1)

    return _wide_enough(intervals.resampled(len(named), statistic), found, len(named))


def _chrf(_labels: Sequence[str], pairs: Sequence[Pair], found: float) -> Interval:
    metric = scores.chrf_metric()
    answers, expected = [pair[1] for pair in pairs], [pair[0] for pair in pairs]
    table = np.array(metric._extract_corpus_statistics(answers, [expected]), dtype=float)

    def statistic(counts: Any) -> Any:
        given, wanted, both = np.moveaxis((counts @ table).reshape(len(counts), -1, 3), 2, 0)
        there = (given > 0) & (wanted > 0)
        orders = np.maximum(there.sum(1), 1)
        precision = np.where(there, both / np.maximum(given, 1), 0).sum(1) / orders
        recall = np.where(there, both / np.maximum(wanted, 1), 0).sum(1) / orders
        factor = metric.beta**2
        below = np.maximum(factor * precision + recall, 1e-12)
        return (1 + factor) * precision * recall / below

    return _wide_enough(intervals.resampled(len(pairs), statistic), found, len(pairs))


def _wide_enough(drawn: Array, found: float, total: int) -> Interval:
    """Wilson's where all draws are nearly alike because there was nearly nothing to draw from."""
    if float(drawn.max() - drawn.min()) < 1e-9:
        return intervals.wilson(found * total, total)
    return intervals.corrected(drawn, found)
