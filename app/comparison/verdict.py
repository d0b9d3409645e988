"""The verdict: what follows from the figures, in plain words. All its rules are in this file.

1. Best answers: the run with the highest score, if the data show it better than every other run.
   All that the data cannot tell from it share the place.
2. The base model: which runs are shown to be better than it, and which are not.
3. Classification: a run whose interval begins below the score of always answering the commonest
   label is named.
4. Least memory, quickest, smallest: the least figure; what is within CLOSE of it shares the place,
   with its own figure where that reads otherwise. If the data show other answers to be better, that
   is said with it. Memory and time are left out where runs were computed on different devices.
5. What one seed cannot show is said always.

"Show" is `Difference.seen`: Holm's p-value below 5 %, and the corrected interval leaves out 0.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from app import units
from app.comparison import scores
from app.comparison.figures import Comparison, Row
from app.comparison.pairs import Pair, points

CLOSE = 0.05
SEED = (
    "Each run is from one seed: the intervals hold the luck of the test examples, not that of "
    "the training. Another seed may change places that are close."
)


class Wish(NamedTuple):
    """What a person may want the least of."""

    words: str
    value: Callable[[Row], float | None]
    said: Callable[[float], str]
    of: str  # what the figure is of
    by_device: bool  # whether it can be compared on one device only


def of(found: Comparison, task: str) -> list[str]:
    """The sentences of the verdict; none while no run has been scored."""
    runs = [row for row in found.rows if row.key != "base" and _has_score(row)]
    if not runs:
        return []
    top = min(runs, key=lambda row: (len(_better(found, runs, row)), -(row.score or 0.0)))
    said = [_best(found, runs, top, scores.METRICS[task][found.metric])]
    said += _against_base(found, runs)
    said += _against_majority(found, runs)
    said += [line for wish in WISHES for line in _least(found, runs, top, wish)]
    return [*said, SEED]


def _has_score(row: Row) -> bool:
    return row.state == "succeeded" and row.score is not None


def _shown(found: Comparison, better: Row, other: Row) -> Pair | None:
    """The pair, if the data show `better` to be that."""
    for pair in found.pairs:
        if (pair.better, pair.other) == (better.key, other.key) and pair.difference.seen:
            return pair
    return None


def _better(found: Comparison, runs: Sequence[Row], row: Row) -> list[Row]:
    return [other for other in runs if _shown(found, other, row)]


def _best(found: Comparison, runs: Sequence[Row], top: Row, metric: str) -> str:
    name = (
        metric if metric.isupper() or metric.startswith("ROUGE") else metric[0].lower() + metric[1:]
    )
    said = f"{name} {_share(top.score or 0.0)}{_within(top)} on {found.num_test:,} test examples"
    if len(runs) == 1:
        return f"{top.label} reaches {said}; there is no other run yet to compare it with."
    behind = [row for row in runs if _shown(found, top, row)]
    level = [row for row in runs if row not in behind]
    if len(level) == 1:
        return f"Best answers: {top.label}, with {said}; {_listed(found, top, behind)}."
    line = (
        f"Best answers: the data cannot tell {_and(level)} apart. In these examples {top.label} is "
        f"highest, with {said}"
    )
    return f"{line}; {_listed(found, top, behind)}." if behind else f"{line}."


def _listed(found: Comparison, top: Row, behind: Sequence[Row]) -> str:
    parts = []
    for row in behind:
        pair = _shown(found, top, row)
        parts.append(f"{row.label} by {points(pair.difference)}" if pair else row.label)
    return f"it is better than {_joined(parts)}"


def _against_base(found: Comparison, runs: Sequence[Row]) -> list[str]:
    base = next((row for row in found.rows if row.key == "base" and _has_score(row)), None)
    if base is None:
        return ["The base model has not been scored yet, so what tuning brought is not known."]
    better = [row for row in runs if _shown(found, row, base)]
    worse = [row for row in runs if _shown(found, base, row)]
    neither = [row for row in runs if row not in better and row not in worse]
    said = []
    if better:
        all_of = "Every run" if len(better) == len(runs) > 1 else _and(better)
        verb = "is" if len(better) == 1 or len(better) == len(runs) else "are"
        said.append(f"{all_of} {verb} better than the base model as it is.")
    if neither:
        said.append(f"{_and(neither)}: no difference from the base model can be seen.")
    if worse:
        verb = "is" if len(worse) == 1 else "are"
        said.append(f"{_and(worse)} {verb} worse than the base model as it is.")
    return said


def _against_majority(found: Comparison, runs: Sequence[Row]) -> list[str]:
    if found.majority is None:
        return []
    low = [row for row in runs if row.interval and row.interval.low <= found.majority]
    if not low:
        return []
    verb = "is" if len(low) == 1 else "are"
    return [
        f"{_and(low)} {verb} not shown to be better than always answering the commonest label "
        f"({_share(found.majority)})."
    ]


def _least(found: Comparison, runs: Sequence[Row], top: Row, wish: Wish) -> list[str]:
    known = [(value, row) for row in runs if (value := wish.value(row)) is not None]
    if len(known) < 2:
        return []
    if wish.by_device and len({row.device for _, row in known}) > 1:
        return [f"{wish.words}: not compared, since the runs were computed on different devices."]
    least = min(value for value, _ in known)
    alike = [(value, row) for value, row in known if value <= least * (1 + CLOSE)]
    if len(alike) == len(known):
        most = max(value for value, _ in alike)
        ends = dict.fromkeys((wish.said(least), wish.said(most)))
        return [f"{wish.words}: all take about the same, {' to '.join(ends)} {wish.of}."]
    close = [row for _, row in alike]
    behind = [row for row in close if _shown(found, top, row)]
    line = f"{wish.words}: {_each(wish, alike)} {wish.of}"
    if not behind:
        return [f"{line}."]
    cost = _joined(
        [
            f"{points(pair.difference)}" + (f" for {row.label}" if len(close) > 1 else "")
            for row in behind
            if (pair := _shown(found, top, row))
        ]
    )
    return [f"{line}, at the price of answers worse than {top.label}'s by {cost}."]


def _each(wish: Wish, alike: Sequence[tuple[float, Row]]) -> str:
    """Each with its figure, the least first; the figure once where they read the same."""
    figures = {wish.said(value) for value, _ in alike}
    if len(figures) == 1:
        return f"{_and([row for _, row in alike])}, {figures.pop()}"
    ordered = sorted(alike, key=lambda one: one[0])
    return _joined([f"{row.label} with {wish.said(value)}" for value, row in ordered])


def _and(rows: Sequence[Row]) -> str:
    return _joined([row.label for row in rows])


def _joined(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _within(row: Row) -> str:
    if row.interval is None:
        return ""
    return f" ({100 * row.interval.low:.1f} to {100 * row.interval.high:.1f})"


WISHES = (
    Wish("Least memory", lambda row: row.peak_memory_mb, units.memory, "at the peak", True),
    Wish("Quickest", lambda row: row.train_seconds, units.duration, "of training", True),
    Wish("Smallest", lambda row: row.size_bytes, units.size, "saved with the tokenizer", False),
)
