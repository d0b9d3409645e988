"""Classification class by class: precision, recall, F1, and which class is taken for which."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import datasets
from app.comparison import intervals, scores
from app.comparison.intervals import Interval
from app.comparison.scores import Pair
from app.tables import Answer, Experiment

# What answers are matched by: the labels they name, or their texts as they are.
MATCHINGS = {
    "normalised": "The first line with text in it, without case, runs of spaces, and the quotes, "
    "asterisks and end marks around it",
    "exact": "The whole text, exactly as it is",
    "choice": "The likeliest of the labels, when the model may answer with one of them only",
}


class Class(NamedTuple):
    """One label. Precision: of those given it; recall: of those that are it; None: there are none."""

    label: str
    expected: int
    given: int
    precision: float
    recall: float | None
    interval: Interval | None  # of the recall
    f1: float


class Classes(NamedTuple):
    """All labels; `matrix` counts by expected label (row) and given one, the last column others."""

    classes: list[Class]
    matrix: list[list[int]]
    accuracy: float
    interval: Interval

    @property
    def confusions(self) -> list[tuple[str, str, int]]:
        """Expected label, what was given instead, how often; the most frequent first."""
        names = [one.label for one in self.classes]
        found = [
            (names[row], (*names, "")[column], count)
            for row, counts in enumerate(self.matrix)
            for column, count in enumerate(counts)
            if count and row != column
        ]
        return sorted(found, key=lambda one: -one[2])


def of(labels: Sequence[str], pairs: Sequence[Pair], matching: str = "normalised") -> Classes:
    """Over (expected, answer) pairs, of which there is at least one."""
    named = scores.named(labels, pairs) if matching != "exact" else list(pairs)
    expected, given = Counter(one for one, _ in named), Counter(other for _, other in named)
    both = Counter(named)
    names = [label for label in labels if expected[label] or given[label]]
    names += sorted(label for label in expected if label not in labels)
    found = [_class(name, both[name, name], expected[name], given[name]) for name in names]
    matrix = [[both[one, other] for other in names] for one in names]
    for row, name in zip(matrix, names, strict=True):
        row.append(expected[name] - sum(row))
    right = sum(count for (one, other), count in both.items() if one == other)
    accuracy = right / len(named)
    return Classes(found, matrix, accuracy, intervals.wilson(right, len(named)))


def _class(label: str, right: int, expected: int, given: int) -> Class:
    return Class(
        label,
        expected,
        given,
        right / given if given else 0.0,
        right / expected if expected else None,
        intervals.wilson(right, expected) if expected else None,
        2 * right / (expected + given),
    )


def pairs_of(
    db: Session, experiment: Experiment, owner: str, stored: dict[str, Any], matching: str
) -> list[Pair]:
    """Expected output and answer of each test example that was answered; `stored`: its scores."""
    test = experiment.split["test"]
    if matching == "choice":
        chosen = stored.get("choices", [])
        given = dict(zip(test, [experiment.labels[place] for place in chosen], strict=False))
    else:
        query = select(Answer.row, Answer.text).where(Answer.owner == owner)
        given = {one.row: one.text for one in db.execute(query)}
    rows = datasets.rows(experiment.dataset, set(test))  # a split is in ascending order
    return [(one.output, given[row]) for row, one in zip(test, rows, strict=True) if row in given]
