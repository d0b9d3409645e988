"""The comparison as a table on the screen: columns, figures in words, and which cell is best."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from app.comparison import figures, scores
from app.tables import Experiment
from app.web import formats

PAGE = 20  # test examples on one page


@dataclass(frozen=True)
class Column:
    """One figure of each model. `best`: what the best cell is called; `sign` +1: more is better."""

    label: str
    unit: str
    value: Callable[[figures.Row], float | None]
    text: Callable[[Any], str]
    best: str = ""
    sign: int = -1
    base: bool = True  # whether the base model takes part in being best


@dataclass(frozen=True)
class Cell:
    text: str
    best: str


@dataclass(frozen=True)
class Line:
    key: str
    label: str
    method: str
    state: str
    cells: list[Cell]


@dataclass(frozen=True)
class Table:
    columns: list[Column]
    lines: list[Line]
    num_test: int
    note: str
    measured: bool  # whether there is anything to compare


def table(db: Session, experiment: Experiment) -> Table:
    """Base model first, then the runs."""
    found = figures.compare(db, experiment)
    columns = _columns(experiment.task)
    best = [_best(column, found.rows) for column in columns]
    lines = [
        Line(
            row.key,
            row.label,
            row.method,
            row.state,
            [
                Cell(column.text(column.value(row)), column.best if row.key in winners else "")
                for column, winners in zip(columns, best, strict=True)
            ],
        )
        for row in found.rows
    ]
    return Table(
        columns,
        lines,
        found.num_test,
        _note(experiment.task, found),
        any(row.score is not None for row in found.rows),
    )


def _columns(task: str) -> list[Column]:
    made = [
        Column(label, "", _metric(name), formats.percent, "best", +1)
        for name, label in scores.METRICS[task].items()
    ]
    return [
        *made,
        Column("Validation loss", "nats/token", _get("validation_loss"), formats.figure, "lowest"),
        Column("Training time", "", _get("train_seconds"), formats.duration, "quickest"),
        Column("Peak memory", "", _get("peak_memory_mb"), formats.memory, "least"),
        Column("Trained", "parameters", _get("trainable"), formats.number, "fewest", base=False),
        Column("Share", "of all", _get("share"), _share),
        Column("Saved", "size", _get("size_bytes"), formats.size, "smallest"),
    ]


def _metric(name: str) -> Callable[[figures.Row], float | None]:
    return lambda row: row.metrics.get(name)


def _get(name: str) -> Callable[[figures.Row], float | None]:
    return lambda row: getattr(row, name)


def _share(share: float | None) -> str:
    return formats.percent(share, 3 if share and share < 0.01 else 1)


def _best(column: Column, rows: Sequence[figures.Row]) -> set[str]:
    """Of what has ended well, the rows with the best figure; none where all are equal."""
    values = {
        row.key: value
        for row in rows
        if row.state == "succeeded"
        and (column.base or row.key != "base")
        and (value := column.value(row)) is not None
    }
    if not column.best or len(set(values.values())) < 2:
        return set()
    top = max(column.sign * value for value in values.values())
    return {key for key, value in values.items() if column.sign * value == top}


def _note(task: str, found: figures.Comparison) -> str:
    label = scores.METRICS[task][found.metric]
    note = f"Scores on {found.num_test:,} test examples that no run has trained on"
    if found.majority is not None:
        note += f"; always the commonest label would score {formats.percent(found.majority)}"
    return f"{note}. {label} comes first: the task is judged by it."


@dataclass(frozen=True)
class Answer:
    """What one model said. Verdict: right, part or wrong, said in words as well."""

    text: str
    verdict: str
    words: str


def side_by_side(db: Session, experiment: Experiment, page: int) -> dict[str, Any]:
    """A page of test examples with every model's answer."""
    total = len(experiment.split["test"])
    pages = max(1, -(-total // PAGE))
    page = min(max(1, page), pages)
    found = figures.answers(db, experiment, start=(page - 1) * PAGE, limit=PAGE)
    examples = [
        {
            "input": one.input,
            "expected": one.expected,
            "answers": [_answer(given) for given in one.answers],
        }
        for one in found
    ]
    return {"examples": examples, "answered": _answered(found), "page": page, "pages": pages}


def _answered(found: Sequence[figures.Example]) -> list[int]:
    """Places of the models that have answered something on this page."""
    return [
        place
        for place in range(len(found[0].answers) if found else 0)
        if any(one.answers[place] for one in found)
    ]


def _answer(given: tuple[str, float] | None) -> Answer | None:
    if given is None:
        return None
    text, score = given
    if score >= 0.9995:
        return Answer(text, "right", "right")
    if score <= 0.0005:
        return Answer(text, "wrong", "wrong")
    return Answer(text, "part", f"{score * 100:.0f} %")
