"""Processes of our own: they end with the one that started them, whatever ends that."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from app import processes, storage
from tests.servers import wait_for

PARENT = """
import subprocess, sys, time
from app import processes
child = processes.start("tests.sleeper", sys.argv[1], stdout=subprocess.PIPE)
print(child.stdout.readline(), end="", flush=True)
time.sleep(120)
"""


def _gone(pid: int) -> bool:
    """Whether it has ended; one that nobody has waited for yet has, too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_a_child_dies_with_its_parent(name: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, name],
        cwd=storage.REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout
    child = int(parent.stdout.readline())
    assert not _gone(child)
    parent.kill()
    parent.communicate()
    try:
        assert wait_for(lambda: _gone(child), 5)
    finally:
        if not _gone(child):
            os.kill(child, signal.SIGKILL)


def test_a_child_whose_parent_died_before_it_could_say_so_ends() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.sleeper", "SIGTERM"],
        cwd=storage.REPOSITORY,
        env=os.environ | {"STUDIO_PARENT_PID": "1"},
        timeout=30,
        check=False,
    )
    assert ended.returncode == -signal.SIGTERM


def test_a_child_is_a_group_of_its_own_and_knows_its_parent_alone() -> None:
    """Ctrl-C in the terminal is for the one that started it; its children are not its child's."""
    child = processes.start("tests.sleeper", "SIGKILL", stdout=subprocess.PIPE)
    try:
        assert child.stdout
        assert int(child.stdout.readline()) == child.pid
        assert os.getpgid(child.pid) == child.pid != os.getpgid(0)
        environment = Path(f"/proc/{child.pid}/environ").read_bytes()
        assert f"STUDIO_PARENT_PID={os.getpid()}".encode() in environment
        assert "STUDIO_PARENT_PID" not in os.environ
    finally:
        child.kill()
        child.communicate()


def test_a_process_started_by_hand_needs_no_parent() -> None:
    script = "import signal; from app import processes; processes.die_with_parent(signal.SIGKILL)"
    assert (
        subprocess.run(
            [sys.executable, "-c", script], cwd=storage.REPOSITORY, check=False
        ).returncode
        == 0
    )


def test_what_a_process_and_its_libraries_say_goes_to_the_file(tmp_path: Path) -> None:
    script = (
        "import os, sys; from app import processes\n"
        "with open(sys.argv[1], 'a') as file: processes.log_to(file)\n"
        "print('said'); os.write(1, b'from C\\n'); os.write(2, b'complained\\n')"
    )
    log = tmp_path / "log"
    done = subprocess.run(
        [sys.executable, "-c", script, str(log)],
        cwd=storage.REPOSITORY,
        capture_output=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == (b"", b"")
    assert sorted(log.read_text().split("\n")) == ["", "complained", "from C", "said"]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("", "ended with exit code 0"),
        ("raise SystemExit(3)", "ended with exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "was ended by signal SIGKILL (often: the machine"),
        ("import os; os.kill(os.getpid(), 15)", "was ended by signal SIGTERM"),
    ],
)
def test_how_a_process_ended_in_words(script: str, words: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", script], text=True)
    process.wait()
    assert processes.ended(process).startswith(words)


def test_a_process_that_runs_has_not_ended() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True)
    assert processes.ended(process) == "is running"
    process.communicate("\n")
