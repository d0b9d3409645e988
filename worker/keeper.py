"""The worker's own thread: it beats, sweeps, looks for work when no bell comes, minds children."""

import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable

from sqlalchemy.orm import Session

from app import (
    base_models,
    claims,
    completions,
    database,
    processes,
    runs,
    storage,
    tuned_models,
    workers,
)
from app.errors import LostClaim
from app.tables import Run, Worker
from worker.housekeeping import Housekeeping

LOOK_SECONDS = 2.0  # at most this long until the next look
SAVE_SECONDS = 27.0  # what a child gets to save when the worker is told to stop
SAVED = 75  # a child's exit code: saved and handed back (EX_TEMPFAIL)

log = logging.getLogger(__name__)
Child = subprocess.Popen[str]


class Keeper(threading.Thread):
    """Runs in a Celery worker beside its consumer; holds no torch itself."""

    kind = ""

    def __init__(self) -> None:
        super().__init__(name=f"{self.kind}-keeper")
        self.worker = Worker(
            id=f"{socket.gethostname()[:40]}-{os.getpid()}-{secrets.token_hex(2)}",
            kind=self.kind,
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        self.bell = threading.Event()
        self.stopping = threading.Event()

    def wake(self) -> None:
        """Look now."""
        self.bell.set()

    def stop(self) -> None:
        """Let go of everything and end; returns when that is done."""
        self.stopping.set()
        self.bell.set()
        self.join()

    def run(self) -> None:
        """Look, wait for the bell, look again. A database that is away is waited for."""
        while not self.stopping.is_set():
            try:
                self._turn()
            except Exception:
                log.exception("A look at the work failed; trying again.")
            self.bell.wait(LOOK_SECONDS)
            self.bell.clear()
        self.let_go()
        with database.session() as db:
            workers.leave(db, self.worker.id)

    def _turn(self) -> None:
        with database.session() as db:
            workers.beat(db, self.worker)
        self.look()

    def look(self) -> None:
        """Mind the children and take what there is to do."""
        raise NotImplementedError

    def let_go(self) -> None:
        """End the children; what they hold goes back."""
        raise NotImplementedError

    def child(self, module: str, *arguments: str) -> Child:
        """A process for torch, which dies with this one."""
        file = storage.log_file(f"{module}-{self.worker.id}").open("a")
        with file:
            return processes.start(
                module, *arguments, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT
            )

    def tell(self, child: Child, line: str) -> bool:
        """Write a line to the child; false if it is gone."""
        try:
            assert child.stdin is not None
            child.stdin.write(line + "\n")
            child.stdin.flush()
        except (BrokenPipeError, ValueError):
            return False
        return True


class Tuner(Keeper):
    """One run at a time, each in a fresh process; a spare one has imported torch already."""

    kind = "tuner"

    def __init__(self) -> None:
        super().__init__()
        self.spare: Child | None = None
        self.current: tuple[Child, str, int] | None = None  # process, run id, attempt
        self.swept = 0.0

    def look(self) -> None:
        """Beat, sweep every few seconds, reap a child that ended, claim when free."""
        self._beat()
        self._reap()
        if time.monotonic() - self.swept > 5:
            self.swept = time.monotonic()
            with database.session() as db:
                claims.sweep(db)
        if self.spare is None or self.spare.poll() is not None:
            self.spare = self.child("worker.run", self.worker.id)
        if self.current is None:
            with database.session() as db:
                run = claims.claim_next(db, self.worker.id)
            if run:
                self._begin(run)

    def _begin(self, run: Run) -> None:
        child = self.spare
        self.spare = None
        assert child is not None
        self.current = (child, run.id, run.attempt)
        # If the child is gone, the next look reaps it and puts the run back.
        self.tell(child, json.dumps({"run": run.id, "attempt": run.attempt}))
        threading.Thread(target=self._wake_at_end, args=(child,), daemon=True).start()

    def _wake_at_end(self, child: Child) -> None:
        child.wait()
        self.wake()

    def _beat(self) -> None:
        # Only for the run that a child works on: one that is held in name alone is soon swept.
        if self.current:
            with database.session() as db:
                claims.beat(db, *self.current[1:])

    def _reap(self) -> None:
        if self.current is None or self.current[0].poll() is None:
            return
        child, run_id, attempt = self.current
        try:  # whatever its exit code: one that ended well has let go of the run itself
            with database.session() as db:
                reason = f"The tuning process {processes.ended(child)}."
                claims.put_back(db, run_id, attempt, reason)
        except LostClaim:
            log.info("Run %s had left its process, which %s.", run_id, processes.ended(child))
        self.current = None

    def let_go(self) -> None:
        """Have the run saved and handed back; whoever takes too long is ended."""
        if self.spare:
            self.spare.kill()
            self.spare.wait()
        if self.current is None:
            return
        child, run_id, attempt = self.current
        child.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + SAVE_SECONDS
        while child.poll() is None and time.monotonic() < deadline:
            self._beat()
            time.sleep(0.2)
        child.kill()
        child.wait()
        with contextlib.suppress(LostClaim), database.session() as db:
            reason = "The worker was stopped before it could save; what was saved before is kept."
            runs.settle(db, run_id, attempt, reason)


class Generator(Keeper):
    """A resident process answers prompts; passing ones prepare base models and merge adapters."""

    kind = "generator"

    def __init__(self) -> None:
        super().__init__()
        self.answering: Child | None = None
        # Each with what to do, given the reason, if it dies before it could say so itself.
        self.passing: list[tuple[Child, Callable[[Session, str], None]]] = []
        self.house = Housekeeping()

    def look(self) -> None:
        """Keep the answering process alive and awake; start what else is wanted."""
        if self.answering is None or self.answering.poll() is not None:
            if self.answering is not None:
                with database.session() as db:
                    completions.fail_lost(db, self.worker.id)
            self.answering = self.child("worker.answer", self.worker.id)
        self.tell(self.answering, "look")
        self._reap()
        with database.session() as db:
            alive = [worker.id for worker in workers.alive(db)]
            completions.fail_orphans(db, alive)
            tuned_models.free_orphans(db, alive)
            base_models.free_orphans(db, alive)
            base_model = base_models.claim_waiting(db, self.worker.id)
            whole = tuned_models.claim_whole(db, self.worker.id)
        if base_model:
            self._pass("worker.prepare", base_model.id, base_models.fail)
        if whole:
            self._pass("worker.export", whole.id, tuned_models.fail_whole)
        self.house.look()

    def _pass(self, module: str, row: str, fail: Callable[[Session, str, str], None]) -> None:
        child = self.child(module, row)
        self.passing.append((child, lambda db, reason: fail(db, row, reason)))

    def _reap(self) -> None:
        for child, fail in [pair for pair in self.passing if pair[0].poll() is not None]:
            if child.returncode:
                with database.session() as db:
                    fail(db, f"The process that did this {processes.ended(child)}. Try again.")
            self.passing.remove((child, fail))

    def let_go(self) -> None:
        """Nothing here is worth saving: end it."""
        for child in [self.answering, *(pair[0] for pair in self.passing)]:
            if child:
                child.kill()
                child.wait()
