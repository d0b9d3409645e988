"""Consumes a training: records its points, keeps the best state, saves, and stops when told to."""

import time
from collections.abc import Callable
from typing import Any

from app import database, points, registry, runs, space, storage
from app.crashpoints import crashpoint
from app.points import Measured
from app.settings import settings
from worker import backbones, checkpoints
from worker.job import Job
from worker.watch import Stopped

RECORD_SECONDS = 0.2  # on a fast machine points are stored together, this often
KEPT = 2  # checkpoints


def save(job: Job, model: Any, state: checkpoints.State, folder: storage.Path) -> None:
    """Write what was tuned, as people take it away, in the place of what stood there.

    Under a name of this attempt first: a process that has lost its claim puts nothing in place.
    """
    base = job.run.experiment.base_model
    new = folder.with_name(f".{folder.name}-{job.run.attempt}")
    space.check(sum(value.nbytes for value in state.trained.values()) + 2**24)
    try:
        backbones.save_tuned(
            model,
            new,
            base_name=base.address if base.source == "hub" else base.name,
            base_folder=storage.base_model_folder(base.id),
            machine=job.machine,
        )
        crashpoint("tuned.written")
        _while_held(job, lambda: checkpoints.place(new, folder))
    except Exception:
        storage.remove(new)
        storage.remove(new.with_name(f".{new.name}.new"))
        raise


def _while_held(job: Job, act: Callable[[], None]) -> None:
    """Do it while the run's row is locked by this attempt, which others can not take over then."""

    def locked(db: Any) -> None:
        runs.lock(db, job.run.id, job.run.attempt)
        act()
        db.commit()

    database.lasting(locked)


def resume(job: Job, state: checkpoints.State) -> None:
    """Bring the state to the newest checkpoint that is whole, and take back what came after it."""
    run = job.run
    checkpoints.mend(storage.tuned_model_folder(run.id))
    rows = database.lasting(lambda db: registry.of(db, run.id))
    found = [
        checkpoints.Found(
            one.step,
            one.attempt,
            storage.checkpoint_folder(run.id, one.step, one.attempt),
            one.digest,
        )
        for one in rows
    ]
    loaded = checkpoints.load(found, state)
    for sentence in loaded.damaged:
        job.tell(f"{sentence} It was passed over.", "warning")
    older = found[found.index(loaded.taken) :] if loaded.taken else []
    kept = {(one.step, one.attempt) for one in older}
    database.lasting(lambda db: registry.keep(db, run.id, run.attempt, kept))
    database.lasting(
        lambda db: points.rewind(db, run.id, run.attempt, state.step, looked=state.looked)
    )
    job.store(best_loss=state.best_loss, best_step=state.best_step or None)
    if loaded.taken:
        job.tell(f"Going on from the checkpoint of step {state.step}.")
    elif run.attempt > 1:
        job.tell("Nothing had been saved yet: starting from the beginning.")


class Recorder:
    """Consumes the training: records, keeps the best state, saves, and stops when told to."""

    def __init__(self, job: Job, model: Any, state: checkpoints.State) -> None:
        self.job = job
        self.model = model
        self.state = state
        self.waiting: list[Measured] = []
        self.recorded = 0.0
        self.saved = time.monotonic()
        self.saving = 0.0  # seconds that the last checkpoint took
        self.kept = state.numbers()  # what can be gone on from without another checkpoint

    def follow(self, going: Any) -> None:
        """Until the end of training. Raises Stopped, with everything saved, or LostClaim."""
        try:
            for item in going:
                if isinstance(item, Measured):
                    self._take(item)
                elif item.doing == "training":  # so the step before has been looked at
                    self._save_if_due()
                self.job.watch.check()
        except Stopped as stop:
            going.close()
            if stop.why != "cancelling":
                self.checkpoint()
            raise
        self.checkpoint()

    def _take(self, point: Measured) -> None:
        self.waiting.append(point)
        if point.kind == "validation" and self.state.best_step == point.step > 0:
            save(self.job, self.model, self.state, storage.tuned_model_folder(self.job.run.id))
        if point.kind == "validation" or time.monotonic() - self.recorded > RECORD_SECONDS:
            self._record()

    def _record(self) -> None:
        if not self.waiting:
            return
        run, best = self.job.run, self.state
        values = {"best_loss": best.best_loss, "best_step": best.best_step or None}
        database.lasting(lambda db: points.record(db, run.id, run.attempt, self.waiting, **values))
        self.waiting = []
        self.recorded = time.monotonic()

    def _save_if_due(self) -> None:
        rest = self.saving * (1 / settings.checkpoint_share - 1)
        if time.monotonic() - self.saved > max(settings.checkpoint_seconds, rest):
            self.checkpoint()

    def checkpoint(self) -> None:
        """Save what is needed to go on exactly, unless that is saved already."""
        self._record()
        if self.state.numbers() == self.kept:
            return
        started = time.monotonic()
        run = self.job.run
        final = storage.checkpoint_folder(run.id, self.state.step, run.attempt)
        new = final.with_name(f".{final.name}")
        space.check(checkpoints.num_bytes(self.state))
        try:
            made = checkpoints.write(new, self.state)
            database.lasting(
                lambda db: registry.enter(
                    db, run.id, run.attempt, made, lambda: checkpoints.place(new, final)
                )
            )
        except Exception:
            storage.remove(new)
            raise
        self._prune()
        self.kept = self.state.numbers()
        self.saved = time.monotonic()
        self.saving = self.saved - started

    def _prune(self) -> None:
        run = self.job.run
        newest = database.lasting(lambda db: registry.of(db, run.id))[:KEPT]
        kept = {(one.step, one.attempt) for one in newest}
        database.lasting(lambda db: registry.keep(db, run.id, run.attempt, kept))
