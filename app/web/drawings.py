"""The loss curves as a drawing that needs no script: for the report."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from app import methods, points
from app.tables import Run

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 900, 300, 56, 12, 36
MOST = 400  # steps that a curve is drawn from, so that the file stays small


@dataclass(frozen=True)
class Curve:
    """A run's train loss at evenly spread steps, and its validation losses."""

    label: str
    method: str
    dash: str
    path: str
    marks: list[tuple[float, float]]


@dataclass(frozen=True)
class Drawing:
    """All curves on common axes."""

    curves: list[Curve]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - 12
    bottom: int = HEIGHT - BOTTOM


Place = tuple[float, float]  # step, loss


def losses(db: Session, runs: Sequence[Run], labels: dict[str, str]) -> Drawing | None:
    """None while no run has two points."""
    train: dict[str, list[Place]] = {}
    validation: dict[str, list[Place]] = {}
    for run in runs:
        found = points.sampled(db, run.id, MOST)
        train[run.id] = _places(found, "train")
        validation[run.id] = _places(found, "validation")
    every = [place for curve in (*train.values(), *validation.values()) for place in curve]
    if len(every) < 2:
        return None
    last = max(1.0, max(step for step, _ in every))
    low, high = min(loss for _, loss in every), max(loss for _, loss in every)
    high = max(high, low + 1e-3)

    def at(place: Place) -> Place:
        x = LEFT + place[0] / last * (WIDTH - 12 - LEFT)
        y = TOP + (high - place[1]) / (high - low) * (HEIGHT - BOTTOM - TOP)
        return round(x, 1), round(y, 1)

    return Drawing(
        [
            Curve(
                labels[run.id],
                run.method,
                methods.get(run.method).dash,
                "M" + " L".join(f"{x} {y}" for x, y in map(at, train[run.id])),
                [at(place) for place in validation[run.id]],
            )
            for run in runs
            if train[run.id]
        ],
        [(at((step, low))[0], words) for step, words in ticks(0, last, least=1)],
        [(at((0, loss))[1], words) for loss, words in ticks(low, high)],
    )


def ticks(low: float, high: float, least: float = 0.0) -> list[tuple[float, str]]:
    """Round values in between and how they are written: 1, 2 or 5 apart, or such a power of ten's."""
    rough = max((high - low) / 5, least)
    power = math.floor(math.log10(rough) + 1e-9)
    step = next(lead * 10.0**power for lead in (1, 2, 5, 10) if lead * 10.0**power >= rough * 0.999)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(place * step, f"{place * step:,.{digits}f}") for place in range(first, last + 1)]


def _places(found: Sequence[Any], kind: str) -> list[Place]:
    return [(one.step, one.loss) for one in found if one.kind == kind and one.loss is not None]
