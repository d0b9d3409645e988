"""Follow an experiment or an ask: what changed, as it changes, over a stream that can be resumed.

No database session is held while a stream waits: it looks, in a thread, and waits for a bell.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from fastapi import FastAPI
from fastapi.sse import KEEPALIVE_COMMENT, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from app import completions, database, queue
from app.errors import NotFound
from app.web import formats, looks

BREATH_SECONDS = 0.1  # between two looks: at most ten events a second
PING_SECONDS = 15.0  # a stream that has nothing to say shows that it is there
LIFETIME_SECONDS = 600.0  # then the browser connects again, and nobody streams for ever


def closing(app: FastAPI) -> asyncio.Event:
    """Set by the server's exit signal: every stream ends at once."""
    if not hasattr(app.state, "closing"):
        app.state.closing = asyncio.Event()
    found: asyncio.Event = app.state.closing
    return found


def parse(vector: str) -> dict[str, int]:
    """ "run:12,run:7" -> the last number seen of each run; what cannot be read counts as unseen."""
    seen: dict[str, int] = {}
    for part in vector.split(",")[:1000]:
        run_id, _, number = part.strip().partition(":")
        if number.isascii() and number.isdecimal() and len(number) < 16:
            seen[run_id] = int(number)
    return seen


class Reader:
    """What one browser has been told of an experiment, and so what is news to it."""

    def __init__(self, experiment_id: str, seen: Mapping[str, int] | None = None) -> None:
        self.experiment_id = experiment_id
        self.told = looks.Told(seen=tuple((seen or {}).items()))
        self.last: looks.Look | None = None  # that it was told, unless there is more to read
        self.done = False

    def look(self) -> tuple[list[ServerSentEvent], bool]:
        """Look for this browser alone."""
        news = self.hear(looks.take(self.experiment_id, [dict(self.told.seen)]))
        return news.events, news.more

    def hear(self, look: looks.Look) -> looks.News:
        """The events of what is new."""
        news = look.news(self.told)
        self.told, self.done = news.told, news.done
        self.last = None if news.more else look
        return news


class Watch:
    """Looks at an experiment for all who follow it: once for all that wait at that moment."""

    def __init__(self, app: FastAPI, experiment_id: str) -> None:
        self.experiment_id = experiment_id
        self.followers = 0
        self.newest: looks.Look | None = None
        self.waiting: list[tuple[looks.Told, asyncio.Future[looks.Look | None]]] = []
        self.called = asyncio.Event()  # somebody waits who does not know the newest look
        self.bells, self.end = getattr(app.state, "bells", None) or queue.Bells(), closing(app)
        self.task = asyncio.create_task(self._run())

    async def next(self, reader: Reader) -> looks.Look | None:
        """A look that begins from now on, as soon as there may be news; None: the studio closes."""
        if self.end.is_set() or self.task.done():
            return None
        if reader.last is None or reader.last is not self.newest:
            self.called.set()
        answer: asyncio.Future[looks.Look | None] = asyncio.get_running_loop().create_future()
        self.waiting.append((reader.told, answer))
        return await answer

    async def _run(self) -> None:
        rested = 0.0
        try:
            with self.bells.at(self.experiment_id) as bell:
                while not self.end.is_set():
                    if not self.called.is_set():
                        await _first(self.bells.wait(bell), self.called.wait(), self.end.wait())
                    await asyncio.sleep(rested - time.monotonic())
                    bell.clear()
                    self.called.clear()
                    await self._answer()
                    rested = time.monotonic() + BREATH_SECONDS
        finally:
            for _, answer in self.waiting:
                _settle(answer, None)

    async def _answer(self) -> None:
        asked, self.waiting = self.waiting, []
        seen = [dict(one) for one in {told.seen for told, _ in asked}]
        try:
            look = await run_in_threadpool(looks.take, self.experiment_id, seen)
        except Exception as error:  # the database is away: those streams break, and come back
            for _, answer in asked:
                _settle(answer, error)
            return
        self.newest = look
        for _, answer in asked:
            _settle(answer, look)
        if self.waiting:  # who came while this looked may have missed what it found
            self.called.set()


