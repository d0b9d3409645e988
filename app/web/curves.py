"""The points of an experiment's runs as rows: for a table on a page and for a CSV file."""

import csv
import io
from collections.abc import Iterator
from typing import Any

from sqlalchemy.orm import Session

from app import database, experiments, points
from app.comparison import figures
from app.tables import Experiment
from app.web import formats

PAGE = 100  # steps on one page
COLUMNS = (
    "number",
    "kind",
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "memory_mb",
    "seconds",
    "tokens",
)


def table(db: Session, experiment: Experiment, page: int) -> dict[str, Any]:
    """A page of steps, each with train and validation loss of every run in words."""
    shown = figures.ordered(experiment)
    losses = {
        (run.id, point.kind, point.step): point.loss
        for run in shown
        for point in points.curve(db, run.id)
    }
    every = sorted({step for _, _, step in losses})
    pages = max(1, -(-len(every) // PAGE))
    page = min(max(1, page), pages)
    keys = [(run.id, kind) for run in shown for kind in ("train", "validation")]
    steps = [
        (step, [_cell(losses, (*key, step)) for key in keys])
        for step in every[(page - 1) * PAGE : page * PAGE]
    ]
    return {"shown": shown, "steps": steps, "page": page, "pages": pages}


def _cell(losses: dict[tuple[str, str, int], float | None], key: tuple[str, str, int]) -> str:
    if key not in losses:
        return ""
    loss = losses[key]
    return "not a number" if loss is None else formats.figure(loss)


def as_csv(experiment_id: str) -> Iterator[str]:
    """The file, line by line; a loss that was not a number is an empty cell."""
    line = io.StringIO()
    writer = csv.writer(line, lineterminator="\r\n")
    writer.writerow(("run", "method", *COLUMNS))
    with database.reading() as db:
        for run in figures.ordered(experiments.get(db, experiment_id)):
            for point in points.curve(db, run.id):
                writer.writerow(
                    (run.id, run.method, *(getattr(point, column) for column in COLUMNS))
                )
            yield line.getvalue()
            line.seek(0)
            line.truncate()
