"""Follow an experiment or an ask: what changed, as it changes, over a stream that can be resumed.

No database session is held while a stream waits: it looks, in a thread, and waits for a bell.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from fastapi.sse import ServerSentEvent
from starlette.concurrency import run_in_threadpool

from app import completions, database, experiments, points, queue, runs
from app.comparison import figures
from app.errors import NotFound
from app.tables import Experiment, Point
from app.web import formats, panels

PAGE = 5000  # points in one event
BREATH_SECONDS = 0.1  # between two looks that found something: at most ten events a second
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


@dataclass
class Reader:
    """What one browser has been told of an experiment, and so what is news to it."""

    experiment_id: str
    seen: dict[str, int] = field(default_factory=dict)
    rewinds: dict[str, int] = field(default_factory=dict)  # of each run, how many were told
    panels: dict[str, dict[str, str]] = field(default_factory=dict)
    base_loss: float | None = None
    done: bool = False

    def look(self) -> tuple[list[ServerSentEvent], bool]:
        """The events of what is new, and whether there is more to read at once."""
        with database.reading() as db:
            try:
                experiment = experiments.get(db, self.experiment_id)
                self.seen = {run.id: self.seen.get(run.id, 0) for run in experiment.runs}
                # Points before runs: whoever sees a rewind in the runs then knows that these
                # points may be from before it. The other way round it would be missed.
                found = points.since(db, self.seen, PAGE)
                experiment = experiments.get(db, self.experiment_id)
                shown = panels.all_of(db, experiment)
                base = figures.baseline(db, experiment)
            except NotFound:
                self.done = True
                return [self._event("done", {})], False
        events = [*self._rewinds(experiment), *self._points(experiment, found)]
        if len(found) == PAGE:
            return events, True
        events += self._news(shown, base.validation_loss if base else None)
        if all(run.state in runs.FINAL for run in experiment.runs):
            self.done = True
            events.append(self._event("done", {}))
        return events, False

    def _rewinds(self, experiment: Experiment) -> list[ServerSentEvent]:
        events = []
        for run in experiment.runs:
            step = points.rewound_to(run, self.seen[run.id]) if run.id in self.seen else None
            if step is not None and self.rewinds.get(run.id) != len(run.rewinds):
                events.append(self._event("rewind", {"run": run.id, "step": step}))
            self.rewinds[run.id] = len(run.rewinds)
        return events

    def _points(self, experiment: Experiment, found: list[Point]) -> list[ServerSentEvent]:
        gone = {run.id: run.rewinds for run in experiment.runs}
        told = [point for point in found if not _is_gone(point, gone.get(point.run_id, []))]
        if not told:
            return []
        self.seen |= {point.run_id: point.number for point in told}  # in order within each run
        return [self._event("points", [_plain(point) for point in told])]

    def _news(self, shown: list[dict[str, str]], loss: float | None) -> list[ServerSentEvent]:
        events = []
        if loss is not None and loss != self.base_loss:
            self.base_loss = loss
            events.append(self._event("base", {"validation_loss": loss}))
        changed = [panel for panel in shown if self.panels.get(panel["id"]) != panel]
        if changed:
            self.panels |= {panel["id"]: panel for panel in changed}
            events.append(self._event("runs", changed))
        return events

    def _event(self, name: str, data: Any) -> ServerSentEvent:
        vector = ",".join(f"{run_id}:{number}" for run_id, number in self.seen.items())
        # Written here, in the thread: FastAPI's own way takes seconds for many points.
        return ServerSentEvent(
            event=name, id=vector, raw_data=json.dumps(data, separators=(",", ":"))
        )


def _is_gone(point: Point, rewinds: list[list[int]]) -> bool:
    return any(point.number <= last and point.step > step for last, step in rewinds)


def _plain(point: Point) -> dict[str, Any]:
    return {
        "run": point.run_id,
        "number": point.number,
        "kind": point.kind,
        "step": point.step,
        "epoch": round(point.epoch, 4),
        "loss": point.loss,
        "seconds": round(point.seconds, 3),
        "tokens": point.tokens,
    }


async def follow_experiment(
    app: FastAPI, experiment_id: str, seen: Mapping[str, int]
) -> AsyncIterator[ServerSentEvent]:
    """Events `rewind`, `points`, `base`, `runs` and at last `done`, from what was seen on."""
    reader = Reader(experiment_id, dict(seen))
    async for event in _follow(app, experiment_id, reader.look, lambda: reader.done):
        yield event


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
