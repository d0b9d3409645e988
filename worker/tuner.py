"""The keeper of runs: claims what fits, gives each run a process of its own, and lets go of it."""

import contextlib
import json
import logging
import signal
import threading
import time
from typing import NamedTuple

from sqlalchemy.exc import SQLAlchemyError

from app import capacity, claims, database, leftovers, misfits, processes, rehearsals, runs, workers
from app.capacity import Room, Taken
from app.errors import LostClaim
from app.settings import settings
from app.tables import Run
from worker import relief
from worker.keeper import Child, Keeper

SAVE_SECONDS = 27.0  # what a child gets to save when the worker is told to stop
SWEEP_SECONDS = 5.0  # between two looks at others' leases
TELL_SECONDS = 60.0  # between two looks for runs that fit nowhere
QUIET_SECONDS = 10.0  # of a run, in which the next spare child waits with its imports

log = logging.getLogger(__name__)


class Task(NamedTuple):
    """A run at work in a child."""

    child: Child
    run_id: str
    attempt: int
    takes: Taken
    begun: float  # monotonic
    memory_kills: int  # by the kernel, when it began

    def left(self) -> Taken:
        """What it takes now; overdue, it counts as ending at any moment."""
        passed = time.monotonic() - self.begun
        return self.takes._replace(seconds=max(0.0, self.takes.seconds - passed))


class Tuner(Keeper):
    """As many runs as fit, each in a fresh process; a spare one has imported torch already."""

    kind = "tuner"

    def __init__(self) -> None:
        super().__init__()
        self.spare: Child | None = None
        self.tasks: list[Task] = []
        self.rehearsal: tuple[Child, str] | None = None  # with its key
        self.swept = self.told = 0.0

    def variables(self) -> dict[str, str]:
        """Each child ends with its run, and all its memory is free then."""
        return processes.brief()

    def look(self) -> None:
        """Beat, sweep every few seconds, reap children that ended, claim what fits."""
        self._beat()
        self._reap()
        self._sweep()
        self._prepare()
        self._rehearse()
        while not self.stopping.is_set() and self._claim():
            self._prepare()

    def _sweep(self) -> None:
        moment = time.monotonic()
        if moment - self.swept > SWEEP_SECONDS:
            self.swept = moment
            with database.session() as db:
                claims.sweep(db)
                rehearsals.free_orphans(db, [one.id for one in workers.alive(db)])
        if moment - self.told > TELL_SECONDS:
            self.told = moment
            with database.session() as db:
                misfits.tell(db, self.worker.id)
                leftovers.clear_cache(db)

    def _prepare(self) -> None:
        """Have a spare child, which also says what device and memory there is.

        Not while a run begins and no other can beside it: the imports would delay its first point.
        """
        if self.spare is not None and self.spare.poll() is None:
            return
        moment = time.monotonic()
        if any(moment - task.begun < QUIET_SECONDS for task in self.tasks) and self._room() is None:
            return
        self.spare = self.child("worker.run", self.worker.id)

    def _rehearse(self) -> None:
        """One rehearsal at a time and beside no run: what else is at work would be measured too.

        It goes before the runs that wait, since a person waits for it and it is short.
        """
        if self.rehearsal and (ended := self.rehearsal[0].poll()) is not None:
            child, key = self.rehearsal
            self.rehearsal = None
            if ended:
                with database.session() as db:
                    reason = f"The process that rehearsed {processes.ended(child)}."
                    rehearsals.fail(db, key, reason)
        if self.rehearsal or self.tasks or self._room() is None:
            return
        with database.session() as db:
            asked = rehearsals.claim(db, self.worker.id)
        if asked:
            child = self.child("worker.rehearse", asked.key)
            self.rehearsal = (child, asked.key)
            threading.Thread(target=self._wake_at_end, args=(child,), daemon=True).start()

    def _claim(self) -> bool:
        """Begin the next run that fits; whether there was one."""
        if self.rehearsal or self.spare is None:
            return False
        place = self._room()
        if place is None:
            return False
        with database.session() as db:
            run = claims.claim_next(db, self.worker.id, place)
        if run is None:
            return False
        self._begin(run, place.gpu)
        return True

    def _room(self) -> Room | None:
        """What there is and what is taken; None: nothing more may be taken, or it is not known."""
        if self.worker.memory_mb is None:
            with database.session() as db:
                workers.recall(db, self.worker)
        place = workers.room(self.worker)
        most = settings.runs_at_once or (None if place and place.gpu else 1)
        if place is None or (most and len(self.tasks) >= most):
            return None
        return place._replace(taken=tuple(task.left() for task in self.tasks))

    def _begin(self, run: Run, gpu: bool) -> None:
        child, self.spare = self.spare, None
        assert child is not None
        takes = Taken(
            capacity.need(run.forecast, gpu),
            run.forecast.get("seconds", 0.0) * (1 - run.step / (run.num_steps or 1)),
            capacity.devices(run.params),
        )
        self.tasks.append(
            Task(child, run.id, run.attempt, takes, time.monotonic(), processes.memory_kills())
        )
        # If the child is gone, the next look reaps it and puts the run back.
        self.tell(child, json.dumps({"run": run.id, "attempt": run.attempt}))
        threading.Thread(target=self._wake_at_end, args=(child,), daemon=True).start()

    def _wake_at_end(self, child: Child) -> None:
        child.wait()
        self.wake()

    def _beat(self) -> None:
        # Only for runs that a child works on: one that is held in name alone is soon swept.
        for task in self.tasks:
            with database.session() as db:
                claims.beat(db, task.run_id, task.attempt)

    def _reap(self) -> None:
        for task in [task for task in self.tasks if task.child.poll() is not None]:
            ended = processes.ended(task.child)
            try:  # whatever its exit code: one that ended well has let go of the run itself
                with database.session() as db:
                    if not (
                        self._lacked_memory(task) and relief.take(db, task.run_id, task.attempt)
                    ):
                        reason = f"The tuning process {ended}."
                        claims.put_back(db, task.run_id, task.attempt, reason)
            except LostClaim:
                log.info("Run %s had left its process, which %s.", task.run_id, ended)
            self.tasks.remove(task)

    def _lacked_memory(self, task: Task) -> bool:
        """Whether the kernel has ended it for want of memory: it was killed, as some process was."""
        killed = task.child.poll() == -signal.SIGKILL
        return killed and processes.memory_kills() > task.memory_kills

    def let_go(self) -> None:
        """Have the runs saved and handed back; whoever takes too long is ended."""
        if self.spare:
            self.spare.kill()
            self.spare.wait()
        self._let_go_rehearsal()
        for task in self.tasks:
            task.child.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + SAVE_SECONDS
        while time.monotonic() < deadline and any(task.child.poll() is None for task in self.tasks):
            with contextlib.suppress(SQLAlchemyError):  # a database that is away: go on waiting
                self._beat()
            time.sleep(0.2)
        for task in self.tasks:
            task.child.kill()
            task.child.wait()
            with contextlib.suppress(LostClaim), database.session() as db:
                reason = (
                    "The worker was stopped before it could save; what was saved before is kept."
                )
                runs.settle(db, task.run_id, task.attempt, reason)

    def _let_go_rehearsal(self) -> None:
        if self.rehearsal:
            child, _ = self.rehearsal
            child.kill()
            child.wait()
            with contextlib.suppress(SQLAlchemyError), database.session() as db:
                rehearsals.free(db, self.worker.id)
