"""The doorbell: rings and announcements arrive, and nothing waits for a broker that is away."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import redis

from app import queue, valkey
from app.queue import Bells
from app.settings import settings
from tests.servers import free_port, fresh_queue, wait_for


def _kill(client: redis.Redis) -> None:
    os.kill(int(client.info("server")["process_id"]), signal.SIGKILL)
    assert valkey._process
    valkey._process.wait(5)


@pytest.mark.parametrize(("kind", "name"), [("tuner", "tune"), ("generator", "complete")])
def test_a_ring_is_a_message_on_the_kinds_queue(broker: redis.Redis, kind: str, name: str) -> None:
    assert queue.ring(kind)
    assert {key.decode() for key in broker.keys("*") if broker.type(key) == b"list"} == {name}
    message = json.loads(broker.lindex(name, 0))
    assert message["headers"]["task"] == name
    assert message["headers"]["expires"]
    assert message["content-type"] == "application/json"
    assert message["headers"]["argsrepr"] == "()"


@pytest.mark.redis
def test_a_ring_by_url(redis_server: redis.Redis) -> None:
    assert queue.is_up()
    assert queue.ring("tuner")
    assert redis_server.llen("tune") == 1


def _away(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = {
        "no socket": "",
        "refused": f"redis://127.0.0.1:{free_port()}/0",
        "unknown host": "redis://no-such-host.invalid:6379/0",
    }[how]
    monkeypatch.setattr(settings, "redis_url", url)
    fresh_queue(monkeypatch)


@pytest.mark.parametrize("how", ["no socket", "refused"])
def test_without_a_broker_a_ring_is_quickly_and_quietly_unheard(
    home: Path,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    _away(how, monkeypatch)
    begun = time.monotonic()
    assert queue.ring("tuner") is False
    assert time.monotonic() - begun < 1.0
    monkeypatch.setattr(queue, "_silent_until", 0.0)
    queue.announce("experiment")
    assert not queue.is_up()
    assert time.monotonic() - begun < 2.0
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_a_broker_that_hangs_does_not_hang_the_web(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, says nothing
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        monkeypatch.setattr(settings, "redis_url", url)
        fresh_queue(monkeypatch)
        begun = time.monotonic()
        assert not queue.ring("tuner")
        assert time.monotonic() - begun < 5
        assert not queue.is_up()


def test_after_a_failure_the_broker_is_left_alone_for_a_moment(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _away("refused", monkeypatch)
    assert not queue.ring("tuner")
    begun = time.monotonic()
    for _ in range(1000):
        assert not queue.ring("tuner")
        queue.announce("experiment")
    assert time.monotonic() - begun < 0.5


def test_rings_are_heard_again_when_the_broker_is_back(
    broker: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert queue.ring("tuner")
    _kill(broker)
    begun = time.monotonic()
    assert not queue.ring("tuner")
    assert time.monotonic() - begun < 1.0
    valkey.start()
    monkeypatch.setattr(queue, "_silent_until", 0.0)
    # The first ring may meet a connection of before; a worker that hears nothing looks by itself.
    assert wait_for(lambda: queue.ring("tuner"), 6)
    assert broker.llen("tune") == 2


def test_what_celery_may_do_is_set(home: Path) -> None:
    """Each of these has cost others their runs; see the notes in queue.py."""
    conf = queue.celery().conf
    assert conf.worker_cancel_long_running_tasks_on_connection_loss is False
    assert conf.broker_connection_retry_on_startup is True
    assert conf.broker_connection_max_retries is None
    assert conf.task_acks_late is False
    assert conf.task_ignore_result is True
    assert conf.accept_content == ["json"]
    assert conf.worker_prefetch_multiplier == 1


@contextlib.asynccontextmanager
async def _heard() -> AsyncIterator[Bells]:
    async with queue.listening() as bells:
        async with asyncio.timeout(5):
            while not bells.hears:
                await asyncio.sleep(0.01)
        yield bells


async def _set(event: asyncio.Event, seconds: float = 3.0) -> bool:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)
    return event.is_set()


def test_an_announcement_wakes_those_who_wait_for_its_key(broker: redis.Redis) -> None:
    async def listen() -> None:
        async with _heard() as bells:
            with bells.at("a") as one, bells.at("a") as two, bells.at("b") as other:
                await asyncio.to_thread(queue.announce, "a")
                assert await _set(one)
                assert await _set(two)
                assert not await _set(other, 0.2)
                one.clear()
                await asyncio.to_thread(queue.announce, "b")
                assert await _set(other)
                assert not one.is_set()
            assert not bells._events  # nothing is kept of streams that have ended

    asyncio.run(listen())


@pytest.mark.redis
def test_an_announcement_by_url(redis_server: redis.Redis) -> None:
    async def listen() -> None:
        async with _heard() as bells:
            with bells.at("a") as event:
                await asyncio.to_thread(queue.announce, "a")
                assert await _set(event)

    asyncio.run(listen())


def test_waiting_ends_at_the_announcement(broker: redis.Redis) -> None:
    async def listen() -> None:
        async with _heard() as bells:
            with bells.at("a") as event:
                asyncio.get_running_loop().call_later(
                    0.3, lambda: asyncio.create_task(asyncio.to_thread(queue.announce, "a"))
                )
                begun = time.monotonic()
                await bells.wait(event, quiet=5.0)
                assert 0.2 < time.monotonic() - begun < 3.0

    asyncio.run(listen())


def test_without_a_broker_streams_look_by_themselves_often(home: Path) -> None:
    async def listen() -> None:
        async with queue.listening() as bells:
            with bells.at("a") as event:
                begun = time.monotonic()
                for _ in range(3):
                    await bells.wait(event, slow=0.1, quiet=5.0)
                assert time.monotonic() - begun < 1.5
                assert not bells.hears

    asyncio.run(listen())


def test_bells_fall_back_when_the_broker_dies_and_come_back_with_it(broker: redis.Redis) -> None:
    async def listen() -> None:
        async with _heard() as bells:
            with bells.at("a") as event:
                await asyncio.to_thread(_kill, broker)
                async with asyncio.timeout(2):  # streams wait `quiet` until this is noticed
                    while bells.hears:
                        await asyncio.sleep(0.01)
                await asyncio.to_thread(valkey.start)
                async with asyncio.timeout(5):
                    while not bells.hears:
                        await asyncio.sleep(0.01)
                queue._silent_until = 0.0
                await asyncio.to_thread(queue.announce, "a")
                if not await _set(event, 1):  # the first may meet a connection of before
                    queue._silent_until = 0.0
                    await asyncio.to_thread(queue.announce, "a")
                assert await _set(event)

    asyncio.run(listen())


def test_listening_ends_at_once(broker: redis.Redis) -> None:
    async def listen() -> float:
        async with _heard():
            begun = time.monotonic()
        return time.monotonic() - begun

    assert asyncio.run(listen()) < 1.0
