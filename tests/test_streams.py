"""Streams: whole, without gap or double, from any point on; and gone at once when the studio ends."""

import asyncio
import json
import math
import random
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.sse import ServerSentEvent
from sqlalchemy import update
from sqlalchemy.orm import Session

from app import completions, database, experiments, points, queue, runs, trash
from app.comparison import baselines
from app.tables import Completion, Experiment, Run
from app.web import looks, streams
from tests import factories, web
from tests.factories import measured


class Browser:
    """What charts.js keeps: the last point told of each run, kind and step."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str, int], float | None] = {}
        self.told: list[tuple[str, int]] = []
        self.id = ""

    def hear(self, events: Iterable[ServerSentEvent]) -> "Browser":
        for event in events:
            data = json.loads(event.raw_data or "null")
            if event.event == "points":
                for point in data:
                    self.kept[point["run"], point["kind"], point["step"]] = point["loss"]
                    self.told.append((point["run"], point["number"]))
            if event.event == "rewind":
                self.kept = {
                    key: loss
                    for key, loss in self.kept.items()
                    if key[0] != data["run"] or key[2] <= data["step"]
                }
            self.id = event.id or self.id
        return self


def curve(db: Session, of: Experiment) -> dict[tuple[str, str, int], float | None]:
    found = [point for run in of.runs for point in points.curve(db, run.id)]
    return {(point.run_id, point.kind, point.step): point.loss for point in found}


def told(text: str) -> list[ServerSentEvent]:
    """The events of a response."""
    events = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
        if "event" in fields:
            events.append(
                ServerSentEvent(
                    event=fields["event"], raw_data=fields["data"], id=fields.get("id") or None
                )
            )
    return events


@pytest.fixture
def ended(db: Session) -> Experiment:
    """Two runs that have ended, with 30 points in all."""
    of = factories.experiment(db)
    for method, count in (("lora", 20), ("full", 10)):
        run = factories.run(db, of, method=method, state="running", num_steps=count)
        points.record(db, run.id, 1, [measured(step) for step in range(1, count + 1)])
        runs.finish(db, run.id, 1)
    return experiments.get(db, of.id)


@pytest.mark.parametrize(
    ("vector", "seen"),
    [
        ("", {}),
        ("a:12,b:7", {"a": 12, "b": 7}),
        (" a:1 , b:2", {"a": 1, "b": 2}),
        ("a:-1,b:x,c,d:²,e:99999999999999999999,f:3", {"f": 3}),
    ],
)
def test_the_vector_is_read_as_far_as_it_can_be(vector: str, seen: dict[str, int]) -> None:
    assert streams.parse(vector) == seen


def test_a_page_opened_late_gets_the_whole_curve_and_the_end(
    db: Session, ended: Experiment
) -> None:
    response = web.client().get(f"/experiments/{ended.id}/events")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    events = told(response.text)
    assert [event.event for event in events] == ["points", "runs", "done"]
    heard = Browser().hear(events)
    assert heard.kept == curve(db, ended)
    assert len(heard.told) == len(set(heard.told)) == 30


@pytest.mark.parametrize("way", ["header", "query"])
def test_it_goes_on_from_any_event_without_gap_or_double(
    db: Session, ended: Experiment, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looks, "PAGE", 4)
    address = f"/experiments/{ended.id}/events"
    with web.client() as client:
        events = told(client.get(address).text)
        assert len([event for event in events if event.event == "points"]) > 5
        for cut in range(1, len(events)):
            heard = Browser().hear(events[:cut])
            if way == "header":
                rest = client.get(address, headers={"Last-Event-ID": heard.id})
            else:
                rest = client.get(address, params={"after": heard.id})
            heard.hear(told(rest.text))
            assert heard.kept == curve(db, ended)
            assert len(heard.told) == len(set(heard.told)) == 30


def test_a_resume_is_told_as_a_rewind_before_the_new_points(db: Session) -> None:
    of = factories.experiment(db)
    run = factories.run(db, of, state="running", num_steps=9)
    reader = streams.Reader(of.id)
    points.record(db, run.id, 1, [measured(step, loss=9.0) for step in range(1, 7)])
    heard = Browser().hear(reader.look()[0])
    points.rewind(db, run.id, 1, 3)
    points.record(db, run.id, 1, [measured(step, loss=1.0) for step in range(4, 6)])
    events = reader.look()[0]
    assert [event.event for event in events[:2]] == ["rewind", "points"]
    assert json.loads(events[0].raw_data or "") == {"run": run.id, "step": 3}
    assert heard.hear(events).kept == curve(db, experiments.get(db, of.id))
    assert "rewind" not in [event.event for event in reader.look()[0]]


def test_a_rewind_without_new_points_is_told_once_on_a_connection(db: Session) -> None:
    of = factories.experiment(db)
    run = factories.run(db, of, state="running", num_steps=9)
    points.record(db, run.id, 1, [measured(step) for step in range(1, 7)])
    reader = streams.Reader(of.id)
    reader.look()
    points.rewind(db, run.id, 1, 3)
    assert [event.event for event in reader.look()[0]] == ["rewind", "runs"]
    assert reader.look() == ([], False)


@pytest.mark.parametrize("seed", range(6))
def test_any_mixture_of_resumes_and_reconnections_ends_with_the_curve(
    db: Session, seed: int
) -> None:
    chance = random.Random(seed)
    of = factories.experiment(db)
    made = [factories.run(db, of, method=key, state="running") for key in ("lora", "full")]
    step = {run.id: 0 for run in made}
    heard, reader, lost = Browser(), streams.Reader(of.id), 0
    for turn in range(60):
        run = chance.choice(made)
        if chance.random() < 0.2 and step[run.id]:
            step[run.id] = chance.randrange(step[run.id])
            points.rewind(db, run.id, 1, step[run.id])
        else:
            step[run.id] += 1
            points.record(db, run.id, 1, [measured(step[run.id], loss=float(turn))])
        if chance.random() < 0.3:
            heard.hear(reader.look()[0])
        if chance.random() < 0.15:  # the connection breaks, perhaps in the middle of what was sent
            events = reader.look()[0]
            heard.hear(events[: chance.randrange(len(events) + 1)])
            reader, lost = streams.Reader(of.id, streams.parse(heard.id)), lost + 1
    heard.hear(reader.look()[0])
    assert lost > 2
    assert heard.kept == curve(db, experiments.get(db, of.id))


def test_points_of_before_a_rewind_are_held_back(
    db: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL may show old points and, a moment later, the new run: that must not be told."""
    of = factories.experiment(db)
    run = factories.run(db, of, state="running")
    points.record(db, run.id, 1, [measured(step) for step in range(1, 5)])
    reader = streams.Reader(of.id, {run.id: 1})
    before = points.since(db, {run.id: 1})
    db.expunge_all()
    points.rewind(db, run.id, 1, 2)
    monkeypatch.setattr(points, "since", lambda db, seen, limit=0: before if limit else [])
    events = reader.look()[0]
    assert [event.event for event in events[:2]] == ["rewind", "points"]
    assert [point["step"] for point in json.loads(events[1].raw_data or "")] == [2]


