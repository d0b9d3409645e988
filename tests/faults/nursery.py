"""Where quick workers and rehearsals come from: `python -m tests.faults.nursery`.

It has imported what they import, and forks one for each line of JSON on its standard input: torch
takes longer to load than most tests run.
"""

import atexit
import json
import os
import runpy
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

from app import processes, storage
from app.settings import settings
from tests.servers import die_with_tests

WORK = ("run", "export", "prepare", "rehearse")
MODULES = ("celery", "celery.worker", *(f"worker.{name}" for name in WORK))


class Born:
    """A worker that the nursery has forked, with what the tests use of subprocess.Popen."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._handle = os.pidfd_open(pid)  # the process stays known until the next one is born

    def __del__(self) -> None:
        os.close(self._handle)

    def wait(self, seconds: float | None = None) -> None:
        """Until it has ended. Raises TimeoutExpired."""
        if not select.select([self._handle], [], [], seconds)[0]:
            raise subprocess.TimeoutExpired(str(self.pid), seconds or 0.0)

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it lives."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, number)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Tell it to end."""
        self.send_signal(signal.SIGTERM)


def born(module: str, arguments: list[str], environment: Mapping[str, str], log: Path) -> Born:
    """A fresh process that runs the module, with these variables and no others."""
    asked = json.dumps([module, *arguments]), json.dumps(dict(environment)), str(log)
    nursery = _nursery()
    assert nursery.stdin
    assert nursery.stdout
    nursery.stdin.write(json.dumps(asked) + "\n")
    nursery.stdin.flush()
    return Born(int(nursery.stdout.readline()))


@cache
def _nursery() -> "subprocess.Popen[str]":
    """One for all tests."""
    made = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.nursery"],
        cwd=storage.REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_tests,
    )
    atexit.register(made.communicate)  # it ends with its standard input
    return made


def main() -> None:
    """Fork for each line, until there are no more."""
    for module in MODULES:
        __import__(module)
    for line in sys.stdin:
        with suppress(ChildProcessError):  # those that have ended
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if pid := os.fork():
            print(pid, flush=True)
        else:
            _live(*json.loads(line))
            return


def _live(command: str, environment: str, log: str) -> None:
    """As if this process had just been started."""
    die_with_tests()
    sys.stdin = open(os.devnull)  # noqa: SIM115 - for as long as it lives
    os.dup2(sys.stdin.fileno(), 0)
    with Path(log).open("a") as file:
        processes.log_to(file)
    os.environ.clear()
    os.environ.update(json.loads(environment))
    settings.__init__()  # type: ignore[misc] - of the new variables
    module, *arguments = json.loads(command)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__")


if __name__ == "__main__":
    main()
