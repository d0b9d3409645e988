"""What a run's panel says, in words: for the page and for the stream that keeps it current."""

import re
from collections.abc import Sequence
from typing import Any

from sqlalchemy.orm import Session

from app import points
from app.comparison import figures
from app.tables import Experiment, Run
from app.web import formats

TAIL = 24  # newest points that speed and time left are told from
FEWEST_STEPS = 10  # before that, no time left is told
PHASES = {
    "loading": "Loading the model",
    "training": "Training",
    "scoring": "Answering the test examples",
    "saving": "Saving",
}
SCORING = ("Scoring ", "Measuring the base model")  # how worker/scoring.py says how far it is
COUNTED = re.compile(r"(.+), (\d+ of \d+)")
STATES = {
    "queued": "In the queue",
    "cancelling": "Cancelling",
    "pausing": "Pausing, once it has saved",
    "paused": "Paused; what was trained is kept",
    "waiting": "Waiting for disk space",
    "succeeded": "Done",
    "failed": "Failed",
    "cancelled": "Cancelled",
}
# For each state what can be done: action, label, question to ask before.
ACTIONS = {
    "queued": (("pause", "Hold"), ("cancel", "Cancel")),
    "running": (("pause", "Pause"), ("cancel", "Cancel")),
    "pausing": (("cancel", "Cancel"),),
    "paused": (("resume", "Resume"), ("cancel", "Cancel")),
    "waiting": (("resume", "Try again"), ("cancel", "Cancel")),
    "failed": (("retry", "Retry"),),
    "cancelled": (("retry", "Retry"),),
}


def all_of(db: Session, experiment: Experiment) -> list[dict[str, str]]:
    """The panels of all runs of the experiment."""
    return _panels(db, figures.ordered(experiment))


def one_of(db: Session, run: Run) -> dict[str, str]:
    """The panel of one run."""
    return _panels(db, [run])[0]


def _panels(db: Session, shown: Sequence[Run]) -> list[dict[str, str]]:
    tails: dict[str, list[Any]] = {run.id: [] for run in shown}
    for point in points.since(db, {run.id: max(0, run.last_number - TAIL) for run in shown}):
        tails[point.run_id].append(point)
    return [panel(run, tails[run.id]) for run in shown]


def panel(run: Run, tail: Sequence[Any]) -> dict[str, str]:
    """Every changing text of the panel. `tail`: the run's newest points, oldest first."""
    done = run.step / run.num_steps if run.num_steps else 0.0
    trained = [point for point in tail if point.kind == "train"]
    newest = trained[-1] if trained else None
    speed = run.figures.get("tokens_per_second") or (newest and newest.tokens_per_second)
    memory = run.figures.get("peak_memory_mb") or (newest.memory_mb if newest else None)
    return {
        "id": run.id,
        "state": run.state,
        "phase": run.phase,
        "words": words(run),
        "steps": f"step {run.step:,} of {run.num_steps:,}" if run.num_steps else "not begun",
        "share": f"{min(done, 1.0):.4f}",
        "percent": f"{min(done, 1.0) * 100:.0f} %",
        "left": time_left(run, trained),
        "time": formats.duration(run.train_seconds or None),
        "speed": f"{speed:,.0f} tokens/s" if speed else formats.NOTHING,
        "memory": formats.memory(memory),
        "best": _best(run),
        "error": run.error or "",
    }


def words(run: Run) -> str:
    """The state, or of a running run its phase, as a person would say it; without its count, so
    that it changes, and is read aloud, seldom."""
    if run.state == "running":
        doing = _counted(run)[0]
        return PHASES.get(doing) or doing[:1].upper() + doing[1:] or "Running"
    return STATES.get(run.state, run.state)


def _counted(run: Run) -> tuple[str, str]:
    """The run's phase in two: what it does, and how far it is with that, such as "64 of 80"."""
    found = COUNTED.fullmatch(run.phase)
    return (found[1], found[2]) if found else (run.phase, "")


def _after(run: Run) -> str:
    """What is said instead of the time left once there is none: how far the scoring is."""
    doing, count = _counted(run)
    if doing != "scoring" and not doing.startswith(SCORING):
        return formats.NOTHING
    return f"none; scoring, {count}" if count else "none; scoring"


def _best(run: Run) -> str:
    if run.best_loss is None:
        return formats.NOTHING
    at = "" if run.best_step is None else f", step {run.best_step:,}"
    return f"{formats.figure(run.best_loss)}{at}"


def time_left(run: Run, trained: Sequence[Any]) -> str:
    """How long training goes on: a range between the pace of late and the pace of all.

    Scoring comes after that and is not in it.
    """
    if run.state != "running" or not run.num_steps:
        return formats.NOTHING
    if run.phase not in ("", "training"):
        return _after(run)
    if run.step < FEWEST_STEPS or not run.train_seconds:
        return "estimating"
    paces = [run.train_seconds / run.step]
    if len(trained) > 1 and trained[-1].step > trained[0].step:
        first, last = trained[0], trained[-1]
        paces.append((last.seconds - first.seconds) / (last.step - first.step))
    steps = max(0, run.num_steps - run.step)
    return formats.span(min(paces) * 0.9 * steps, max(paces) * 1.15 * steps)