def test_a_loss_that_is_no_number_is_a_gap_and_zero_is_a_value(db: Session) -> None:
    of = factories.experiment(db)
    run = factories.run(db, of, state="running")
    points.record(db, run.id, 1, [measured(1, loss=math.nan), measured(2, loss=0.0)])
    heard = Browser().hear(streams.Reader(of.id).look()[0])
    assert heard.kept == {(run.id, "train", 1): None, (run.id, "train", 2): 0.0}


def test_runs_and_the_base_models_loss_are_told_when_they_change(db: Session) -> None:
    of = factories.experiment(db)
    run = factories.run(db, of, state="queued", figures={"precision": "float32"})
    reader = streams.Reader(of.id)
    (first,) = reader.look()[0]
    assert first.event == "runs"
    assert json.loads(first.raw_data or "")[0]["words"] == "In the queue"
    assert reader.look()[0] == []
    baselines.keep(db, experiments.get(db, of.id), "float32", validation_loss=2.5)
    assert [(event.event, event.raw_data) for event in reader.look()[0]] == [
        ("base", '{"validation_loss":2.5}')
    ]
    runs.pause(db, run.id)
    (changed,) = reader.look()[0]
    assert json.loads(changed.raw_data or "")[0]["state"] == "paused"


def test_an_experiment_that_is_deleted_ends_its_streams(db: Session, ended: Experiment) -> None:
    reader = streams.Reader(ended.id)
    reader.look()
    trash.throw_away(db, "experiment", ended.id)
    assert [event.event for event in reader.look()[0]] == ["done"]
    assert web.client().get(f"/experiments/{ended.id}/events").status_code == 404


