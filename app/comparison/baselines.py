"""The base model's own figures on one split and template: measured once, then kept."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from app import datasets
from app.crashpoints import crashpoint
from app.examples import Example
from app.tables import Answer, Baseline, Experiment


class Known(NamedTuple):
    """What has been measured so far."""

    validation_loss: float | None
    scores: dict[str, Any]


class Given(NamedTuple):
    """A model's answer to the test example `row` of the dataset; loss in nats per token."""

    row: int
    text: str
    score: float
    loss: float


def key(experiment: Experiment, precision: str) -> str:
    """Names the base model's figures: equal questions share them, whatever their experiment."""
    parts = [
        experiment.base_model_id,
        precision,
        experiment.dataset.fingerprint,
        experiment.split["validation"],
        experiment.split["test"],
        experiment.task,
        experiment.labels,
        experiment.template,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def known(db: Session, experiment: Experiment, precision: str) -> Known:
    """The figures at this precision, as far as they are there."""
    found = db.get(Baseline, key(experiment, precision))
    return Known(found.validation_loss, found.scores) if found else Known(None, {})


def find(db: Session, experiment: Experiment) -> Baseline | None:
    """The figures at the precision that the experiment's runs were computed in."""
    used = dict.fromkeys(run.figures.get("precision") for run in experiment.runs)
    keys = [key(experiment, precision) for precision in used if precision]
    query = select(Baseline).where(Baseline.key.in_(keys)).order_by(Baseline.created_at)
    return db.scalar(query.limit(1)) if keys else None


def keep(db: Session, experiment: Experiment, precision: str, **values: Any) -> None:
    """Store what was measured; values: validation_loss, scores."""
    db.merge(Baseline(key=key(experiment, precision), **values))
    crashpoint("baseline.stored")
    db.commit()


def answers(
    db: Session, experiment: Experiment, owners: Sequence[str], rows: Sequence[int]
) -> list[tuple[int, Example, list[Answer | None]]]:
    """These test examples, in this order, each with the answers of these owners."""
    query = select(Answer).where(Answer.owner.in_(owners), Answer.row.in_(rows))
    given = {(answer.owner, answer.row): answer for answer in db.scalars(query)}
    # The examples come in the order of their rows.
    examples = dict(zip(sorted(rows), datasets.rows(experiment.dataset, set(rows)), strict=True))
    return [(row, examples[row], [given.get((owner, row)) for owner in owners]) for row in rows]


def store_answers(db: Session, owner: str, given: Sequence[Given]) -> None:
    """Store a model's answers in the place of earlier ones; owner: a run's id or a baseline's key."""
    db.execute(delete(Answer).where(Answer.owner == owner))
    db.execute(insert(Answer), [{"owner": owner, **answer._asdict()} for answer in given])
    crashpoint("answers.stored")
    db.commit()
