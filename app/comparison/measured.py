"""What the methods took on one base model, by the runs that have finished here."""

from typing import NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.tables import Experiment, Run

MOST_RUNS = 200  # the newest ones count


class Range(NamedTuple):
    """The least and the most of some runs."""

    low: float
    high: float


class Measured(NamedTuple):
    """Of a method's finished runs on a base model; None: no run has the figure."""

    runs: int
    seconds: Range | None  # of training
    memory_mb: Range | None  # peak
    num_bytes: Range | None  # of what is saved


def by_method(db: Session, base_model_id: str) -> dict[str, Measured]:
    """Methods' keys -> figures; a method without finished runs is not there."""
    query = (
        select(Run.method, Run.train_seconds, Run.figures)
        .join(Experiment)
        .where(Experiment.base_model_id == base_model_id, Run.state == "succeeded")
        .order_by(Run.finished_at.desc())
        .limit(MOST_RUNS)
    )
    found: dict[str, list[tuple[float, dict[str, float]]]] = {}
    for method, seconds, figures in db.execute(query):
        found.setdefault(method, []).append((seconds, figures))
    return {
        method: Measured(
            len(runs),
            _range([seconds for seconds, _ in runs]),
            _range([figures.get("peak_memory_mb") for _, figures in runs]),
            _range([figures.get("size_bytes") for _, figures in runs]),
        )
        for method, runs in found.items()
    }


def _range(values: list[float | None]) -> Range | None:
    known = [value for value in values if value]
    return Range(min(known), max(known)) if known else None
