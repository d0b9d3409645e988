"""The processes of docker-compose.yml, started by hand: its commands and variables, real PostgreSQL
and Redis, each with a password.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from app import storage
from app.settings import settings
from tests import factories
from tests.engine import QUICK
from tests.servers import die_with_tests, free_port, new_database, serving_postgres, wait_for
from tests.test_deployment import SERVICES

pytestmark = [pytest.mark.postgres, pytest.mark.redis]
TOKEN = "correct-horse-battery-staple"


class Installation:
    """What compose would start, without containers: each process has a home of its own."""

    def __init__(self, folder: Path, database_url: str) -> None:
        self.folder, self.database_url = folder, database_url
        self.running: list[subprocess.Popen[bytes]] = []
        self.clients: list[httpx.Client] = []

    def _environment(self, service: str, home: str) -> dict[str, str]:
        known = {"STUDIO_TOKEN": TOKEN, "POSTGRES_PASSWORD": "in the URL", "REDIS_PASSWORD": "too"}
        given = {
            name: re.sub(r"\$\{(\w+)[^}]*\}", lambda found: known.get(found[1], ""), value)
            for name, value in SERVICES[service]["environment"].items()
            if value is not None
        }
        assert given["STUDIO_DATABASE_URL"].startswith("postgresql://studio:in the URL@")
        assert given["STUDIO_REDIS_URL"].startswith("redis://:too@")
        return (os.environ | given) | {
            "STUDIO_HOME": str(self.folder / home),
            "STUDIO_HOST": "127.0.0.1",
            "STUDIO_DATABASE_URL": self.database_url,
            "STUDIO_REDIS_URL": settings.redis_url,
            "STUDIO_FILES_URL": f"file://{self.folder}/share",
            "STUDIO_CHECKPOINT_SECONDS": "0.5",
        }

    def start(self, service: str, home: str = "", **more: str) -> "subprocess.Popen[bytes]":
        """The service's own command."""
        home = home or service
        self.running.append(
            subprocess.Popen(
                self._command(SERVICES[service]["command"]),
                env=self._environment(service, home) | more,
                stdout=(self.folder / f"{home}.log").open("w"),
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_tests,
            )
        )
        return self.running[-1]

    def _command(self, given: list[str]) -> list[str]:
        return [sys.executable, "-c", "from app.cli import main; main()", *given[1:]]

    def web(self, name: str) -> httpx.Client:
        """One more web; a client of it."""
        port = free_port()
        self.start("web", name, STUDIO_PORT=str(port))
        client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}",
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=60,
        )
        self.clients.append(client)

        def up() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return client.get("/healthz").status_code == 200
            return False

        assert wait_for(up, 300), self.said(name)
        return client

    def healthy(self, service: str, home: str = "") -> bool:
        """What the service's own health check says."""
        _, *command = SERVICES[service]["healthcheck"]["test"]
        environment = self._environment(service, home or service)
        return not subprocess.run(self._command(command), env=environment).returncode

    def said(self, home: str) -> str:
        return (self.folder / f"{home}.log").read_text()

    def stop(self) -> None:
        for client in self.clients:
            client.close()
        for process in self.running:
            process.terminate()
        for process in self.running:
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def installed(redis_server: redis.Redis, tmp_path: Path) -> Iterator[Installation]:
    """PostgreSQL and Redis run, and the database is migrated."""
    with serving_postgres("only-for-this-test") as url:
        made = Installation(tmp_path, new_database(url))
        assert made.start("migrate").wait(300) == 0, made.said("migrate")
        try:
            yield made
        finally:
            made.stop()


def _upload(web: httpx.Client) -> str:
    rows = [json.dumps({"input": one, "output": other}) for one, other in factories.examples(60)]
    sent = web.post("/api/datasets", files={"file": ("messages.jsonl", "\n".join(rows).encode())})
    assert sent.status_code == 201, sent.text
    return str(sent.json()["id"])


