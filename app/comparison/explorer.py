"""Test examples with every model's answer: found by who was right, by text, in an order, a page at a time."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import bindparam, case, func, or_, select
from sqlalchemy.orm import Session

from app import datasets, naming
from app.comparison import baselines, figures
from app.tables import Answer, Experiment

SHOWN = {
    "all": "All examples",
    "pair": "X right, Y wrong",
    "better": "X better than Y",
    "all_right": "All right",
    "all_wrong": "All wrong",
    "lost": "Base model right, a tuned one wrong",
}
ORDERS = {"row": "By row", "loss": "Highest loss first", "difference": "Largest difference first"}
_EXACT = frozenset({"classification", "extraction", "question_answering"})
_NEAR = 0.0005  # a score so little below the threshold is a matter of rounding


class Model(NamedTuple):
    """One that has answered. `owner`: whose answers they are in the table."""

    key: str  # run id, or "base"
    owner: str
    label: str
    method: str


class Asked(NamedTuple):
    """Which examples, in which order. `x` and `y` are models' keys."""

    show: str
    x: str
    y: str
    threshold: float  # a score of at least so much is right
    text: str
    sort: str


class Given(NamedTuple):
    """A model's answer to an example."""

    text: str
    score: float
    loss: float | None


class Example(NamedTuple):
    """One test example with each model's answer, in the order of the models."""

    row: int
    input: str
    expected: str
    answers: list[Given | None]


def models(db: Session, experiment: Experiment) -> list[Model]:
    """Who has answered: the base model first, then the runs by method."""
    base = baselines.find(db, experiment)
    names = naming.names(experiment.runs)
    every = [Model("base", base.key, "Base model", "base")] if base else []
    every += [
        Model(run.id, run.id, names[run.id], run.method) for run in figures.ordered(experiment)
    ]
    owners = [one.owner for one in every]
    known = set(db.scalars(select(Answer.owner).where(Answer.owner.in_(owners)).distinct()))
    return [one for one in every if one.owner in known]


def threshold(task: str) -> float:
    """From which score on an answer counts as right, unless someone says otherwise."""
    return 1.0 if task in _EXACT else 0.5


def is_right(score: float, least: float) -> bool:
    """Whether a score counts as right."""
    return score >= least - _NEAR


def find(
    db: Session,
    experiment: Experiment,
    found: Sequence[Model],
    asked: Asked,
    *,
    start: int = 0,
    limit: int | None = None,
) -> tuple[list[int], int]:
    """Rows of the dataset, from the one at `start` on, and how many there are in all."""
    query = _query(experiment, found, asked)
    counted = query.add_columns(func.count().over().label("total"))
    rows = db.execute(counted.offset(start).limit(limit)).all()
    if rows or not start:
        return [row.row for row in rows], rows[0].total if rows else 0
    return [], db.scalar(select(func.count()).select_from(query.subquery())) or 0


def read(
    db: Session, experiment: Experiment, found: Sequence[Model], rows: Sequence[int]
) -> list[Example]:
    """These examples, in this order."""
    owners = [one.owner for one in found]
    return [
        Example(
            row,
            one.input,
            one.output,
            [Given(its.text, its.score, its.loss) if its else None for its in answers],
        )
        for row, one, answers in baselines.answers(db, experiment, owners, rows)
    ]


def _query(experiment: Experiment, found: Sequence[Model], asked: Asked) -> Any:
    """One line a row: the scores of its answers side by side decide whether it is shown, and where."""
    query = select(Answer.row).where(Answer.owner.in_([one.owner for one in found]))
    query = query.group_by(Answer.row).having(_condition(found, asked))
    if asked.text:
        query = query.having(_holds(experiment, asked.text))
    return query.order_by(*_order(found, asked), Answer.row)


def _score(owner: str) -> Any:
    return func.max(case((Answer.owner == owner, Answer.score)))


def _pair(found: Sequence[Model], asked: Asked) -> tuple[Any, Any] | None:
    """The scores of X and Y; None: they are not two models that have answered."""
    owners = {one.key: one.owner for one in found}
    if asked.x == asked.y or asked.x not in owners or asked.y not in owners:
        return None
    return _score(owners[asked.x]), _score(owners[asked.y])


def _condition(found: Sequence[Model], asked: Asked) -> Any:
    least = asked.threshold - _NEAR
    lowest, highest = func.min(Answer.score), func.max(Answer.score)
    pair = _pair(found, asked)
    if asked.show in ("pair", "better") and pair is None:
        return lowest < 0  # never
    if asked.show == "pair" and pair:
        return (pair[0] >= least) & (pair[1] < least)
    if asked.show == "better" and pair:
        return pair[0] > pair[1] + _NEAR
    if asked.show == "all_right":
        return lowest >= least
    if asked.show == "all_wrong":
        return highest < least
    if asked.show == "lost":
        base = next((one.owner for one in found if one.key == "base"), "")
        return (_score(base) >= least) & (lowest < least)
    return lowest >= 0


def _order(found: Sequence[Model], asked: Asked) -> list[Any]:
    if asked.sort == "loss":
        return [func.coalesce(func.avg(Answer.loss), -1.0).desc()]
    if asked.sort == "difference":
        pair = _pair(found, asked) if asked.show in ("pair", "better") else None
        between = pair[0] - pair[1] if pair else func.max(Answer.score) - func.min(Answer.score)
        return [between.desc()]
    return []


def _holds(experiment: Experiment, text: str) -> Any:
    """Whether the text stands in an answer, or in the example itself, which only its file holds."""
    wanted = text.casefold()
    test = experiment.split["test"]
    examples = datasets.rows(experiment.dataset, set(test))
    rows = [
        row
        for row, one in zip(test, examples, strict=True)
        if wanted in one.input.casefold() or wanted in one.output.casefold()
    ]
    answered = func.max(case((Answer.text.icontains(text, autoescape=True), 1), else_=0)) == 1
    # Written out: there may be more rows than a database takes as parameters.
    listed: Any = bindparam("rows", rows, expanding=True, literal_execute=True)
    return or_(answered, Answer.row.in_(listed))
