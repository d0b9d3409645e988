"""Blind votes: which answer is best, asked without saying whose it is, of each voter by name."""

import unicodedata
from collections.abc import Sequence
from hashlib import sha256
from typing import NamedTuple

from sqlalchemy import delete, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.comparison import explorer
from app.comparison.explorer import Model
from app.errors import Conflict, Invalid
from app.tables import Answer, Experiment, Vote

SPACE = " \t\r\n"  # around an answer it makes no difference
MOST_NAME = 40  # characters of a voter's name


class Ballot(NamedTuple):
    """A test example with its distinct answers, in an order that says nothing of whose they are.

    `owners`: of each answer the models that gave it. It never leaves the studio before the vote.
    """

    row: int
    input: str
    expected: str
    answers: list[str]
    owners: list[list[str]]
    mark: str  # changes once other models have answered: then the vote is about something else


class Progress(NamedTuple):
    """How many examples a voter has voted on, of those whose answers differ."""

    done: int
    total: int


def voter(text: str) -> str:
    """A voter's name as it is kept; without one a vote is everybody's. Raises Invalid."""
    letters = unicodedata.normalize("NFC", " ".join(text.split()))
    name = "".join(letter for letter in letters if letter.isprintable()).strip()
    if len(name) > MOST_NAME:
        raise Invalid(f"A voter's name has at most {MOST_NAME} characters.", field="voter")
    return name


def rows(db: Session, found: Sequence[Model]) -> list[int]:
    """Rows on which the models do not all say the same, shuffled the same way for everybody."""
    owners = [one.owner for one in found]
    query = select(Answer.row).where(Answer.owner.in_(owners)).group_by(Answer.row)
    differing = query.having(func.count(func.distinct(func.trim(Answer.text, SPACE))) > 1)
    return sorted(db.scalars(differing), key=lambda row: _hash("order", row))


def progress(db: Session, experiment: Experiment, found: Sequence[Model], voter: str) -> Progress:
    """How far the voter is."""
    votable = set(rows(db, found))
    return Progress(len(votable & _voted(db, experiment, voter)), len(votable))


def next_ballot(
    db: Session, experiment: Experiment, found: Sequence[Model], voter: str
) -> Ballot | None:
    """The next example to vote on; None: there is none left."""
    voted = _voted(db, experiment, voter)
    row = next((row for row in rows(db, found) if row not in voted), None)
    return None if row is None else ballot(db, experiment, found, row)


def ballot(db: Session, experiment: Experiment, found: Sequence[Model], row: int) -> Ballot:
    """The example's answers, equal ones merged; the order follows from experiment and row."""
    [example] = explorer.read(db, experiment, found, [row])
    groups: dict[str, list[str]] = {}
    for model, given in zip(found, example.answers, strict=True):
        if given:
            groups.setdefault(given.text.strip(SPACE), []).append(model.key)
    order = sorted(groups, key=lambda text: _hash(experiment.id, row, text))
    mark = _hash(experiment.id, row, *sorted(model.key for model in found))[:16]
    owners = [groups[text] for text in order]
    return Ballot(row, example.input, example.expected, order, owners, mark)


def cast(
    db: Session, experiment: Experiment, row: int, choice: int, mark: str, voter: str = ""
) -> None:
    """Keep the voter's vote for the answer at this place, from 1; 0: none is best. The first stands.

    Raises Invalid, or Conflict if other models have answered since the ballot was shown.
    """
    found = explorer.models(db, experiment)
    if row not in experiment.split["test"]:
        raise Invalid("There is no such test example.", field="row")
    asked = ballot(db, experiment, found, row)
    if asked.mark != mark:
        raise Conflict(
            "Another model has answered meanwhile. Look again; the vote was not counted."
        )
    if not 0 <= choice <= len(asked.answers):
        raise Invalid("There is no such answer to vote for.", field="choice")
    if row in _voted(db, experiment, voter):
        return  # a key pressed twice
    db.add(
        Vote(experiment_id=experiment.id, voter=voter, row=row, shown=asked.owners, choice=choice)
    )
    try:
        db.commit()
    except IntegrityError:  # at the same moment
        db.rollback()


def undo(db: Session, experiment: Experiment, voter: str = "") -> int | None:
    """Take back the voter's last vote; the row it was about, None if there was none."""
    mine = select(Vote).where(Vote.experiment_id == experiment.id, Vote.voter == voter)
    last = db.scalar(mine.order_by(Vote.id.desc()).limit(1))
    if last is None:
        return None
    row = last.row
    db.execute(delete(Vote).where(Vote.id == last.id))
    db.commit()
    return row


def _voted(db: Session, experiment: Experiment, voter: str) -> set[int]:
    mine = select(Vote.row).where(Vote.experiment_id == experiment.id, Vote.voter == voter)
    return set(db.scalars(mine))


def _hash(*parts: object) -> str:
    return sha256(":".join(map(str, parts)).encode()).hexdigest()