def _settle(answer: asyncio.Future[Any], found: Any) -> None:
    if answer.done():  # its browser has gone
        return
    if isinstance(found, Exception):
        answer.set_exception(found)
    else:
        answer.set_result(found)


@contextmanager
def _watching(app: FastAPI, experiment_id: str) -> Iterator[Watch]:
    """The one watch of the experiment; it ends with its last follower."""
    if not hasattr(app.state, "watches"):
        app.state.watches = {}
    watches: dict[str, Watch] = app.state.watches
    watch = watches.get(experiment_id) or watches.setdefault(
        experiment_id, Watch(app, experiment_id)
    )
    watch.followers += 1
    try:
        yield watch
    finally:
        watch.followers -= 1
        if not watch.followers:
            watch.task.cancel()
            del watches[experiment_id]


async def follow_experiment(
    app: FastAPI, experiment_id: str, seen: Mapping[str, int]
) -> AsyncIterator[bytes]:
    """Events `rewind`, `points`, `base`, `runs` and at last `done`, from what was seen on."""
    reader = Reader(experiment_id, seen)
    started = told = time.monotonic()
    with _watching(app, experiment_id) as watch:
        while not reader.done and time.monotonic() - started < LIFETIME_SECONDS:
            look = await watch.next(reader)
            if look is None:
                return
            text = reader.hear(look).text
            if text or time.monotonic() - told > PING_SECONDS:
                told = time.monotonic()
                yield text or KEEPALIVE_COMMENT


async def follow_ask(app: FastAPI, ask_id: str) -> AsyncIterator[bytes]:
    """One JSON line for each change of a completion: new text, state, figures."""
    told: dict[str, dict[str, Any]] = {}
    done = False

    def look() -> tuple[list[bytes], bool]:
        nonlocal done
        found = []
        with database.reading() as db, suppress(NotFound):  # deleted: that ends the stream
            found = completions.of(db, ask_id)
        done = all(one.state not in completions.OPEN for one in found)
        lines = []
        for one in found:
            now, before = answer(one), told.get(one.id)
            if now != before:
                told[one.id] = now
                lines.append(json.dumps(_difference(now, before)).encode() + b"\n")
        return lines, False

    async for line in _follow(app, ask_id, look, lambda: done):
        yield line


def answer(one: Any) -> dict[str, Any]:
    """A completion as the playground shows it."""
    waiting = {"queued": "Waiting for a generating worker", "running": "Loading the model"}
    words = formats.state(one.state)
    if not one.text:
        words = waiting.get(one.state, words)
    elif one.state == "running":
        words = "Answering"
    first = one.first_token_seconds
    return {
        "id": one.id,
        "state": one.state,
        "words": words,
        "text": one.text,
        "tokens": f"{one.num_tokens:,} token{'s'[: one.num_tokens > 1]}" if one.num_tokens else "",
        "speed": f"{one.tokens_per_second:.1f} tokens/s" if one.tokens_per_second else "",
        "first": "" if first is None else f"first after {formats.duration(first)}",
        "error": one.error or "",
    }


def _difference(now: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """The answer with only the text's new end as `more`, if the text before still stands."""
    old = before["text"] if before else ""
    if before and now["text"].startswith(old):
        rest = {name: value for name, value in now.items() if name != "text"}
        return rest | {"more": now["text"][len(old) :]}
    return now


async def _follow(
    app: FastAPI,
    key: str,
    look: Callable[[], tuple[list[Any], bool]],
    is_done: Callable[[], bool],
) -> AsyncIterator[Any]:
    """Look, tell, wait for the bell; until done, the studio closes or the lifetime is over."""
    bells, end = getattr(app.state, "bells", None) or queue.Bells(), closing(app)
    started = time.monotonic()
    with bells.at(key) as bell:
        while not end.is_set() and time.monotonic() - started < LIFETIME_SECONDS:
            bell.clear()
            items, more = await run_in_threadpool(look)
            for item in items:
                yield item
            if is_done():
                return
            if not more:
                if items:
                    await _first(asyncio.sleep(BREATH_SECONDS), end.wait())
                await _first(bells.wait(bell), end.wait())


async def _first(*waits: Any) -> None:
    """Until the first of them; the others are given up."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
