"""What must be true of the tables and files at any moment: each rule says what breaks it."""

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import runs, storage
from app.files import is_published
from app.registry import MANIFEST, is_good
from app.storage import Path
from app.tables import Checkpoint, Dataset, Point, Run, Sample

KINDS = ("train", "validation")  # in the order in which they are measured at a step


class Finding(NamedTuple):
    """Something that must not be: the rule it breaks, the row it is about, and what is wrong."""

    rule: str
    row_id: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.row_id}: {self.sentence} ({self.rule})"


def states_are_known(db: Session) -> Iterator[tuple[str, str]]:
    """A run is in one of the states, and has what belongs to it."""
    for run in db.scalars(select(Run)):
        if run.state not in runs.STATES:
            yield run.id, f"The state {run.state!r} does not exist."
        if (run.finished_at is not None) != (run.state in runs.FINAL):
            yield run.id, f"It is {run.state}, but the time of its end says otherwise."
        if run.state == "failed" and not run.error:
            yield run.id, "It failed without a reason."


def held_runs_have_a_lease(db: Session) -> Iterator[tuple[str, str]]:
    """Who works on a run holds a lease on it; a run that nobody works on has none."""
    for run in db.scalars(select(Run)):
        lease = (run.worker, run.lease_until, run.clock)
        if run.state in runs.HELD and (None in lease or run.attempt < 1):
            yield run.id, f"It is {run.state}, but no worker holds a lease on it."
        if run.state not in runs.HELD and lease != (None, None, None):
            yield run.id, f"It is {run.state}, but a lease on it is left."


def steps_have_no_gap(db: Session) -> Iterator[tuple[str, str]]:
    """Each step up to a run's last has one train point, and no point lies beyond it."""
    for run in db.scalars(select(Run)):
        steps = _steps(db, run, "train")
        if steps != list(range(1, len(steps) + 1)):
            yield run.id, "Its train points leave out a step."
        if steps and steps[-1] != run.step:
            yield run.id, f"It is at step {run.step}, but its last train point is of {steps[-1]}."
        looks = _steps(db, run, "validation")
        if looks and looks[-1] > max(steps, default=0):
            yield run.id, "A validation point lies beyond its last step."
        if run.state == "succeeded" and not (run.step == run.num_steps == (looks or [0])[-1]):
            yield run.id, "It succeeded without a point of each kind at its last step."


def _steps(db: Session, run: Run, kind: str) -> list[int]:
    query = select(Point.step).where(Point.run_id == run.id, Point.kind == kind)
    return list(db.scalars(query.order_by(Point.step)))


def numbers_rise(db: Session) -> Iterator[tuple[str, str]]:
    """The numbers of a run's points rise with their steps, none twice, none above its last."""
    for run in db.scalars(select(Run)):
        query = select(Point.number, Point.step, Point.kind).where(Point.run_id == run.id)
        found = sorted(db.execute(query), key=lambda one: (one.step, KINDS.index(one.kind)))
        numbers = [one.number for one in found]
        if any(later <= earlier for earlier, later in pairwise(numbers)):
            yield run.id, "The numbers of its points do not rise with the steps."
        if numbers and numbers[-1] > run.last_number:
            yield run.id, f"It has points numbered above {run.last_number}, its last number."


def samples_fit_their_run(db: Session) -> Iterator[tuple[str, str]]:
    """A sample answers an input that the experiment watches, at a step that its run has done."""
    for run in db.scalars(select(Run)):
        for one in db.scalars(select(Sample).where(Sample.run_id == run.id)):
            if one.step > run.step:
                yield run.id, f"It answered at step {one.step}, beyond its step {run.step}."
            if one.place >= len(run.experiment.watch):
                yield run.id, "It answered an input that its experiment does not watch."


def tuned_models_are_whole(db: Session) -> Iterator[tuple[str, str]]:
    """A run that succeeded has left its best and its last state, and they can be loaded."""
    for run in db.scalars(select(Run).where(Run.state == "succeeded")):
        if run.deleted_at is not None:
            continue
        for folder in (storage.tuned_model_folder(run.id), storage.last_model_folder(run.id)):
            if not folder.is_dir() and is_published(folder, run.attempt):
                continue
            if not folder.is_dir():
                yield run.id, f"Its folder {folder.name!r} is missing."
                continue
            files = list(folder.glob("*.safetensors"))
            if not files:
                yield run.id, f"There are no weights in its folder {folder.name!r}."
            for file in files:
                if fault := weights_fault(file):
                    yield run.id, f"{folder.name}/{file.name} {fault}."


def weights_fault(path: Path) -> str | None:
    """What is wrong with a safetensors file by its own header, or None."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > 100_000_000:
                return "has a header that cannot be read"
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"cannot be read ({type(error).__name__})"
    expected = 8 + length + max(ends, default=0)
    if path.stat().st_size != expected:
        return f"has {path.stat().st_size} bytes where its header tells of {expected}"
    return None


def checkpoints_are_there(db: Session) -> Iterator[tuple[str, str]]:
    """A checkpoint that has a row has its folder, with the manifest that the row was given for."""
    for one in db.scalars(select(Checkpoint)):
        folder = storage.checkpoint_folder(one.run_id, one.step, one.attempt)
        if not folder.exists() and is_published(folder):
            continue
        if not (folder / MANIFEST).is_file():
            yield one.run_id, f"The checkpoint of step {one.step} has no manifest."
        elif not is_good(folder, one.digest):
            yield one.run_id, f"The checkpoint of step {one.step} has another manifest."


def datasets_have_files(db: Session) -> Iterator[tuple[str, str]]:
    """A dataset's file is there, as long as it was stored."""
    for dataset in db.scalars(select(Dataset)):
        file = storage.dataset_file(dataset.id)
        if not file.exists() and is_published(file):
            continue
        if not file.is_file():
            yield dataset.id, "The dataset's file is missing."
        elif storage.size(file) != dataset.num_bytes:
            yield dataset.id, "The dataset's file has another size than it was stored with."


RULES: tuple[Callable[[Session], Iterator[tuple[str, str]]], ...] = (
    states_are_known,
    held_runs_have_a_lease,
    steps_have_no_gap,
    numbers_rise,
    samples_fit_their_run,
    tuned_models_are_whole,
    checkpoints_are_there,
    datasets_have_files,
)


def check(db: Session) -> list[Finding]:
    """All that breaks a rule. Look twice while workers are at work: files change between looks."""
    return [Finding(rule.__name__, *found) for rule in RULES for found in rule(db)]
