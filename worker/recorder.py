"""Consumes a training: records its points, keeps the best state, saves, and stops when told to.

Of processes that share a run each has a recorder, in step with the others; the first one writes.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

from app import database, files, points, registry, runs, space, storage
from app.crashpoints import crashpoint
from app.errors import StudioError
from app.points import Measured
from app.settings import settings
from app.tables import Checkpoint
from worker import backbones, checkpoints, distributed, sharing
from worker.job import Job
from worker.signs import Divergence
from worker.train import Tick
from worker.watch import Stopped

RECORD_SECONDS = 0.2  # on a fast machine points are stored together, this often
KEPT = 2  # checkpoints

log = logging.getLogger(__name__)


def save(job: Job, model: Any, state: checkpoints.State, folder: storage.Path) -> None:
    """Write what was tuned, as people take it away, in the place of what stood there.

    Under a name of this attempt first: a process that has lost its claim puts nothing in place.
    """
    if not job.group.leads:
        if job.group.spreads:  # the first process asks for the whole
            distributed.whole_values(model, job.machine.precision)
        return
    base = job.run.experiment.base_model
    new = folder.with_name(f".{folder.name}-{job.run.attempt}")
    space.check(sum(value.nbytes for value in state.trained.values()) + 2**24)
    try:
        backbones.save_tuned(
            model,
            new,
            base_name=base.address if base.source == "hub" else base.name,
            base_folder=files.base_model(base.id),
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
    if job.group.leads:
        checkpoints.mend(storage.tuned_model_folder(run.id))
        sharing.fetch_best(job)
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
    loaded = checkpoints.load(sharing.fetched(job, found), state)
    job.group.align(state.step, state.trained.values())
    if not job.group.leads:
        return
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


def tidy(run_id: str) -> None:
    """Remove what the succeeded run was to be gone on with from; that it ended is told already."""
    try:
        database.lasting(lambda db: registry.drop(db, run_id))
    except Exception:
        log.warning("The checkpoints of run %s are still there.", run_id, exc_info=True)


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
        self.outbox = sharing.Outbox(job)
        self.for_all = self._rows()[:1]  # the newest checkpoint that other machines can have too
        before = database.lasting(lambda db: points.curve(db, job.run.id))
        self.divergence = Divergence(point.loss for point in before if point.kind == "train")

    def follow(self, going: Any) -> None:
        """Until the result is kept. Raises Stopped, with everything saved, or LostClaim."""
        try:
            for item in going:
                if isinstance(item, Measured):
                    self._take(item)
                self._heed(item)
        except Stopped as stop:
            going.close()
            if stop.why != "cancelling":
                self.checkpoint()
                self.outbox.send()
            raise
        except StudioError:
            self._record()  # up to the step at which training gave up
            raise
        self.checkpoint()
        self._keep_result()

    def _heed(self, item: Measured | Tick) -> None:
        """Save if it is time, and hear whether to stop: processes that share a run after each point."""
        if self.job.group.size > 1:
            if isinstance(item, Measured):
                self._save_if_due()
                self.job.watch.check_together()
            return
        if isinstance(item, Tick) and item.doing == "training":
            self._save_if_due()  # the step before has been looked at
        self.job.watch.check()

    def _keep_result(self) -> None:
        """After the last step: save what the run leaves, and see that every machine can have it."""
        run, best = self.job.run, storage.tuned_model_folder(self.job.run.id)
        if self.state.stale and self.state.step < (run.num_steps or 0):
            what = "loss" if self.state.best_score is None else "score"
            self.job.tell(
                f"Training ended early at step {self.state.step} of {run.num_steps}: the validation {what} "
                f"has not improved for {self.state.stale} looks. The best state is that of step "
                f"{self.state.best_step}."
            )
            self.job.store(num_steps=self.state.step)
        last = storage.last_model_folder(run.id)
        save(self.job, self.model, self.state, last)
        if not self.state.best_step:  # no validation loss was a number: the last is all there is
            save(self.job, self.model, self.state, best)
        self.outbox.put(best, run.attempt)
        self.outbox.put(last, run.attempt)
        self.outbox.empty()

    def _take(self, point: Measured) -> None:
        self.waiting.append(point)
        if point.kind == "train" and self.divergence.shows(point.loss):
            self.job.tell(
                f"At step {point.step} the smoothed loss has stayed above twice its least value for some "
                "time: this run diverges. What was best is kept. Try a lower learning rate.",
                "warning",
            )
        if point.kind == "validation" and self.state.best_step == point.step > 0:
            best = storage.tuned_model_folder(self.job.run.id)
            save(self.job, self.model, self.state, best)
            self.outbox.put(best, self.job.run.attempt)
        if point.kind == "validation" or time.monotonic() - self.recorded > RECORD_SECONDS:
            self._record()

    def _record(self) -> None:
        if not self.job.group.leads:
            self.waiting = []
        if not self.waiting:
            return
        run, best = self.job.run, self.state
        values = {"best_loss": best.best_loss, "best_step": best.best_step or None}
        database.lasting(lambda db: points.record(db, run.id, run.attempt, self.waiting, **values))
        self.waiting = []
        self.recorded = time.monotonic()

    def _save_if_due(self) -> None:
        rest = self.saving * (1 / settings.checkpoint_share - 1)
        due = time.monotonic() - self.saved > max(settings.checkpoint_seconds, rest)
        if self.job.group.told(due):
            self.checkpoint()

    def checkpoint(self) -> None:
        """Save what is needed to go on exactly, unless that is saved already."""
        self._record()
        if self.state.numbers() == self.kept:
            return
        if not self.job.group.leads:
            self.state.tensors()  # the first process asks for the whole
            self.kept = self.state.numbers()
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
        self.outbox.put(final)  # after the best state, which it speaks of
        self.outbox.send()
        self._prune()
        self.kept = self.state.numbers()
        self.saved = time.monotonic()
        self.saving = self.saved - started

    def _rows(self) -> list[Checkpoint]:
        return database.lasting(lambda db: registry.of(db, self.job.run.id))

    def _prune(self) -> None:
        run, rows = self.job.run, self._rows()
        if not self.outbox.waiting:
            self.for_all = rows[:1]
        kept = {(one.step, one.attempt) for one in [*rows[:KEPT], *self.for_all]}
        database.lasting(lambda db: registry.keep(db, run.id, run.attempt, kept))
