"""Score against memory, time and size, as drawings that need no script: places of all parts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from app.comparison.figures import Comparison, Row
from app.web import formats

WIDTH, HEIGHT = 420, 280
LEFT, RIGHT, TOP, BOTTOM = 48, 16, 36, 44
LABEL_ROOM = 14  # between the lines of two labels that stand side by side
COSTS: tuple[tuple[str, Callable[[Row], float | None], Callable[[float], str]], ...] = (
    ("peak memory", lambda row: row.peak_memory_mb, formats.memory),
    ("training time", lambda row: row.train_seconds, formats.duration),
    ("size saved with the tokenizer", lambda row: row.size_bytes, formats.size),
)


@dataclass(frozen=True)
class Dot:
    """One run: its place, its interval as a vertical line, and what is read out of it."""

    key: str
    label: str
    method: str
    x: float
    y: float
    low: float
    high: float
    said: str
    label_x: float
    label_y: float
    anchor: str


@dataclass(frozen=True)
class Rail:
    """A horizontal line: what stands in every chart without a cost."""

    y: float
    label: str
    kind: str  # base, majority


@dataclass(frozen=True)
class Chart:
    """One drawing; the best trade-offs are joined by `path`."""

    title: str
    cost: str
    dots: list[Dot]
    rails: list[Rail]
    path: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def charts(found: Comparison, metric: str) -> list[Chart]:
    """Of the runs that have a score; none of a cost that fewer than two have."""
    rows = [row for row in found.rows if row.score is not None and row.key != "base"]
    made = []
    for cost, value, words in COSTS:
        known = [(row, at) for row in rows if (at := value(row))]
        if len(known) > 1:
            made.append(_chart(found, known, cost, words, metric))
    return made


def best(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the (cost, score) points that none beats in both, from the cheapest on."""
    chosen: list[int] = []
    for place in sorted(
        range(len(points)), key=lambda place: (points[place][0], -points[place][1])
    ):
        if not chosen or points[place][1] > points[chosen[-1]][1]:
            chosen.append(place)
    return chosen


def _chart(
    found: Comparison,
    known: Sequence[tuple[Row, float]],
    cost: str,
    words: Callable[[float], str],
    metric: str,
) -> Chart:
    levels = _levels(found)
    ends = [end for row, _ in known for end in (row.interval or (row.score or 0.0,))]
    y_low, y_high, y_ticks = _scores_axis([*ends, *(level for level, _, _ in levels)])
    x_at, x_ticks = _costs_axis([at for _, at in known])

    def y_at(score: float) -> float:
        share = (score - y_low) / (y_high - y_low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP), 1)

    dots = _apart([_dot(row, x_at(at), y_at, words(at), metric) for row, at in known])
    joined = [dots[place] for place in best([(at, row.score or 0.0) for row, at in known])]
    return Chart(
        f"{metric} against {cost}",
        cost,
        dots,
        [Rail(y_at(level), label, kind) for level, label, kind in levels],
        "M" + " L".join(f"{dot.x} {dot.y}" for dot in joined),
        [(x_at(at), words(at)) for at in x_ticks],
        [(y_at(at), f"{100 * at:.0f} %") for at in y_ticks],
    )


def _levels(found: Comparison) -> list[tuple[float, str, str]]:
    base = next((row.score for row in found.rows if row.key == "base"), None)
    made = [] if base is None else [(base, "base model", "base")]
    return made + (
        [] if found.majority is None else [(found.majority, "commonest label", "majority")]
    )


def _scores_axis(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """From where to where, and the lines between: 4 to 8 of them."""
    span = max(max(values) - min(values), 0.02)
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2) if span / step <= 7)
    low = max(0.0, math.floor(min(values) / step) * step)
    high = min(1.0, math.ceil(max(values) / step) * step)
    high = max(high, low + step)
    ticks = [low + place * step for place in range(round((high - low) / step) + 1)]
    return low, high, ticks


def _costs_axis(values: Sequence[float]) -> tuple[Callable[[float], float], list[float]]:
    """Where a cost stands: by its logarithm, so that ten times as much is as far everywhere."""
    low, high = math.log10(min(values)), math.log10(max(values))
    room = max(0.08, (high - low) * 0.08)
    low, high = low - room, high + room
    whole = [
        lead * 10.0**power
        for power in range(math.floor(low), math.ceil(high) + 1)
        for lead in ((1, 2, 5) if high - low < 2 else (1,))
    ]
    ticks = [at for at in whole if low <= math.log10(at) <= high]
    ticks = ticks[:: max(1, math.ceil(len(ticks) / 5))]
    if len(ticks) < 2:
        ticks = sorted({min(values), max(values)})

    def place(value: float) -> float:
        return round(LEFT + (math.log10(value) - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    return place, ticks


def _dot(row: Row, x: float, y_at: Callable[[float], float], cost: str, metric: str) -> Dot:
    score = row.score or 0.0
    low, high = row.interval or (score, score)
    is_right = x > LEFT + 0.6 * (WIDTH - LEFT - RIGHT)
    return Dot(
        row.key,
        row.label,
        row.method,
        x,
        y_at(score),
        y_at(low),
        y_at(high),
        f"{row.label}: {metric} {100 * score:.1f} % ({100 * low:.1f} to {100 * high:.1f}), {cost}",
        x - 9 if is_right else x + 9,
        y_at(score) - 5,
        "end" if is_right else "start",
    )


def _apart(dots: Sequence[Dot]) -> list[Dot]:
    """The same with labels that do not lie on each other."""
    placed: dict[int, Dot] = {}
    for place in sorted(range(len(dots)), key=lambda place: dots[place].y):
        dot = dots[place]
        near = [one.label_y for one in placed.values() if abs(one.x - dot.x) < WIDTH / 3]
        y = max([dot.label_y, *(at + LABEL_ROOM for at in near)])
        placed[place] = Dot(**{**vars(dot), "label_y": min(y, HEIGHT - BOTTOM - 3)})
    return [placed[place] for place in range(len(dots))]