# --- Following --------------------------------------------------------------------------------


async def _next(follow: Any) -> Any:
    return await asyncio.wait_for(anext(follow), 20)


def _names(sent: bytes) -> list[str | None]:
    return [event.event for event in told(sent.decode())]


def _running(db: Session) -> tuple[Experiment, Run]:
    of = factories.experiment(db)
    return of, factories.run(db, of, state="running", num_steps=9)


async def _latencies(app: FastAPI, db: Session, of: Experiment, run: Run) -> list[float]:
    """Seconds from recording to hearing, for three points."""
    stream = streams.follow_experiment(app, of.id, {})
    assert _names(await _next(stream)) == ["runs"]
    waited = []
    for step in range(1, 4):
        soon = asyncio.ensure_future(_next(stream))
        await asyncio.sleep(0.4)
        began = time.monotonic()
        await asyncio.to_thread(points.record, db, run.id, 1, [measured(step)])
        assert _names(await soon) == ["points", "runs"]
        waited.append(time.monotonic() - began)
    await stream.aclose()
    return waited


def test_new_points_come_within_300_ms_even_without_a_bell(db: Session) -> None:
    of, run = _running(db)
    waited = asyncio.run(_latencies(FastAPI(), db, of, run))
    assert sorted(waited)[1] < 0.3  # of three, for a machine that stutters


def test_a_bell_wakes_a_stream_at_once(broker: Any, db: Session) -> None:
    of, run = _running(db)

    async def follow() -> list[float]:
        app = FastAPI()
        async with queue.listening() as app.state.bells:
            while not app.state.bells.hears:
                await asyncio.sleep(0.01)
            return await _latencies(app, db, of, run)

    # By itself it would look again after five seconds.
    assert sorted(asyncio.run(follow()))[1] < 0.2


def test_a_stream_that_waits_holds_no_database_connection(db: Session) -> None:
    of, _ = _running(db)
    db.close()

    async def follow() -> Any:
        stream = streams.follow_experiment(FastAPI(), of.id, {})
        await _next(stream)
        waiting = asyncio.ensure_future(anext(stream))
        held = []
        for _ in range(40):
            await asyncio.sleep(0.01)
            held.append(database.engine().pool.checkedout())  # type: ignore[attr-defined]
        waiting.cancel()
        return held

    held = asyncio.run(follow())
    assert held.count(0) > 30  # but for the moments in which it looks


@pytest.mark.parametrize("kind", ["experiment", "ask"])
def test_streams_end_at_once_when_the_studio_closes(db: Session, kind: str) -> None:
    of, _ = _running(db)
    ask = completions.ask(
        db, base_model_id=of.base_model_id, run_ids=[None], input="Hi", template="{{input}}"
    )

    async def follow() -> float:
        app = FastAPI()
        stream: Any = (
            streams.follow_experiment(app, of.id, {})
            if kind == "experiment"
            else streams.follow_ask(app, ask)
        )
        await _next(stream)
        soon = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.4)
        began = time.monotonic()
        streams.closing(app).set()
        with pytest.raises(StopAsyncIteration):
            await soon
        return time.monotonic() - began

    assert asyncio.run(follow()) < 0.1


