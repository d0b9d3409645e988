"""`studio up`: Valkey, web and workers as one group that starts, is watched, and ends together."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator

from app import base_models, database, migrate, processes, storage, valkey
from app.errors import Conflict, StudioError, Unavailable
from app.settings import settings

MODULES = {  # name -> module and arguments, in the order of starting
    "web": ("app.web.serve",),
    "tuner": ("worker.tasks", "tuner"),
    "generator": ("worker.tasks", "generator"),
}
STOP_SECONDS = 30.0

Say = Callable[[str], None]


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """Hold the home folder's lock. Raises Conflict if another studio has it."""
    with storage.lock_file().open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise Conflict(
                f"A studio already runs on {storage.home()} (process {file.read().strip()}). "
                f"Open it at {link()}, or end it first."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def is_running() -> bool:
    """Whether a studio runs on this home folder."""
    with storage.lock_file().open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def address() -> str:
    """The web's address, for a browser on this machine."""
    host = "127.0.0.1" if settings.host in {"0.0.0.0", "::"} else settings.host
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"


def _check_address() -> None:
    """Raises Unavailable if the web could not listen where the settings say."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((settings.host, settings.port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise Unavailable(
                f"Port {settings.port} is in use by another program. End that, or choose another "
                f"port: STUDIO_PORT={settings.port + 1} make run."
            ) from None
        raise Unavailable(
            f"The studio cannot listen on {settings.host}:{settings.port} ({error.strerror}). "
            "Choose an address of this machine: STUDIO_HOST=127.0.0.1."
        ) from None


def link() -> str:
    """The one link to open, with the token in it."""
    return f"{address()}/?token={storage.token()}"


def prepare(say: Say) -> None:
    """What must be there before anything starts: broker, tables, the default base model."""
    if settings.redis_url:
        say("Broker: the Redis of STUDIO_REDIS_URL.")
    else:
        valkey.start()
        say("Broker: the embedded Valkey.")
    migrate.up()
    say(f"Database: {database.engine().dialect.name}, up to date.")
    with database.session() as db:
        model = base_models.add_default(db)
    if model.state != "ready":
        say(f"Fetching the default base model, {model.name} (about 100 MB, once) ...")
        _fetch(model.id, say)


def _fetch(base_model_id: str, say: Say) -> None:
    # To where this speaks: standard output is for results alone.
    process = processes.start("worker.prepare", base_model_id, stdout=sys.stderr)
    if process.wait():
        say(
            "The default base model could not be made ready; the studio starts without it. "
            "Its page says why and lets you try again."
        )


class Group:
    """The studio's processes."""

    def __init__(self, names: tuple[str, ...], say: Say) -> None:
        self.say = say
        self.running: dict[str, subprocess.Popen[str]] = {}
        self.restarts: dict[str, list[float]] = {name: [] for name in names}

    def start(self) -> None:
        """Start every process; call it from a thread that lives as long as the group."""
        for name in self.restarts:
            self._start(name)

    def _start(self, name: str) -> None:
        with storage.log_file(name).open("a") as file:
            self.running[name] = processes.start(
                *MODULES[name], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )

    def mind(self) -> None:
        """Start anew what has died; slower and slower if it keeps dying."""
        for name, process in list(self.running.items()):
            if process.poll() is None:
                continue
            times = self.restarts[name] = [
                moment for moment in self.restarts[name] if moment > time.monotonic() - 60
            ]
            if times and time.monotonic() - times[-1] < 2 ** min(len(times), 5):
                continue
            times.append(time.monotonic())
            self.say(
                f"The {name} {processes.ended(process)}; starting it anew. "
                f"Its log: {storage.log_file(name)}"
            )
            self._start(name)
        if not settings.redis_url and not valkey.answers():
            self.say("The embedded Valkey has gone; starting it anew. Nothing is lost by that.")
            valkey.start()

    def stop(self, hurry: Callable[[], bool]) -> None:
        """End everything, letting a run at work be saved; at once when `hurry` says so."""
        for process in self.running.values():
            process.terminate()
        end = time.monotonic() + STOP_SECONDS
        while self._alive() and time.monotonic() < end and not hurry():
            time.sleep(0.05)
        for name in self._alive():
            self.running[name].kill()
        for process in self.running.values():
            process.wait()
        if not settings.redis_url:
            valkey.stop()

    def _alive(self) -> list[str]:
        return [name for name, process in self.running.items() if process.poll() is None]


def wait_ready(group: Group, patience: float = 60.0) -> None:
    """Until web and workers answer. Raises Unavailable, naming the log to read."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy is set
    end = time.monotonic() + patience
    state: dict[str, object] = {}
    while time.monotonic() < end:
        for name, process in group.running.items():
            if process.poll() is not None:
                raise Unavailable(
                    f"The {name} {processes.ended(process)} while starting. "
                    f"Read {storage.log_file(name)}."
                )
        with contextlib.suppress(OSError, ValueError):
            with direct.open(f"{address()}/healthz", timeout=5) as answer:
                state = json.load(answer)
        if state.get("status") == "ok":
            return
        time.sleep(0.1)
    raise Unavailable(f"The studio did not get ready: {state}. Read the logs in {storage.home()}.")


def up(say: Say) -> int:
    """Run the studio until Ctrl-C; the exit code."""
    interrupts = 0

    def interrupted(_number: int, _frame: object) -> None:
        nonlocal interrupts
        interrupts += 1

    with only_one():
        signal.signal(signal.SIGINT, interrupted)
        signal.signal(signal.SIGTERM, interrupted)
        try:
            _check_address()
            prepare(say)
        except StudioError as error:
            say(error.message)
            return 1
        group = Group(tuple(MODULES), say)
        code = 0
        try:
            if not interrupts:
                group.start()
                wait_ready(group)
                say(f"\nThe studio is ready. Open this link:\n\n  {link()}\n\nCtrl-C ends it.")
            while not interrupts:
                group.mind()
                time.sleep(0.5)
        except StudioError as error:
            say(error.message)
            code = 1
        finally:
            if not code:
                say("Ending. A run at work is saved first (at most 30 seconds); Ctrl-C again: now.")
            before = interrupts
            group.stop(lambda: interrupts > before)
            say("Ended.")
    return code
