"""Answers while runs learned, moment by moment: of one run by step, of several by share of the training."""

from collections.abc import Sequence
from hashlib import sha256
from typing import Any, NamedTuple

from sqlalchemy.orm import Session

from app import naming, runs, samples
from app.comparison import figures
from app.samples import Frame
from app.tables import Experiment, Run


class Answer(NamedTuple):
    """A cell: what a run answered, at which of its steps; None: not yet."""

    text: str | None
    step: int | None


class Moment(NamedTuple):
    """All answers of one moment: for each watched input one of each run."""

    key: int  # its step, or its share of the training
    label: str
    rows: list[tuple[str, list[Answer]]]


def of_run(db: Session, run: Run) -> dict[str, Any]:
    """For the page of a run."""
    watched = run.experiment.watch
    found = [
        Moment(frame.step, f"Step {frame.step:,}", _rows(watched, [frame]))
        for frame in (samples.frames(db, run) if watched else ())
    ]
    return _shown(watched, found, [(run, naming.name(run))], f"/runs/{run.id}/samples")


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
        moments.append(Moment(share, f"{share} % of the training", _rows(experiment.watch, newest)))
    names = naming.names(shown)
    columns = [(run, names[run.id]) for run in shown]
    again = f"/experiments/{experiment.id}/samples/moments"
    return _shown(experiment.watch, moments, columns, again)


def _shown(
    watched: Sequence[str], moments: list[Moment], columns: list[tuple[Run, str]], again: str
) -> dict[str, Any]:
    """For the template. While a run goes on its page asks `again`, with a mark of what it shows."""
    going = any(run.state not in runs.FINAL for run, _ in columns)
    shown = repr((going, moments, [name for _, name in columns]))
    return {
        "watched": watched,
        "moments": moments,
        "columns": columns,
        "going": going,
        "again": again,
        "seen": sha256(shown.encode()).hexdigest()[:12],
    }


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