def test_a_stream_ends_after_its_lifetime(db: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    of, _ = _running(db)
    monkeypatch.setattr(streams, "LIFETIME_SECONDS", 0.3)
    response = web.client().get(f"/experiments/{of.id}/events")
    assert [event.event for event in told(response.text)] == ["runs"]


# --- Answers ----------------------------------------------------------------------------------


def _asked(db: Session) -> tuple[str, list[Completion]]:
    of = factories.experiment(db)
    run = factories.tuned(db, of)
    ask = completions.ask(
        db, base_model_id=of.base_model_id, run_ids=[None, run.id], input="Hi", template="{{input}}"
    )
    return ask, completions.claim_ask(db, "w1")


def _follow(ask: str, acts: list[Callable[[], object]]) -> list[dict[str, Any]]:
    """Every line of the stream, while the acts happen one after the other."""

    async def follow() -> list[dict[str, Any]]:
        async def act() -> None:
            for one in acts:
                await asyncio.sleep(0.4)
                await asyncio.to_thread(one)

        acting = asyncio.ensure_future(act())
        lines = [json.loads(line) async for line in streams.follow_ask(FastAPI(), ask)]
        await acting
        return lines

    return asyncio.run(asyncio.wait_for(follow(), 20))


def test_answers_come_piece_by_piece_and_then_end(db: Session) -> None:
    ask, (base, tuned) = _asked(db)
    lines = _follow(
        ask,
        [
            lambda: completions.write(db, base, text=" A", num_tokens=1, first_token_seconds=0.5),
            lambda: completions.write(db, base, text=" A <b>\n", num_tokens=3),
            lambda: completions.end(db, tuned, "It broke."),
            lambda: completions.end(db, base),
        ],
    )
    assert [line["words"] for line in lines if line["id"] == tuned.id] == [
        "Loading the model",
        "Failed",
    ]
    text = ""
    for line in lines:
        if line["id"] == base.id:
            text = line["text"] if "text" in line else text + line["more"]
    assert text == " A <b>\n"
    assert lines[-1]["state"] == "done"
    assert next(line["error"] for line in lines if line["state"] == "failed") == "It broke."
    assert {line["first"] for line in lines if line["state"] == "done"} == {"first after 0.5 s"}


def test_a_text_that_was_taken_back_is_told_anew(db: Session) -> None:
    ask, (base, tuned) = _asked(db)
    lines = _follow(
        ask,
        [
            lambda: completions.write(db, base, text="caf\ufffd"),
            lambda: completions.write(db, base, text="café"),
            lambda: [completions.end(db, one) for one in (base, tuned)],
        ],
    )
    assert [line["text"] for line in lines if "text" in line and line["id"] == base.id][
        -1
    ] == "café"


def test_the_answers_of_an_ask_that_ended_are_there_at_once(db: Session) -> None:
    ask, both = _asked(db)
    for one in both:
        completions.write(db, one, text="Done already")
        completions.end(db, one)
    response = web.client().get(f"/completions/{ask}/stream")
    assert response.headers["content-type"].startswith("application/x-ndjson")
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert [(line["state"], line["text"]) for line in lines] == [("done", "Done already")] * 2
    assert web.client().get("/completions/nothing/stream").status_code == 404


def test_an_ask_that_is_deleted_ends_its_stream(db: Session) -> None:
    ask, both = _asked(db)

    def delete() -> None:
        db.execute(update(Completion).values(ask="other"))
        db.commit()

    assert len(_follow(ask, [delete])) == len(both)
