"""Every two models of an experiment against each other: the difference, and what it says in words."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.comparison import differences, intervals
from app.comparison.differences import Difference
from app.comparison.intervals import Array, Interval
from app.tables import Answer

WORTH = 0.03  # a difference that one would want to see
MOST_KEPT = 64


class Pair(NamedTuple):
    """The model with the higher mean score first; keys as the rows of the comparison have them."""

    better: str
    other: str
    difference: Difference
    needed: int  # examples that would show a difference of WORTH


class Judged(NamedTuple):
    """What the stored scores of the answers say: of each model, and of each two."""

    intervals: dict[str, Interval]  # of the mean score
    pairs: list[Pair]
    total: int


class Finished(NamedTuple):
    """A model whose answers are complete, with a mark that changes if they ever do."""

    key: str
    owner: str
    mark: float | None


_kept: dict[tuple[object, ...], Judged] = {}  # answers of what has finished never change


def judge(
    db: Session, models: Sequence[Finished], rows: Sequence[int], *, right_or_wrong: bool
) -> Judged:
    """Over these test rows; a model that lacks an answer to one is left out."""
    asked = (*models, len(rows), *rows[:1], *rows[-1:], right_or_wrong)
    if asked not in _kept:
        if len(_kept) >= MOST_KEPT:
            _kept.pop(next(iter(_kept)), None)
        _kept[asked] = _judged(*_scores(db, models, rows), right_or_wrong)
    return _kept[asked]


def _scores(
    db: Session, models: Sequence[Finished], rows: Sequence[int]
) -> tuple[list[str], Array]:
    """The keys of the models that answered everything, and their scores, (examples, models)."""
    found: dict[str, dict[int, float]] = {model.owner: {} for model in models}
    query = select(Answer.owner, Answer.row, Answer.score).where(Answer.owner.in_(list(found)))
    for owner, row, score in db.execute(query):
        found[owner][row] = score
    whole = [model for model in models if all(row in found[model.owner] for row in rows)]
    columns = [[found[model.owner][row] for row in rows] for model in whole]
    return [model.key for model in whole], np.array(columns, dtype=float).reshape(-1, len(rows)).T


def _judged(keys: Sequence[str], scores: Array, right_or_wrong: bool) -> Judged:
    total = len(scores)
    if not keys or not total:
        return Judged({}, [], total)
    drawn = None if right_or_wrong else intervals.means(scores)
    alone = (
        [intervals.wilson(float(column.sum()), total) for column in scores.T]
        if drawn is None
        else intervals.of_means(scores, drawn)
    )
    means = scores.mean(axis=0)
    two = [
        (one, other) if means[one] >= means[other] else (other, one)
        for one, other in itertools.combinations(range(len(keys)), 2)
    ]
    found = differences.of_all(scores, two, drawn=drawn)
    made = [
        Pair(
            keys[one], keys[other], difference, _needed(scores[:, one] - scores[:, other], len(two))
        )
        for (one, other), difference in zip(two, found, strict=True)
    ]
    return Judged(dict(zip(keys, alone, strict=True)), made, total)


def _needed(by: Array, pairs: int) -> int:
    # As if one more example had set them apart: none that did is no sign that none ever will.
    spread = (float((by**2).sum()) + 1) / (len(by) + 1)
    return differences.needed(spread, WORTH, pairs)


def words(pair: Pair, labels: dict[str, str], total: int) -> str:
    """What the pair says, in a sentence that claims no more than its interval carries."""
    one, other = (
        "the base model" if key == "base" else labels[key] for key in (pair.better, pair.other)
    )
    one = one[0].upper() + one[1:]
    if pair.difference.seen:
        return f"{one} is better than {other} by {points(pair.difference)}."
    said = f"{one} and {other}: no difference can be seen on {total:,} examples"
    if pair.needed > total:
        return f"{said}; about {_about(pair.needed):,} would be needed to see one of 3 points."
    low, high = (100 * end for end in pair.difference.corrected)
    return f"{said}; if there is one, it lies between {low:+.1f} and {high:+.1f} points."


def points(difference: Difference) -> str:
    """8.3 points (3.1 to 13.4)."""
    low, high = (100 * end for end in difference.corrected)
    return f"{100 * difference.points:.1f} points ({low:.1f} to {high:.1f})"


def _about(number: int) -> int:
    """The number with two digits that are not zero."""
    unit: int = 10 ** max(0, len(str(number)) - 2)
    return round(number / unit) * unit
