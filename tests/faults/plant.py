"""A studio of real processes on the test's home, each of which can be killed, stopped, put to sleep."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from app import database, invariants, queue, runs, storage, valkey
from app.settings import settings
from tests.faults import nursery, small
from tests.servers import die_with_tests, free_port, fresh_queue

PATIENCE = float(os.environ.get("FAULTS_PATIENCE", "240"))  # seconds; the machine may be busy
COMMANDS = {
    "tuner": ("worker.tasks", "tuner"),
    "generator": ("worker.tasks", "generator"),
    "web": ("app.web.serve",),
    "quick tuner": ("tests.faults.forking", "tuner"),
    "quick generator": ("tests.faults.forking", "generator"),
    "light tuner": ("tests.faults.forking", "tuner", "light"),
    "light generator": ("tests.faults.forking", "generator", "light"),
}


def until(true: Callable[[], object], what: str = "", seconds: float = PATIENCE) -> None:
    """Wait for it; fail if it does not become true in that time."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            pytest.fail(f"It did not happen in {seconds} s: {what or true}")
        time.sleep(0.02)


class Plant:
    """Starts processes and does them harm."""

    def __init__(self) -> None:
        self.running: dict[str, subprocess.Popen[bytes] | nursery.Born] = {}
        self.port = free_port()
        self.environment = {
            "STUDIO_HOME": settings.home,
            "STUDIO_DATABASE_URL": settings.database_url,
            "STUDIO_REDIS_URL": settings.redis_url,
            "STUDIO_PORT": str(self.port),
            "STUDIO_LEASE_SECONDS": "3",
            "STUDIO_CHECKPOINT_SECONDS": "0.001",
            "STUDIO_CHECKPOINT_SHARE": "1",
            "STUDIO_DISK_RESERVE_MB": "0",
            "STUDIO_THREADS": "1",
            "STUDIO_MIN_EXAMPLES": "10",
        }

    def start(self, name: str, as_name: str = "", **more: str) -> None:
        """Start one; `more` settings for it alone."""
        path = storage.log_file(f"test-{as_name or name}")
        environment = os.environ | self.environment | more
        if name.startswith("quick"):
            module, *arguments = COMMANDS[name]
            self.running[as_name or name] = nursery.born(module, arguments, environment, path)
            return
        with path.open("a") as log:
            self.running[as_name or name] = subprocess.Popen(
                [sys.executable, "-m", *COMMANDS[name]],
                cwd=storage.REPOSITORY,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_tests,
            )

    def kill(self, name: str) -> None:
        """As by `kill -9`; its children die with it."""
        process = self.running.pop(name)
        process.kill()
        process.wait()

    def end(self, name: str, seconds: float = PATIENCE) -> None:
        """As an operator does: SIGTERM, and wait."""
        process = self.running.pop(name)
        process.terminate()
        process.wait(seconds)

    def kill_all(self) -> None:
        """Everything in one moment, the broker too."""
        trainers = [pid for name in self.running for pid in self.children(name)]
        for pid in [*(one.pid for one in self.running.values()), *trainers, *self.broker()]:
            with suppress(ProcessLookupError):  # a child that has died with its worker
                os.kill(pid, signal.SIGKILL)
        for process in self.running.values():
            process.wait()
        self.running.clear()

    def broker(self) -> list[int]:
        """The embedded Valkey's process id, if it answers."""
        try:
            client = redis.Redis.from_url(queue.redis_url(), socket_timeout=5)
            return [int(client.info("server")["process_id"])]
        except redis.RedisError:
            return []

    def children(self, name: str) -> list[int]:
        """Process ids of a worker's children."""
        found: list[int] = []
        for task in Path(f"/proc/{self.running[name].pid}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
        return found

    def trainer(self, name: str, run_id: str) -> int | None:
        """The process that tunes the run: the child that writes its log."""
        for child in self.children(name):
            try:
                if os.readlink(f"/proc/{child}/fd/1").endswith(f"run-{run_id}.log"):
                    return child
            except OSError:
                continue
        return None

    def kill_trainer(self, name: str, run_id: str) -> bool:
        """As by `kill -9`; false if there was none just now."""
        pid = self.trainer(name, run_id)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        return pid is not None

    def override(self, **values: Any) -> None:
        """Settings that the next children of quick workers take."""
        path = storage.home() / "overrides.json"
        path.with_suffix(".new").write_text(json.dumps(values))
        path.with_suffix(".new").replace(path)

    def web(self) -> httpx.Client:
        """A client that knows the token, once the web answers."""
        client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}",
            headers={"Authorization": f"Bearer {storage.token()}"},
            timeout=60,
            trust_env=False,
        )

        def answers() -> bool:
            try:
                return client.get("/healthz").status_code == 200
            except httpx.TransportError:
                return False

        until(answers, "the web answers")
        return client

    def stop(self) -> None:
        """End what is left."""
        for process in self.running.values():
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()


def reaches(run_id: str, *states: str, seconds: float = PATIENCE) -> None:
    """Wait until the run is in one of these states; fail at once if it ends in another."""
    final = runs.FINAL - set(states)

    def there() -> bool:
        state = small.now(run_id).state
        assert state not in final, f"{state}: {small.said(run_id)}"
        return state in states

    until(there, f"{run_id} is {states}", seconds)


def sound() -> None:
    """Every invariant holds, as soon as what is under way has been written."""
    found: list[invariants.Finding] = []

    def well() -> bool:
        with database.reading() as db:
            found[:] = invariants.check(db)
        return not found

    end = time.monotonic() + 20
    while not well():
        assert time.monotonic() < end, "\n".join(map(str, found))
        time.sleep(0.5)


@contextmanager
def begun(monkeypatch: pytest.MonkeyPatch) -> Iterator[Plant]:
    """A plant with a broker; in the end every invariant holds and every process is gone."""
    monkeypatch.setattr(settings, "redis_url", "")
    fresh_queue(monkeypatch)
    valkey.start(PATIENCE)
    made = Plant()
    try:
        yield made
        sound()
    finally:
        made.stop()
        queue.celery().close()
        valkey.stop()
        storage.remove(storage.socket_folder())


@pytest.fixture
def plant(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plant]:
    """A studio of real processes, none of them started yet but the broker."""
    with begun(monkeypatch) as made:
        yield made


def seed(request: pytest.FixtureRequest) -> random.Random:
    """Chance that can be repeated: the seed is printed, and FAULTS_SEED sets it."""
    chosen = int(os.environ.get("FAULTS_SEED", "0")) or random.randrange(1, 10**6)
    print(f"{request.node.name}: FAULTS_SEED={chosen}")
    return random.Random(chosen)
