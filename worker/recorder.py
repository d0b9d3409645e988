"""Consumes a training: records its points, keeps the best state, saves, and stops when told to.

Of processes that share a run each has a recorder, in step with the others; the first one writes.
"""

import time
from typing import Any

from app import database, points, runs, storage
from app.points import Measured
from app.settings import settings
from worker import backbones, checkpoints, distributed
from worker.job import Job
from worker.watch import Stopped

RECORD_SECONDS = 0.2  # on a fast machine points are stored together, this often


def save(job: Job, model: Any, folder: storage.Path) -> None:
    """Write what was tuned, as people take it away, in the place of what stood there."""
    if not job.group.leads:
        if job.group.spreads:  # the first process asks for the whole
            distributed.whole_values(model, job.machine.precision)
        return
    base = job.run.experiment.base_model
    backbones.save_tuned(
        model,
        folder,
        base_name=base.address if base.source == "hub" else base.name,
        base_folder=storage.base_model_folder(base.id),
        machine=job.machine,
    )


class Recorder:
    """Consumes the training: records, keeps the best state, saves, and stops when told to."""

    def __init__(self, job: Job, model: Any, state: checkpoints.State) -> None:
        self.job = job
        self.model = model
        self.state = state
        self.waiting: list[Measured] = []
        self.recorded = 0.0
        self.saved = time.monotonic()

    def follow(self, going: Any) -> None:
        """Until the end of training. Raises Stopped, with everything saved, or LostClaim."""
        try:
            for item in going:
                if isinstance(item, Measured):
                    self._take(item)
                    self.job.watch.check_together()
                elif self.job.group.size == 1:
                    self.job.watch.check()
        except Stopped as stop:
            going.close()
            if stop.why != "cancelling":
                self.checkpoint()
            raise
        self._record()
        self.checkpoint()

    def _take(self, point: Measured) -> None:
        self.waiting.append(point)
        if point.kind == "validation" and self.state.best_step == point.step > 0:
            save(self.job, self.model, storage.tuned_model_folder(self.job.run.id))
        if point.kind == "validation" or time.monotonic() - self.recorded > RECORD_SECONDS:
            self._record()
        due = time.monotonic() - self.saved > settings.checkpoint_seconds
        if self.job.group.told(due):
            self.checkpoint()

    def _record(self) -> None:
        if not self.waiting or not self.job.group.leads:
            return
        run, best = self.job.run, self.state
        with database.session() as db:
            runs.update_held(
                db, run.id, run.attempt, best_loss=best.best_loss, best_step=best.best_step or None
            )
            points.record(db, run.id, run.attempt, self.waiting)
        self.waiting = []
        self.recorded = time.monotonic()

    def checkpoint(self) -> None:
        """Save what is needed to go on exactly."""
        self._record()
        if not self.job.group.leads:
            self.state.tensors()  # the first process asks for the whole
            return
        checkpoints.save(storage.checkpoints_folder(self.job.run.id), self.state)
        self.job.store(stuck=0)  # whatever happens now, this run gets on
        self.saved = time.monotonic()
