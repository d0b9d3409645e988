"""The comparison on the screen: its tables, which cell is best, pairs, and answers side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from app import overlap
from app.comparison import figures, pairs, scores, verdict
from app.tables import Experiment
from app.web import formats, measures, tradeoffs
from app.web.measures import Column

PAGE = 20  # test examples on one page


@dataclass(frozen=True)
class Cell:
    text: str
    best: str
    under: str = ""


@dataclass(frozen=True)
class Line:
    key: str
    label: str
    method: str
    state: str
    cells: list[Cell]


@dataclass(frozen=True)
class Versus:
    """Two models against each other, in words and figures."""

    words: str
    seen: bool
    points: str
    interval: str  # corrected for all pairs
    p: str


@dataclass(frozen=True)
class Table:
    columns: list[Column]
    lines: list[Line]
    costs: list[Column]
    cost_lines: list[Line]
    majority: str  # the score of always answering the commonest label; "" where there are none
    verdict: list[str]
    pairs: list[Versus]
    pairs_note: str  # where they are judged by another score than the table's
    charts: list[tradeoffs.Chart]
    num_test: int
    note: str
    warning: str  # of test examples that were trained on; "" where there are none
    measured: bool  # whether there is anything to compare


def table(db: Session, experiment: Experiment) -> Table:
    """Base model first, then the runs."""
    found = figures.compare(db, experiment)
    columns, costs = measures.of_answers(experiment.task, found.rows), measures.COSTS
    return Table(
        columns,
        _lines(columns, found.rows),
        costs,
        _lines(costs, [row for row in found.rows if row.key != "base" or row.first_token_seconds]),
        "" if found.majority is None else formats.percent(found.majority),
        verdict.of(found, experiment.task),
        [_versus(found, pair) for pair in found.pairs],
        scores.BY_SINGLE.get(found.metric, ""),
        tradeoffs.charts(found, scores.METRICS[experiment.task][found.metric]),
        found.num_test,
        _note(experiment.task, found),
        overlap.words(found.num_trained_on, found.num_test),
        any(row.score is not None for row in found.rows),
    )


def _lines(columns: Sequence[Column], rows: Sequence[figures.Row]) -> list[Line]:
    best = [_best(column, rows) for column in columns]
    return [
        Line(
            row.key,
            row.label,
            row.method,
            row.state,
            [
                Cell(
                    column.text(column.value(row)),
                    column.best if row.key in winners else "",
                    column.under(row),
                )
                for column, winners in zip(columns, best, strict=True)
            ],
        )
        for row in rows
    ]


def _versus(found: figures.Comparison, pair: pairs.Pair) -> Versus:
    one = pair.difference
    low, high = (f"{100 * end:+.1f}" for end in one.corrected)
    return Versus(
        pairs.words(pair, found.labels, found.num_test),
        one.seen,
        f"{100 * one.points:+.1f}",
        f"{low} to {high}",
        "< 0.001" if one.p_corrected < 0.001 else f"{one.p_corrected:.3f}",
    )


def _best(column: Column, rows: Sequence[figures.Row]) -> set[str]:
    """Of what has ended well, the rows with the best figure as it is written; none where all are equal."""
    values = {
        row.key: value
        for row in rows
        if row.state == "succeeded"
        and (column.base or row.key != "base")
        and (value := column.value(row)) is not None
    }
    if not column.best or len({column.text(value) for value in values.values()}) < 2:
        return set()
    top = column.text(max(values.values(), key=lambda value: column.sign * value))
    return {key for key, value in values.items() if column.text(value) == top}


def _note(task: str, found: figures.Comparison) -> str:
    label = scores.METRICS[task][found.metric]
    known = f", {found.num_trained_on:,} of which stand in the training part too"
    note = (
        f"Scores on {found.num_test:,} test examples"
        f"{known if found.num_trained_on else ' that no run has trained on'}. Under each stands "
        f"its 95 % interval. {label} comes first: the task is judged by it."
    )
    return f"{note} {scores.NORMALISED[task]}." if task in scores.NORMALISED else note


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
