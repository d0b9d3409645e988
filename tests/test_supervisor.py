"""The studio as one group: what is in the way is said before anything starts."""

import socket
import subprocess
import sys

import pytest

from app import storage, supervisor
from app.errors import Unavailable
from app.settings import settings


def test_a_port_in_use_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setattr(settings, "port", other.getsockname()[1])
        with pytest.raises(Unavailable, match=r"is in use by another program.*STUDIO_PORT="):
            supervisor._check_address()
    supervisor._check_address()


def test_an_address_of_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "host", "192.0.2.1")
    with pytest.raises(Unavailable, match=r"cannot listen on 192\.0\.2\.1"):
        supervisor._check_address()


@pytest.mark.usefixtures("home")
def test_a_second_studio_on_a_home_is_refused_in_a_sentence() -> None:
    with supervisor.only_one():
        ended = subprocess.run(
            [sys.executable, "-c", "from app.cli import main; main()", "up"],
            cwd=storage.REPOSITORY,
            env={"STUDIO_HOME": settings.home, "PATH": ""},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert ended.returncode != 0
    assert "A studio already runs on" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["nothing.csv"], "There is no file nothing.csv"),
        (["README.md", "--task", "zz"], "There is no task zz"),
        (["README.md", "--template", "no place"], "{{input}}"),
        (["README.md", "--set", "lora.rank"], "write parameter=value"),
    ],
)
def test_what_is_asked_for_wrongly_is_said_before_anything_starts(
    more: list[str], words: str
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", "from app.cli import main; main()", "tune", *more],
        cwd=storage.REPOSITORY,
        env={"STUDIO_HOME": settings.home, "PATH": "", "COLUMNS": "300"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert words in ended.stderr
    assert not storage.log_file("valkey").exists()
