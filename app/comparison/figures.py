"""The side-by-side of an experiment: one row for the base model and for each run, measured."""

from typing import Any, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import datasets, methods, naming
from app.comparison import baselines, scores
from app.tables import Answer, Experiment


class Row(NamedTuple):
    """What was measured of one model. None: not measured, or not yet."""

    key: str  # run id, or "base"
    label: str
    method: str  # a method's key, or "base"
    state: str
    score: float | None  # the task's first metric, on the test split
    metrics: dict[str, float]
    validation_loss: float | None  # best; nats per target token
    test_loss: float | None
    train_seconds: float | None
    peak_memory_mb: float | None
    trainable: int | None
    total: int | None
    share: float | None  # trainable / total
    size_bytes: int | None  # of what is saved


class Example(NamedTuple):
    """One test example with each model's answer, in the order of the rows: (text, score)."""

    row: int
    input: str
    expected: str
    answers: list[tuple[str, float] | None]


class Comparison(NamedTuple):
    """Base model first, then the runs in the order of their methods."""

    metric: str  # name of the first metric
    rows: list[Row]
    num_test: int
    majority: float | None  # classification: the score of always answering the commonest label


baseline = baselines.find  # the pages' way to the base model's figures


def compare(db: Session, experiment: Experiment) -> Comparison:
    """The table of the experiment, as far as it has been measured."""
    metric = scores.primary(experiment.task)
    base = baselines.find(db, experiment)
    found = base.scores if base else {}
    rows = [
        Row(
            key="base",
            label="Base model",
            method="base",
            state="succeeded" if found else "",
            score=found.get("metrics", {}).get(metric),
            metrics=found.get("metrics", {}),
            validation_loss=base.validation_loss if base else None,
            test_loss=found.get("test_loss"),
            train_seconds=None,
            peak_memory_mb=None,
            trainable=0,
            total=experiment.base_model.shapes.get("parameters"),
            share=0.0,
            size_bytes=None,
        )
    ]
    names = naming.names(experiment.runs)
    rows += [_row(run, names[run.id], metric) for run in ordered(experiment)]
    return Comparison(metric, rows, len(experiment.split["test"]), _majority(experiment))


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """For JSON."""
    rows = [row._asdict() for row in comparison.rows]
    return comparison._asdict() | {"rows": rows}


def ordered(experiment: Experiment) -> list[Any]:
    """The runs by method, as the tables have them."""
    return sorted(
        experiment.runs, key=lambda run: (methods.get(run.method).order, run.position, run.id)
    )


def _row(run: Any, name: str, metric: str) -> Row:
    figures, measured = run.figures, run.scores.get("metrics", {})
    trainable, total = figures.get("trainable_parameters"), figures.get("total_parameters")
    return Row(
        key=run.id,
        label=name,
        method=run.method,
        state=run.state,
        score=measured.get(metric),
        metrics=measured,
        validation_loss=run.best_loss,
        test_loss=run.scores.get("test_loss"),
        train_seconds=run.train_seconds or None,
        peak_memory_mb=figures.get("peak_memory_mb"),
        trainable=trainable,
        total=total,
        share=trainable / total if trainable and total else None,
        size_bytes=figures.get("size_bytes"),
    )


_majorities: dict[str, float] = {}  # by experiment: neither its dataset nor its split changes


def _majority(experiment: Experiment) -> float | None:
    if experiment.task != "classification":
        return None
    if experiment.id not in _majorities:
        _majorities[experiment.id] = _share_of_commonest(experiment)
    return _majorities[experiment.id]


def _share_of_commonest(experiment: Experiment) -> float:
    rows = datasets.rows(experiment.dataset)
    outputs = [rows[index].output for index in experiment.split["train"]]
    commonest = max(sorted(set(outputs)), key=outputs.count)
    test = [rows[index].output for index in experiment.split["test"]]
    return test.count(commonest) / len(test)


def answers(
    db: Session, experiment: Experiment, *, start: int = 0, limit: int = 20
) -> list[Example]:
    """Test examples with every model's answer, a page at a time."""
    base = baselines.find(db, experiment)
    owners = [base.key if base else "", *[run.id for run in ordered(experiment)]]
    page = experiment.split["test"][start : start + limit]
    query = select(Answer).where(Answer.owner.in_(owners), Answer.row.in_(page))
    given = {
        (answer.owner, answer.row): (answer.text, answer.score) for answer in db.scalars(query)
    }
    shown = datasets.rows(experiment.dataset, set(page))  # a split is in ascending order
    rows = dict(zip(page, shown, strict=True))
    return [
        Example(
            index,
            rows[index].input,
            rows[index].output,
            [given.get((owner, index)) for owner in owners],
        )
        for index in page
    ]
