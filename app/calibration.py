"""How right forecasts were, and what that makes of the next one: finished runs and rehearsals correct it.

The rule: of the last 8 runs of the same method and base model on the same kind of device, the median
of measured over reckoned. For memory that ratio is of what arithmetic cannot know (the program's own
memory, activations, working memory); weights, gradients and the optimizer's values stay exact. How fast
a short run was says little: to its time some seconds are added at the pace of all runs on the base model.
A rehearsal of the very configuration goes before runs.
"""

from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.tables import Experiment, Run

LAST = 8  # runs that count
FEW_SECONDS = 20.0  # reckoned ones by which each run counts as longer, at the usual pace
LEAST, MOST = 0.2, 5.0  # bounds of a ratio of memory: whatever is beyond is no slack
# How far the time may lie from the middle, by what it is told from; the spread of several runs
# widens it.
SPREAD = {
    "runs": (0.85, 1.2),
    "run": (0.75, 1.35),  # one alone
    "rehearsal": (0.75, 1.35),
    "others": (0.5, 2.0),  # runs of other methods on the same base model
    "shapes": (0.33, 3.0),
}
CPU, GPU = "cpu", "cuda"


class Reckoned(NamedTuple):
    """What arithmetic says of a run on one kind of device, before any correction."""

    known_mb: float  # weights, adapters, gradients, optimizer
    guessed_mb: float  # the program, activations and working memory
    train: float  # seconds
    other: float
    base: float = 0.0  # to measure the base model, which one run of an experiment does


class Seconds(NamedTuple):
    """A part of a run's time."""

    measured: float
    reckoned: float

    @property
    def ratio(self) -> float:
        """Measured over reckoned."""
        return self.measured / self.reckoned


class Ratio(NamedTuple):
    """Measured over reckoned: the middle, and where it may lie; `source` as in SPREAD."""

    source: str
    middle: float
    low: float
    high: float


class Error(NamedTuple):
    """How far forecasts were from what was measured, as shares of it: above it is positive."""

    runs: int
    low: float
    high: float


class Calibration(NamedTuple):
    """What is known of a method on a base model and a kind of device."""

    memory: Ratio
    train: Ratio
    other: Ratio
    runs: int
    memory_error: Error | None
    time_error: Error | None


class Compared(NamedTuple):
    """A figure of a run as it was forecast and as it was measured; None: not known."""

    what: str  # memory_mb, train_seconds, seconds, size_bytes
    forecast: float | None
    measured: float | None

    @property
    def error(self) -> float | None:
        """Of the forecast, as a share of what was measured."""
        if not self.forecast or not self.measured:
            return None
        return self.forecast / self.measured - 1


def compared(run: Run) -> list[Compared]:
    """The forecast that the run was created with against what it took; for screens and benchmarks.

    Memory is the high-water mark of the training process (of the GPU where there is one), `seconds`
    goes from the claim to the end and is left out where the run was interrupted.
    """
    told, figures = run.forecast, run.figures
    gpu = figures.get("device_kind") == GPU
    whole = None
    if run.state == "succeeded" and run.attempt == 1 and run.started_at and run.finished_at:
        whole = run.finished_at - run.started_at
    return [
        Compared(
            "memory_mb",
            told.get("gpu_memory_mb" if gpu else "memory_mb"),
            figures.get("peak_memory_mb"),
        ),
        Compared(
            "train_seconds",
            told.get("train_seconds"),
            run.train_seconds if run.state == "succeeded" else None,
        ),
        Compared("seconds", told.get("seconds"), whole),
        Compared("size_bytes", told.get("size_bytes"), figures.get("size_bytes")),
    ]


def of(db: Session, base_model_id: str, method: str, kind: str) -> Calibration:
    """By the last runs; where there is none all ratios are 1, told from shapes."""
    every = [(run, _reckoned(run, kind)) for run in _ended(db, base_model_id, kind)]
    found = [(run, was) for run, was in every if run.method == method][:LAST]
    runs = [run for run, _ in found]
    memory = [
        (run.figures["peak_memory_mb"] - was.known_mb) / was.guessed_mb
        for run, was in found
        if was and run.figures.get("peak_memory_mb")
    ]
    memory = [min(MOST, max(LEAST, ratio)) for ratio in memory]
    train, other = _times(found)
    all_train, all_other = _times(every)
    speed = _pace(train, all_train)
    return Calibration(
        memory=_ratio(memory),
        train=speed,
        other=_pace(other, all_other) if all_other else speed,
        runs=len(runs),
        memory_error=_error(runs, "memory_mb"),
        time_error=_error(runs, "seconds"),
    )


def _ended(db: Session, base_model_id: str, kind: str) -> list[Run]:
    """Runs that succeeded on the base model and that kind of device, the last first."""
    query = (
        select(Run)
        .join(Experiment, Run.experiment_id == Experiment.id)
        .where(Run.state == "succeeded", Experiment.base_model_id == base_model_id)
        .order_by(Run.finished_at.desc())
        .limit(8 * LAST)
    )
    afresh = query.execution_options(populate_existing=True)
    return [run for run in db.scalars(afresh) if run.figures.get("device_kind", CPU) == kind]


def _reckoned(run: Run, kind: str) -> Reckoned | None:
    found = run.forecast.get("reckoned", {}).get(kind)
    return Reckoned(**found) if found else None


def _times(found: Sequence[tuple[Run, Reckoned | None]]) -> tuple[list[Seconds], list[Seconds]]:
    """Of each run the training's time and the rest's."""
    train, other = [], []
    for run, was in found:
        if was is None or not run.train_seconds or run.attempt != 1:
            continue
        train.append(Seconds(run.train_seconds, was.train))
        if run.started_at and run.finished_at:
            rest = run.finished_at - run.started_at - run.train_seconds
            rest -= run.figures.get("base_seconds", 0.0)  # of whichever run was first
            other.append(Seconds(max(0.0, rest), was.other))
    return train, other


def _pace(own: Sequence[Seconds], every: Sequence[Seconds]) -> Ratio:
    """Of a method's own runs, where there are some, each with a few seconds more at the pace of `every` run."""
    usual = _ratio([one.ratio for one in every[:LAST]], "others")
    if not own:
        return usual
    more, seen = FEW_SECONDS * usual.middle, [one.ratio for one in own]
    found = _ratio([(one.measured + more) / (one.reckoned + FEW_SECONDS) for one in own])
    return found._replace(low=min(found.low, *seen), high=max(found.high, *seen))


def _ratio(found: Sequence[float], source: str = "") -> Ratio:
    """Their median, and a range that holds them all."""
    if not found:
        return Ratio("shapes", 1.0, *SPREAD["shapes"])
    source = source or ("runs" if len(found) > 1 else "run")
    middle, (low, high) = median(found), SPREAD[source]
    return Ratio(source, middle, min(low * middle, *found), max(high * middle, *found))


def rehearsal(memory: float, train: float) -> tuple[Ratio, Ratio]:
    """The ratios that a rehearsal gives: of memory and of the time of a step."""
    low, high = SPREAD["rehearsal"]
    held = min(MOST, max(LEAST, memory))
    return (
        Ratio("rehearsal", held, held * low, held * high),
        Ratio("rehearsal", train, train * low, train * high),
    )


def _error(runs: Sequence[Run], what: str) -> Error | None:
    every = [one.error for run in runs for one in compared(run) if one.what == what]
    known = [error for error in every if error is not None]
    return Error(len(known), min(known), max(known)) if known else None


def as_dict(error: Error | None) -> dict[str, Any] | None:
    """For the stored forecast and JSON."""
    return error._asdict() if error else None
