"""What starts the studio elsewhere, checked against the code: docker-compose.yml, Dockerfile, systemd."""

import re
import shutil
import subprocess
import tomllib
from configparser import RawConfigParser
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from app import cli
from app.settings import Settings
from app.storage import REPOSITORY

COMPOSE: dict[str, Any] = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: one for name, one in SERVICES.items() if "build" in one}
LASTING = SERVICES.keys() - {"migrate"}
UNITS = sorted((REPOSITORY / "deploy/systemd").glob("*.service"))
STUDIO = typer.main.get_command(cli.cli)
SECRETS = ("POSTGRES_PASSWORD", "REDIS_PASSWORD", "STUDIO_TOKEN")


def _settings() -> set[str]:
    return {f"STUDIO_{name.upper()}" for name in Settings.model_fields}


def _understood(command: list[str]) -> None:
    """Raises unless the command line takes it."""
    assert command[0].rpartition("/")[2] == "studio", command
    context = STUDIO.make_context("studio", command[1:], resilient_parsing=False)
    name, found, rest = STUDIO.resolve_command(context, command[1:])  # type: ignore[attr-defined]
    assert found is not None, name
    found.make_context(name, rest)


# --- docker-compose.yml -----------------------------------------------------------------------


def test_all_of_the_studio_is_there() -> None:
    assert set(SERVICES) == {"postgres", "redis", "migrate", "web", "tuner", "generator"}
    assert set(OURS) == {"migrate", "web", "tuner", "generator"}


@pytest.mark.parametrize("name", sorted(OURS))
def test_the_command_line_takes_each_command(name: str) -> None:
    _understood(OURS[name]["command"])


@pytest.mark.parametrize("name", sorted(OURS))
def test_every_variable_is_a_setting(name: str) -> None:
    given = OURS[name]["environment"]
    ours = {key for key in given if key.startswith("STUDIO_")}
    assert ours <= _settings()
    assert {"STUDIO_DATABASE_URL", "STUDIO_REDIS_URL", "STUDIO_TOKEN", "STUDIO_HOME"} <= ours
    home = OURS[name]["environment"]["STUDIO_HOME"]
    assert f"studio:{home}" in OURS[name]["volumes"]
    assert all(given[key] is None for key in given.keys() - ours)  # handed on as they are, or not


def test_there_is_no_default_password() -> None:
    text = (REPOSITORY / "docker-compose.yml").read_text()
    for secret in SECRETS:
        uses = re.findall(r"\$\{" + secret + r"[^}]*\}", text)
        assert uses
        assert set(uses) == {f"${{{secret}:?set {secret} in .env}}"}
    for service in SERVICES.values():
        for key, value in service.get("environment", {}).items():
            if re.search("PASSWORD|TOKEN|AUTH|SECRET", key):
                assert value is None or re.fullmatch(r"\$\{\w+:\?[^}]*\}", value), key
    for url in ("STUDIO_DATABASE_URL", "STUDIO_REDIS_URL"):
        assert re.search(r"//\w*:\$\{\w+_PASSWORD:\?", OURS["web"]["environment"][url])
    assert "--requirepass" in SERVICES["redis"]["command"]


@pytest.mark.parametrize("name", sorted(LASTING))
def test_every_lasting_service_has_a_health_check_and_comes_back(name: str) -> None:
    service = SERVICES[name]
    assert service["restart"] == "unless-stopped"
    kind, *command = service["healthcheck"]["test"]
    assert kind in {"CMD", "CMD-SHELL"}
    if command[0] == "studio":
        _understood(command)
    if command[0] == "python":
        compile(command[2], name, "exec")
        assert "/healthz" in command[2]


