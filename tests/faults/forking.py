"""A real worker whose children need no time to start: `python -m tests.faults.forking KIND`.

The worker, its keeper and its consumer are those of the studio. A child is a fork of this process,
which has imported torch already, in the place of a fresh interpreter; the rest of it is the studio's
too. Before its work a child takes what is written in the home folder's `overrides.json` as settings,
so that a test can name a crash point for the next attempt.
"""

import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from app import database, processes, queue, storage
from app.settings import settings
from worker import keeper, tasks

MODULES = ("worker.run", "worker.export", "worker.prepare")


class Fork:
    """A child process with what the keeper uses of subprocess.Popen."""

    def __init__(self, module: str, arguments: tuple[str, ...], log: Path) -> None:
        # SQLite's locks belong to a process: nothing of it may be open while it forks.
        database.engine().dispose()
        reading, writing = os.pipe()
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(writing)
            _live(module, arguments, log, reading, parent)
        os.close(reading)
        self.stdin = os.fdopen(writing, "w")
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code once it has ended."""
        return self._ended(os.WNOHANG)

    def wait(self) -> int | None:
        """Until it has ended."""
        return self._ended(0)

    def _ended(self, how: int) -> int | None:
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, how)
            except ChildProcessError:  # another thread has just waited for it
                return self.returncode
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it lives."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)


def _live(
    module: str, arguments: tuple[str, ...], log: Path, reading: int, parent: int
) -> NoReturn:
    code = 1
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        os.dup2(reading, 0)
        sys.stdin = os.fdopen(0)
        os.closerange(3, 1024)  # the parent's sockets are not this process's
        with log.open("a") as file:
            processes.log_to(file)
        os.environ["STUDIO_PARENT_PID"] = str(parent)
        for cached in (database.engine, queue.celery, queue._client):
            cached.cache_clear()
        sys.argv = [module, *arguments]
        child: Any = importlib.import_module(module)
        if module == "worker.run":  # it has been waiting for its run
            begin = child.work
            child.work = lambda *given: (_override(), begin(*given))[1]
        else:
            _override()
        child.main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _override() -> None:
    path = storage.home() / "overrides.json"
    if path.exists():
        for name, value in json.loads(path.read_text()).items():
            setattr(settings, name, value)


def _child(self: keeper.Keeper, module: str, *arguments: str) -> Any:
    log = storage.log_file(f"{module}-{self.worker.id}")
    if module in MODULES:
        return Fork(module, arguments, log)
    with log.open("a") as file:  # worker.answer: one for long
        return processes.start(module, *arguments, stdin=-1, stdout=file, stderr=file)


def _pretend(self: keeper.Keeper, module: str, *arguments: str) -> Any:
    return processes.start("tests.pretender", module, *arguments, stdin=-1)


if __name__ == "__main__":
    if "light" in sys.argv:  # its children only pretend, and need no torch
        keeper.Keeper.child = _pretend  # type: ignore[method-assign]
    else:
        keeper.Keeper.child = _child  # type: ignore[method-assign]
        for name in MODULES:
            importlib.import_module(name)
    sys.argv = [sys.argv[0], sys.argv[1]]
    keeper.LOOK_SECONDS = 0.2
    tasks.main()