class Watcher:
    """Follows an experiment's stream as a browser does."""

    def __init__(self, web: httpx.Client, experiment: str) -> None:
        self.events: list[tuple[str, Any]] = []
        self.address = f"/experiments/{experiment}/events"
        self.web = web
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        with contextlib.suppress(httpx.TransportError):
            with self.web.stream("GET", self.address) as answer:
                name = ""
                for line in answer.iter_lines():
                    kind, _, value = line.partition(": ")
                    if kind == "event":
                        name = value
                    elif kind == "data":
                        self.events.append((name, json.loads(value)))

    def saw(self, name: str) -> bool:
        return any(kind == name for kind, _ in self.events)

    def states(self, word: str) -> int:
        """How many runs have been told to be so."""
        shown = {run["id"]: run for kind, runs in self.events if kind == "runs" for run in runs}
        return sum(word in json.dumps(run).lower() for run in shown.values())


def test_two_webs_and_a_worker_share_everything(installed: Installation) -> None:
    first, second = installed.web("web-1"), installed.web("web-2")
    dataset = _upload(first)
    shown = second.get(f"/api/datasets/{dataset}").json()
    assert shown["examples"][0] == {"input": "Message 0 about my order", "output": "delivery"}
    assert not installed.healthy("tuner")
    installed.start("tuner")
    assert wait_for(lambda: installed.healthy("tuner"), 300), installed.said("tuner")
    assert second.get("/healthz").json()["workers"] == {"tuner": 1, "generator": 0}
    assert second.get("/healthz").json()["status"] == "ok"
    assert second.get("/api/datasets", headers={"Authorization": "Bearer other"}).status_code == 401
    assert TOKEN not in installed.said("web-1")
    assert not storage.dataset_file(dataset).exists()  # nothing of it lies in the test's own home


@pytest.mark.faults
def test_all_of_it_tunes_and_answers(installed: Installation, tiny_model: Path) -> None:
    first, second = installed.web("web-1"), installed.web("web-2")
    for name in (
        "web-1",
        "generator",
    ):  # a model folder lies where it is chosen and where it is read
        shutil.copytree(tiny_model, installed.folder / name / "models" / "tiny")
    installed.start("generator")
    for name in ("tuner-1", "tuner-2"):
        installed.start("tuner", name)
    model = first.post("/api/base-models", json={"source": "folder", "address": "tiny"}).json()[
        "id"
    ]
    dataset = _upload(first)

    def ready() -> bool:
        found = second.get(f"/api/base-models/{model}").json()
        assert found["state"] != "failed", found
        return bool(found["state"] == "ready")

    assert wait_for(ready, 900), installed.said("generator")
    small = {"num_epochs": 3, "batch_size": 8, "max_length": 256}
    made = first.post(
        "/api/experiments",
        json={
            "name": "By hand",
            "base_model_id": model,
            "dataset_id": dataset,
            "task": "classification",
            "methods": {
                key: QUICK.get(key, {}) | small for key in ("prompt_tuning", "lora", "full")
            },
        },
    )
    assert made.status_code == 201, made.text
    experiment = made.json()
    watcher = Watcher(second, experiment["id"])
    assert wait_for(lambda: watcher.saw("done"), 1800), watcher.events[-3:]
    assert watcher.saw("points")
    runs = second.get(f"/api/experiments/{experiment['id']}").json()["runs"]
    assert [run["state"] for run in runs] == ["succeeded"] * 3, runs
    assert len({run["id"] for run in runs}) == 3
    workers = {path.name for path in installed.folder.glob("tuner-*/runs/*")}
    assert workers == {run["id"] for run in runs}
    zipped = second.get(f"/api/tuned-models/{runs[0]['id']}/files/tuned.zip")
    assert zipped.status_code == 200
    assert len(zipped.content) > 1000
    asked = second.post(
        "/api/completions",
        json={
            "base_model_id": model,
            "run_ids": [None, runs[0]["id"]],
            "input": "Message 7 about my order",
            "template": "{{input}}",
            "sampling": {"max_tokens": 4},
        },
    )
    assert asked.status_code == 202, asked.text

    def answered() -> bool:
        found = first.get(f"/api/completions/{asked.json()['id']}").json()
        return all(one["state"] == "done" for one in found["completions"])

    assert wait_for(answered, 600), installed.said("generator")
    assert installed.healthy("generator")