def test_the_database_is_migrated_once_before_the_rest_starts() -> None:
    migrate = SERVICES["migrate"]
    assert migrate["restart"] == "on-failure"  # and not for ever
    assert migrate["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    for name in OURS.keys() - {"migrate"}:
        needs = OURS[name]["depends_on"]
        assert needs["migrate"]["condition"] == "service_completed_successfully"
        assert needs["redis"]["condition"] == "service_healthy"


def test_what_must_last_lies_in_named_volumes() -> None:
    used = {volume.split(":")[0] for one in SERVICES.values() for volume in one["volumes"]}
    assert used == set(COMPOSE["volumes"]) == {"postgres", "redis", "studio"}


def test_a_run_has_time_to_be_saved_and_children_are_reaped() -> None:
    from worker.tuner import SAVE_SECONDS

    grace = int(re.sub(r"s$", "", OURS["tuner"]["stop_grace_period"]))
    assert grace > SAVE_SECONDS + 10
    assert OURS["tuner"]["init"] is True


def test_only_this_machine_reaches_the_web_and_nobody_the_rest() -> None:
    ports = {name: one["ports"] for name, one in SERVICES.items() if "ports" in one}
    assert ports == {"web": ["127.0.0.1:8000:8000"]}


@pytest.mark.parametrize("name", ["tuner", "generator"])
def test_the_workers_have_a_gpu(name: str) -> None:
    [device] = SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


# --- Dockerfile -------------------------------------------------------------------------------

STEPS = (REPOSITORY / "Dockerfile").read_text().splitlines()


def test_what_is_copied_is_there_and_reaches_the_build() -> None:
    ignored = {line.rstrip("/") for line in (REPOSITORY / ".dockerignore").read_text().split()}
    copied = [line.split()[1:-1] for line in STEPS if line.startswith("COPY ")]
    for names in copied:
        if names[0].startswith("--from="):
            continue
        for name in names:
            assert (REPOSITORY / name).exists(), name
            assert name not in ignored


def test_each_image_has_what_its_processes_import() -> None:
    stages = {
        stage.split("\n")[0].split()[-1]: stage
        for stage in "\n".join(STEPS).split("\nFROM ")
        if " AS " in stage
    }
    assert {one["build"]["target"] for one in OURS.values()} == {"web", "worker"} <= set(stages)
    for name in ("app", "migrations", "templates", "static", "examples"):
        assert f"COPY {name} {name}" in stages["web"]
    assert "COPY worker worker" not in stages["web"]
    for name in ("app", "worker", "migrations", "examples"):
        assert f"COPY {name} {name}" in stages["worker"]
    for stage, extras in (("web", "[s3]"), ("worker", "[worker,s3]")):
        assert f'-c requirements.lock -e ".{extras}"' in stages[stage]
        assert "USER studio" in stages[stage]
        _understood(re.findall(r'"([^"]+)"', stages[stage].rpartition("CMD ")[2]))


# --- systemd ----------------------------------------------------------------------------------


def _unit(path: Path) -> RawConfigParser:
    class Every(dict[str, Any]):
        """Keeps all lines of a key: the later ones behind the earlier."""

        def __setitem__(self, key: str, value: Any) -> None:
            if isinstance(value, list) and key in self:
                value = [*self[key], *value]
            super().__setitem__(key, value)

    found = RawConfigParser(dict_type=Every, strict=False)
    found.optionxform = str  # type: ignore[assignment,method-assign]
    found.read(path)
    return found


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_each_unit_starts_what_there_is(path: Path) -> None:
    service = _unit(path)["Service"]
    for key in ("ExecStartPre", "ExecStart"):
        if key in service:
            _understood(service[key].split())
    assert service["Restart"] == "always"
    given = {word.partition("=")[0] for word in service["Environment"].split()}
    assert given - {"HOME", "CUDA_VISIBLE_DEVICES"} <= _settings()
    assert service["User"] == "studio"
    assert "PASSWORD" not in path.read_text()


def test_there_is_a_unit_for_each_process() -> None:
    assert [path.name for path in UNITS] == [
        "studio-generator.service",
        "studio-tuner@.service",
        "studio-web.service",
    ]


def test_a_tuner_under_systemd_has_time_to_save_its_run() -> None:
    from worker.tuner import SAVE_SECONDS

    service = _unit(REPOSITORY / "deploy/systemd/studio-tuner@.service")["Service"]
    assert service["KillMode"] == "mixed"  # the worker tells its children itself
    assert int(service["TimeoutStopSec"]) > SAVE_SECONDS + 10


def test_systemd_understands_every_line(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not here; the tests above have read the units.")
    for path in UNITS:  # its only complaint would be that the studio is not installed there
        text = path.read_text().replace("/opt/studio/.venv/bin/studio", "/bin/true")
        (tmp_path / path.name).write_text(text)
    done = subprocess.run(
        [program, "verify", "--man=no", *(str(tmp_path / path.name) for path in UNITS)],
        capture_output=True,
        text=True,
    )
    # Units of the machine itself may be complained of; ours may not.
    assert [line for line in done.stderr.splitlines() if "studio" in line] == []


# --- What is written about it ------------------------------------------------------------------


def test_each_setting_is_described_and_each_that_is_named_exists() -> None:
    described = (REPOSITORY / "docs/settings.md").read_text()
    named = described + (REPOSITORY / "docs/more-machines.md").read_text()
    named += (REPOSITORY / "README.md").read_text()
    assert set(re.findall(r"STUDIO_[A-Z_]+[A-Z]", named)) <= _settings()
    inner = {"STUDIO_CRASH"}  # for tests alone
    assert {one for one in _settings() - inner if f"| `{one}` |" not in described} == set()


def test_the_licence_that_is_named_is_there() -> None:
    named = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["license"]
    text = " ".join((REPOSITORY / "LICENSE").read_text().split())
    assert named == "Apache-2.0"
    assert text.startswith("Apache License Version 2.0, January 2004")
    assert "END OF TERMS AND CONDITIONS" in text


def test_each_command_that_is_written_down_is_taken() -> None:
    text = (REPOSITORY / "docs/more-machines.md").read_text()
    commands = set(re.findall(r"`(studio [a-z ]+)`", text))
    assert len(commands) >= 5
    for command in commands:
        _understood(command.split())
