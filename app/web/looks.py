"""A look at an experiment: read once, and told to each who follows it as far as it is news to them."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from fastapi.sse import ServerSentEvent, format_sse_event

from app import database, experiments, points, runs
from app.comparison import figures
from app.errors import NotFound
from app.tables import Run
from app.web import panels

PAGE = 5000  # points in one look


class Told(NamedTuple):
    """What one browser has been told. Those who have been told the same are told the same next."""

    seen: tuple[tuple[str, int], ...] = ()  # of each run, the last number
    rewinds: tuple[int, ...] = ()  # of each run, how many
    panels: tuple[tuple[str, str], ...] = ()  # of each run, as JSON
    base_loss: float | None = None


@dataclass(frozen=True)
class News:
    """What a look says to those who have been told so far. More: there is more to read at once."""

    events: list[ServerSentEvent]
    told: Told
    more: bool = False
    done: bool = False

    @cached_property
    def text(self) -> bytes:
        """As it is sent; written once."""
        return b"".join(
            format_sse_event(event=one.event, data_str=one.raw_data, id=one.id)
            for one in self.events
        )


@dataclass
class Look:
    """An experiment at one moment, with the points above the numbers that were asked for."""

    runs: list[Run]
    points: list[tuple[points.Stored, str]]  # with its JSON, written where nobody waits for it
    panels: list[tuple[str, str]]  # run, JSON
    base_loss: float | None
    gone: bool = False  # there is no such experiment any more
    _news: dict[Told, News] = field(default_factory=dict)

    def news(self, told: Told) -> News:
        """What is new to those who have been told this, found out once for all of them."""
        if told not in self._news:
            self._news[told] = self._new_to(told)
        return self._news[told]

    def _new_to(self, told: Told) -> News:
        if self.gone:
            return News([_event("done", dict(told.seen), "{}")], told, done=True)
        before = dict(told.seen)
        seen = {run.id: before.get(run.id, 0) for run in self.runs}
        events = self._rewinds(dict(zip(before, told.rewinds, strict=False)), seen)
        rewinds = tuple(len(run.rewinds) for run in self.runs)
        events += self._points(seen)
        told = told._replace(seen=tuple(seen.items()), rewinds=rewinds)
        if len(self.points) == PAGE:
            return News(events, told, more=True)
        events += self._changes(told, seen)
        done = all(run.state in runs.FINAL for run in self.runs)
        if done:
            events.append(_event("done", seen, "{}"))
        told = told._replace(panels=tuple(self.panels), base_loss=self.base_loss)
        return News(events, told, done=done)

    def _rewinds(self, heard: Mapping[str, int], seen: dict[str, int]) -> list[ServerSentEvent]:
        events = []
        for run in self.runs:
            step = points.rewound_to(run, seen[run.id])
            if step is not None and heard.get(run.id) != len(run.rewinds):
                events.append(_event("rewind", seen, _json({"run": run.id, "step": step})))
        return events

    def _points(self, seen: dict[str, int]) -> list[ServerSentEvent]:
        gone = {run.id: run.rewinds for run in self.runs}
        fresh = [
            (point, text)
            for point, text in self.points
            if point.number > seen.get(point.run_id, 0)
            and not _is_gone(point, gone.get(point.run_id, []))
        ]
        seen |= {point.run_id: point.number for point, _ in fresh}  # in order within each run
        text = ",".join(text for _, text in fresh)
        return [_event("points", seen, f"[{text}]")] if fresh else []

    def _changes(self, told: Told, seen: dict[str, int]) -> list[ServerSentEvent]:
        events, before = [], dict(told.panels)
        if self.base_loss is not None and self.base_loss != told.base_loss:
            events.append(_event("base", seen, _json({"validation_loss": self.base_loss})))
        changed = [text for run_id, text in self.panels if before.get(run_id) != text]
        if changed:
            events.append(_event("runs", seen, f"[{','.join(changed)}]"))
        return events


def take(experiment_id: str, seen: Collection[Mapping[str, int]]) -> Look:
    """Look at it for those who have seen so much each."""
    with database.reading() as db:
        try:
            experiment = experiments.get(db, experiment_id)
            least = {
                run.id: min(one.get(run.id, 0) for one in seen or [{}]) for run in experiment.runs
            }
            # Points before runs: whoever sees a rewind in the runs then knows that these
            # points may be from before it. The other way round it would be missed.
            found = points.since(db, least, PAGE)
            experiment = experiments.get(db, experiment_id)
            shown = panels.all_of(db, experiment)
            base = figures.baseline(db, experiment)
        except NotFound:
            return Look([], [], [], None, gone=True)
    return Look(
        runs=list(experiment.runs),
        points=[(point, _json(_plain(point))) for point in found],
        panels=[(panel["id"], _json(panel)) for panel in shown],
        base_loss=base.validation_loss if base else None,
    )


def _event(name: str, seen: Mapping[str, int], data: str) -> ServerSentEvent:
    vector = ",".join(f"{run_id}:{number}" for run_id, number in seen.items())
    return ServerSentEvent(event=name, id=vector, raw_data=data)


def _json(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"))


def _is_gone(point: points.Stored, rewinds: list[list[int]]) -> bool:
    return any(point.number <= last and point.step > step for last, step in rewinds)


def _plain(point: points.Stored) -> dict[str, Any]:
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
