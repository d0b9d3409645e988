"""A load on the web: many who watch a stream, and requests that come whether or not others are answered.

Thrifty, since web and trainer need the same processors: what a watcher hears is kept as it came,
with its time, and read when the load is over.
"""

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

CONNECTIONS = 60  # for requests, at most
KEPT_SECONDS = 3.0  # the web closes what is idle for five


class Target(NamedTuple):
    """The studio under load."""

    port: int
    token: str


class Link(NamedTuple):
    """A connection for requests, and when it was used last."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    used: float = 0.0


class Event(NamedTuple):
    """What a browser hears, and when its last byte was there."""

    at: float  # time of day, as points carry it
    name: str
    id: str
    data: Any


class Watcher(asyncio.Protocol):
    """One connection that follows a stream as a browser does."""

    def __init__(self, target: Target, address: str, seen: str = "") -> None:
        self.request = _head(target, "GET", address, *([f"Last-Event-ID: {seen}"] if seen else []))
        self.heard: list[tuple[float, bytes]] = []
        self.closed = asyncio.get_running_loop().create_future()
        self.begun = time.time()

    def connection_made(self, transport: Any) -> None:
        """Ask."""
        self.transport: asyncio.Transport = transport
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        """Keep it."""
        self.heard.append((time.time(), data))
        if data.endswith(b"\r\n0\r\n\r\n"):  # the last chunk: the answer is whole
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        """The stream is over."""
        if not self.closed.done():
            self.closed.set_result(error)

    def read(self) -> tuple[str, list[Event], bool]:
        """The status line, every whole event, and whether the answer came to its proper end."""
        head, chunks = b"", []
        left = b""
        for at, piece in self.heard:
            left += piece
            if not head:
                head, found, rest = left.partition(b"\r\n\r\n")
                head, left = (head, rest) if found else (b"", left)
            if head:
                fresh, left = _chunks(left)
                chunks += [(at, one) for one in fresh]
        status = head.partition(b"\r\n")[0].decode()
        return status, list(_events(chunks)), bool(chunks) and chunks[-1][1] == b""


def _head(target: Target, method: str, address: str, *more: str) -> bytes:
    lines = [
        f"{method} {address} HTTP/1.1",
        f"Host: 127.0.0.1:{target.port}",
        f"Authorization: Bearer {target.token}",
        "Accept: */*",
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def _chunks(left: bytes) -> tuple[list[bytes], bytes]:
    """Whole chunks of the body, and what is left of the bytes."""
    found = []
    while b"\r\n" in left:
        size, _, rest = left.partition(b"\r\n")
        length = int(size, 16)
        if len(rest) < length + 2:
            break
        found.append(rest[:length])
        left = rest[length + 2 :]
    return found, left


def _events(chunks: Sequence[tuple[float, bytes]]) -> Iterator[Event]:
    text = b""
    for at, chunk in chunks:
        *whole, text = (text + chunk).split(b"\n\n")
        for block in whole:
            fields = dict(
                line.split(": ", 1) for line in block.decode().split("\n") if line[:1] != ":"
            )
            if "event" in fields:
                yield Event(at, fields["event"], fields.get("id", ""), json.loads(fields["data"]))


@dataclass
class Load:
    """So many watchers, so many requests a second, so many seconds long; and what came of it."""

    target: Target
    stream: str  # address of the stream
    ends: Sequence[str]  # what is sent once the load is over, and ends the stream
    addresses: Sequence[str]  # asked one after the other, over and over
    num_watchers: int
    rate: float
    seconds: float
    at_end: Callable[[], None] = lambda: None  # called when the last request is answered
    watchers: list[list[Watcher]] = field(default_factory=list)  # of each, its connections
    answers: list[tuple[str, float, str]] = field(default_factory=list)  # address, seconds, wrong
    late: list[float] = field(default_factory=list)  # seconds by which this process came too late
    busy: float = 0.0  # share of a processor that this process took
    idle: asyncio.LifoQueue[Link | None] = field(
        default_factory=asyncio.LifoQueue
    )  # None: not open yet

    async def run(self) -> None:
        """The whole load, until every stream has ended."""
        began, worked = time.monotonic(), time.process_time()
        for _ in range(CONNECTIONS):
            self.idle.put_nowait(None)
        async with asyncio.TaskGroup() as tasks:
            for number in range(self.num_watchers):
                tasks.create_task(self._watch(number))
            ticking = tasks.create_task(self._tick())
            await self._ask_all(tasks)
            ticking.cancel()
            self.busy = (time.process_time() - worked) / (time.monotonic() - began)
            self.at_end()
            for address in self.ends:
                status, text = await self._request("POST", address)
                assert status == "200", text
        while not self.idle.empty():
            if link := self.idle.get_nowait():
                link.writer.close()

    async def _watch(self, number: int) -> None:
        """They come one after the other; every tenth breaks off half way, and comes back."""
        await asyncio.sleep(self.seconds / 10 * number / self.num_watchers)
        mine: list[Watcher] = []
        self.watchers.append(mine)
        mine.append(await self._connect(""))
        if number % 10 == 0:
            await asyncio.sleep(self.seconds / 2)
            mine[0].transport.abort()
            await mine[0].closed
            mine.append(await self._connect(mine[0].read()[1][-1].id))
        await mine[-1].closed

    async def _connect(self, seen: str) -> Watcher:
        loop = asyncio.get_running_loop()
        _, made = await loop.create_connection(
            lambda: Watcher(self.target, self.stream, seen), "127.0.0.1", self.target.port
        )
        return made

    async def _ask_all(self, tasks: asyncio.TaskGroup) -> None:
        """Each at its time, whether or not those before it have been answered."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        asked = []
        for number in range(int(self.rate * self.seconds)):
            due = began + number / self.rate
            await asyncio.sleep(max(0.0, due - loop.time()))
            address = self.addresses[number % len(self.addresses)]
            asked.append(tasks.create_task(self._ask(address, due)))
        await asyncio.gather(*asked)

    async def _ask(self, address: str, due: float) -> None:
        try:
            async with asyncio.timeout(30):
                status, text = await self._request("GET", address)
            wrong = "" if status == "200" else f"{status} {text[:500]!r}"
        except (OSError, asyncio.IncompleteReadError) as error:
            wrong = repr(error)
        self.answers.append((address, asyncio.get_running_loop().time() - due, wrong))

    async def _request(self, method: str, address: str) -> tuple[str, bytes]:
        """Over a connection that is idle: no more than so many are open at once."""
        link = await self.idle.get()
        try:
            if link and time.monotonic() - link.used > KEPT_SECONDS:
                link.writer.close()
                link = None
            if link is None:
                link = Link(*await asyncio.open_connection("127.0.0.1", self.target.port))
            link.writer.write(_head(self.target, method, address))
            head = await link.reader.readuntil(b"\r\n\r\n")
            (length,) = re.findall(rb"(?i)\r\ncontent-length: (\d+)\r\n", head)
            text = await link.reader.readexactly(int(length))
            link = link._replace(used=time.monotonic())
            return head.split(b" ", 2)[1].decode(), text
        except BaseException:
            if link:
                link.writer.close()
            link = None
            raise
        finally:
            self.idle.put_nowait(link)

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + 0.05
            await asyncio.sleep(0.05)
            self.late.append(loop.time() - due)
