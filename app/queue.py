"""The Celery app and the doorbell: a ring says only "look"; what to do, the tables say.

A ring may be lost, doubled or late: workers and streams look by themselves as well.
"""

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from functools import cache
from typing import Any

import redis
import redis.asyncio
from celery import Celery

from app import storage
from app.settings import settings

CHANNEL = "studio:news"
TASKS = {"tuner": "tune", "generator": "complete"}  # kind of worker -> its task, and its queue
_RETRY_SECONDS = 2.0  # after a failure the broker is left alone this long
_silent_until = 0.0


def socket_file() -> str:
    """The embedded Valkey's unix socket."""
    return str(storage.socket_folder() / "valkey.sock")


def redis_url() -> str:
    """For redis-py: the one set, else the embedded Valkey's socket."""
    return settings.redis_url or f"unix://{socket_file()}"


@cache
def celery() -> Celery:
    """The process's one Celery app."""
    made = Celery("studio")
    made.conf.update(
        broker_url=settings.redis_url or f"redis+socket://{socket_file()}",
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        # A worker must not kill what it runs because the broker blinked (the default until 6.0).
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_transport_options={
            "visibility_timeout": 3600,
            "socket_keepalive": True,
            "socket_connect_timeout": 1,
            "socket_timeout": 3,  # a broker that hangs must not hang the web with it
            "max_retries": 0,  # of a ring; the consumer goes by the setting above, and for ever
            "health_check_interval": 25,
        },
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        task_default_queue="tune",
    )
    return made


@cache
def _client(url: str) -> redis.Redis:
    return redis.Redis.from_url(url, socket_timeout=1, socket_connect_timeout=1)


def is_up() -> bool:
    """Whether the broker answers."""
    try:
        return bool(_client(redis_url()).ping())
    except redis.RedisError:
        return False


def _tried(action: Any) -> bool:
    """Run it unless the broker failed just now; whether it worked."""
    global _silent_until
    if time.monotonic() < _silent_until:
        return False
    try:
        action()
    except Exception:  # kombu and redis raise many kinds; none may stop what was committed
        _silent_until = time.monotonic() + _RETRY_SECONDS
        return False
    return True


def ring(kind: str) -> bool:
    """Tell the workers of that kind to look. False: not heard, they will find it by themselves."""
    task = TASKS[kind]
    return _tried(lambda: celery().send_task(task, queue=task, retry=False, expires=60))


def announce(key: str) -> None:
    """Wake the streams that follow this experiment or ask."""
    _tried(lambda: _client(redis_url()).publish(CHANNEL, key))


class Bells:
    """In the web process: wakes the streams that wait for a key.

    While the broker is away `waiting` looks again after `slow` seconds, which are few.
    """

    def __init__(self) -> None:
        self._events: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self.hears = False

    async def listen(self) -> None:
        """Follow the channel until cancelled; come back by itself when the broker does."""
        while True:
            with contextlib.suppress(redis.RedisError, OSError):
                await self._follow()
            self.hears = False
            await asyncio.sleep(1)

    async def _follow(self) -> None:
        client = redis.asyncio.Redis.from_url(redis_url(), socket_connect_timeout=1)
        async with client, client.pubsub() as channel:
            await channel.subscribe(CHANNEL)
            self.hears = True
            while True:
                message = await channel.get_message(ignore_subscribe_messages=True, timeout=10)
                for event in self._events.get(message["data"].decode(), ()) if message else ():
                    event.set()

    @contextlib.contextmanager
    def at(self, key: str) -> Iterator[asyncio.Event]:
        """An event set at each announcement of the key. Clear it before looking at the table."""
        event = asyncio.Event()
        self._events[key].add(event)
        try:
            yield event
        finally:
            self._events[key].discard(event)
            if not self._events[key]:
                del self._events[key]

    async def wait(self, event: asyncio.Event, slow: float = 0.25, quiet: float = 5.0) -> None:
        """Until the event is set; at most `quiet` seconds, or `slow` while no bell is heard."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), quiet if self.hears else slow)


@contextlib.asynccontextmanager
async def listening() -> AsyncIterator[Bells]:
    """Bells that listen as long as this is open: for the web's lifespan."""
    bells = Bells()
    task = asyncio.create_task(bells.listen())
    try:
        yield bells
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
