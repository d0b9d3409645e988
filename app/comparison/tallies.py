"""What blind votes add up to: each model's share, every two models, and how many votes are whose."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.comparison import differences, explorer, votes
from app.comparison.explorer import Model
from app.comparison.intervals import LEVEL, Interval, wilson
from app.tables import Experiment, Vote


class Share(NamedTuple):
    """A model's votes: won of those in which it stood, with the interval of that share."""

    key: str
    label: str
    method: str
    won: int
    shown: int
    low: float
    high: float


class Pair(NamedTuple):
    """Votes that decide between two models, and those that the first won.

    Interval and p-value are corrected for all pairs; `seen`: both say that one is preferred.
    """

    first: str
    second: str
    won: int
    decided: int
    low: float
    high: float
    p_corrected: float
    seen: bool


class Voter(NamedTuple):
    """How many votes are whose; the name of those who gave none is empty."""

    name: str
    votes: int


class Result(NamedTuple):
    """What all votes on an experiment add up to. `ties`: votes for none."""

    votes: int
    ties: int
    total: int
    voters: list[Voter]
    models: list[Share]
    pairs: list[Pair]


class _Cast(NamedTuple):
    """A vote: the models that were shown, and those whose answer won."""

    row: int
    shown: set[str]
    won: set[str]


def result(db: Session, experiment: Experiment) -> Result:
    """Shares of votes won, and pairs where a vote decides; models that are gone are left out."""
    found = explorer.models(db, experiment)
    query = select(Vote.voter, Vote.row, Vote.shown, Vote.choice)
    stored = db.execute(query.where(Vote.experiment_id == experiment.id)).all()
    cast = [
        _Cast(
            row,
            {key for group in shown for key in group},
            set(shown[choice - 1]) if choice else set(),
        )
        for _, row, shown, choice in stored
    ]
    whose = Counter(voter for voter, *_ in stored)
    return Result(
        len(cast),
        sum(not one.won for one in cast),
        len(votes.rows(db, found)),
        [Voter(*one) for one in sorted(whose.items(), key=lambda one: (-one[1], one[0]))],
        [_share(model, cast) for model in found],
        _pairs(found, cast),
    )


def _share(model: Model, cast: Sequence[_Cast]) -> Share:
    stood = [one for one in cast if model.key in one.shown]
    won = sum(model.key in one.won for one in stood)
    interval = _wilson(won, stood, LEVEL)
    return Share(model.key, model.label, model.method, won, len(stood), *interval)


def _pairs(models: Sequence[Model], cast: Sequence[_Cast]) -> list[Pair]:
    """Judged as all pairs of a comparison are: by McNemar's test and Holm's procedure."""
    two = list(combinations([model.key for model in models], 2))
    deciding = [
        [one for one in cast if {*pair} <= one.shown and len({*pair} & one.won) == 1]
        for pair in two
    ]
    won = [
        sum(first in one.won for one in decisive)
        for (first, _), decisive in zip(two, deciding, strict=True)
    ]
    p = [_p(count, decisive) for count, decisive in zip(won, deciding, strict=True)]
    steps, judged = differences.holm_steps(p), differences.holm(p)
    made = []
    for place, (pair, decisive) in enumerate(zip(two, deciding, strict=True)):
        wide = _wilson(won[place], decisive, 1 - (1 - LEVEL) / steps[place])
        seen = judged[place] < 1 - LEVEL and not wide.holds(0.5)
        made.append(Pair(*pair, won[place], len(decisive), *wide, judged[place], seen))
    return made


def _weight(cast: Sequence[_Cast]) -> float:
    """How many votes of one person these are worth.

    Several people's votes on one example are taken as if they always agreed (Kish 1965): they would
    make the result look surer than it is, since it is about examples like these.
    """
    each = Counter(one.row for one in cast).values()
    return len(cast) ** 2 / sum(count**2 for count in each) if cast else 0.0


def _wilson(won: int, cast: Sequence[_Cast], level: float) -> Interval:
    weight = _weight(cast)
    return wilson(won * weight / len(cast) if cast else 0, weight, level)


def _p(won: int, cast: Sequence[_Cast]) -> float:
    share = _weight(cast) / len(cast) if cast else 0.0
    return differences.mcnemar(round(won * share), round((len(cast) - won) * share))


def as_dict(found: Result) -> dict[str, Any]:
    """For JSON."""
    return found._asdict() | {
        "voters": [one._asdict() for one in found.voters],
        "models": [one._asdict() for one in found.models],
        "pairs": [one._asdict() for one in found.pairs],
    }
