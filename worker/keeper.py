"""The worker's own thread: it beats, looks for work when no bell comes, and minds children."""

import logging
import os
import secrets
import socket
import subprocess
import threading

from app import database, processes, storage, workers
from app.tables import Worker

LOOK_SECONDS = 2.0  # at most this long until the next look
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
                module,
                *arguments,
                environment=self.variables(),
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def variables(self) -> dict[str, str]:
        """Of a child's environment, in place of this process's."""
        return {}

    def tell(self, child: Child, line: str) -> bool:
        """Write a line to the child; false if it is gone."""
        try:
            assert child.stdin is not None
            child.stdin.write(line + "\n")
            child.stdin.flush()
        except (BrokenPipeError, ValueError):
            return False
        return True
