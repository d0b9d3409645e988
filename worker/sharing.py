"""What a run shares with other machines: it fetches what it needs, publishes what it saves.

A file store that is away stops no training: what is saved meanwhile is published later.
"""

import contextlib
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeVar

from app import database, files, runs, storage
from app.errors import Damaged, NotFound, Unavailable
from app.storage import Path
from app.tables import Run
from worker.checkpoints import Found
from worker.job import Job
from worker.watch import Watch

RETRY_SECONDS = 5.0
T = TypeVar("T")


def fetch_material(run: Run, watch: Watch) -> None:
    """The dataset and the base model that the run works on."""
    experiment = run.experiment
    _patiently(run, watch, lambda: files.dataset(experiment.dataset_id))
    _patiently(run, watch, lambda: files.base_model(experiment.base_model_id))


def fetch_best(job: Job) -> None:
    """The best state that earlier attempts left, if any, wherever they worked."""
    run = job.run
    if run.attempt > 1:
        with contextlib.suppress(NotFound):
            _patiently(run, job.watch, lambda: files.tuned_model(run.id, run.attempt - 1))


def fetched(job: Job, found: Iterable[Found]) -> Iterator[Found]:
    """Those of the checkpoints that can be had here, each fetched when it is asked for."""
    for one in found:
        try:
            _patiently(job.run, job.watch, partial(files.fetch, one.path))
        except (Damaged, NotFound) as error:
            job.tell(f"{error.message} That checkpoint was passed over.", "warning")
        else:
            yield one


def _patiently(run: Run, watch: Watch, act: Callable[[], T]) -> T:
    """Do it, again and again while the store is away. Raises what `watch` does."""
    away = False
    while True:
        try:
            done = act()
        except Unavailable as error:
            if not away:
                away = True
                _tell(run, watch, f"{error.message} The run waits for it.", "warning")
            _wait(run, watch)
            continue
        if away:
            _tell(run, watch, "The file store is back.")
        return done


def _tell(run: Run, watch: Watch, message: str, level: str = "info") -> None:
    if not watch.group.leads:
        return  # the first of the processes that share the run tells it
    database.lasting(lambda db: runs.tell(db, run.id, run.attempt, message, level))


def _wait(run: Run, watch: Watch) -> None:
    phase = "waiting for the file store"
    if watch.group.leads:
        database.lasting(lambda db: runs.progress(db, run.id, run.attempt, phase=phase))
    end = time.monotonic() + RETRY_SECONDS
    while time.monotonic() < end:
        watch.check()
        time.sleep(0.1)


class Outbox:
    """What a run has saved and others shall have; it waits here while the store is away."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.waiting: dict[Path, int] = {}
        self.away = False
        best = storage.tuned_model_folder(job.run.id)
        if best.exists():  # of an earlier attempt, which may not have been able to publish it
            self.put(best, job.run.attempt)

    def put(self, path: Path, attempt: int = 0) -> None:
        """Have it published next, after what waits already."""
        if self.job.group.leads:  # of processes that share the run the first one publishes
            self.waiting[path] = attempt

    def send(self) -> None:
        """Publish what waits. While the store is away that is told once, and kept for later."""
        try:
            self._publish()
        except Unavailable as error:
            if not self.away:
                self.away = True
                self.job.tell(
                    f"{error.message} Training goes on; what is saved lies on {socket.gethostname()} "
                    "and is published when the store is back.",
                    "warning",
                )
            return
        if self.away:
            self.away = False
            self.job.tell("The file store is back, and has what was saved meanwhile.")

    def empty(self) -> None:
        """Publish what waits, however long the store is away. Raises what the watch does."""
        _patiently(self.job.run, self.job.watch, self._publish)

    def _publish(self) -> None:
        for path, attempt in list(self.waiting.items()):
            if path.exists():  # not one that has been replaced by a newer one meanwhile
                files.publish(path, attempt)
            del self.waiting[path]
