"""Answers while runs learned, moment by moment: of one run by step, of several by share of the training."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy.orm import Session

from app import naming, samples
from app.comparison import figures
from app.samples import Frame
from app.tables import Experiment, Run


class Answer(NamedTuple):
    """A cell: what a run answered, at which of its steps; None: not yet."""

    text: str | None
    step: int | None


class Moment(NamedTuple):
    """All answers of one moment: for each watched input one of each run."""

    label: str
    rows: list[tuple[str, list[Answer]]]


def of_run(db: Session, run: Run) -> dict[str, Any]:
    """For the page of a run."""
    watched = run.experiment.watch
    found = [
        Moment(f"Step {frame.step:,}", _rows(watched, [frame]))
        for frame in (samples.frames(db, run) if watched else ())
    ]
    return {"watched": watched, "moments": found, "columns": [(run, naming.name(run))]}


def of_experiment(db: Session, experiment: Experiment) -> dict[str, Any]:
    """All runs side by side: at each moment the newest answer of each, as their steps differ."""
    shown = figures.ordered(experiment)
    frames = [samples.frames(db, run) if experiment.watch else [] for run in shown]
    shares = [
        [_share(frame.step, run.num_steps or 0) for frame in of]
        for run, of in zip(shown, frames, strict=True)
    ]
    moments = []
    for share in sorted({one for of in shares for one in of}):
        newest = [_newest(of, known, share) for of, known in zip(frames, shares, strict=True)]
        moments.append(Moment(f"{share} % of the training", _rows(experiment.watch, newest)))
    names = naming.names(shown)
    columns = [(run, names[run.id]) for run in shown]
    return {"watched": experiment.watch, "moments": moments, "columns": columns}


def _share(step: int, num_steps: int) -> int:
    """Percent of the training, in fives: looks of different runs seldom fall on the same one."""
    return max(5, 5 * round(20 * step / max(step, num_steps))) if step else 0


def _newest(frames: Sequence[Frame], shares: Sequence[int], share: int) -> Frame | None:
    until = [frame for frame, its in zip(frames, shares, strict=True) if its <= share]
    return until[-1] if until else None


def _rows(watched: Sequence[str], frames: Sequence[Frame | None]) -> list[tuple[str, list[Answer]]]:
    return [
        (
            input,
            [Answer(one.texts[place], one.step) if one else Answer(None, None) for one in frames],
        )
        for place, input in enumerate(watched)
    ]
