"""What runs and what waits, in order, with the start and end that are forecast."""

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app import capacity, misfits, naming, order, runs, workers
from app.capacity import Room, Taken
from app.settings import settings
from app.tables import Experiment, Run, Worker

PAGE = 100
MOST_PAGES = 10  # whose times are forecast
UNKNOWN_SECONDS = 600.0  # how long a run is taken to last that has no forecast
PACE_STEPS = 10  # after so many a run's own pace is better than its forecast
BESIDE_SHARE = 0.2  # of a forecast, for what comes after the training


class Line(NamedTuple):
    """A run that is at work or waits. Times are None where nothing can be said."""

    id: str
    experiment_id: str
    experiment: str
    method: str
    name: str  # of the run among those of its experiment
    state: str
    phase: str
    step: int
    num_steps: int | None
    place: int  # in the queue, from 1; 0: at work
    memory_mb: float | None
    starts_at: float | None
    ends_at: float | None
    misfit: str  # why no worker that is alive can take it; empty: one can, or none is known


class Schedule(NamedTuple):
    """A page of the queue."""

    running: list[Line]
    queued: list[Line]
    num_queued: int
    aside: int  # paused, or waiting for disk space
    held_since: float | None
    tuners: list[Worker]
    page: int
    pages: int


class _Bench:
    """A tuner in thought: what is at work on it, and what is thought to follow."""

    def __init__(self, place: Room) -> None:
        self.room = place
        self.most = settings.runs_at_once or (0 if place.gpu else 1)  # 0: as many as fit

    def begin(self, takes: Taken) -> float | None:
        """Seconds until such a run fits in beside what is at work; None: it never does."""
        place, taken = self.room, self.room.taken
        if (takes.memory_mb or 0.0) > place.memory_mb or takes.devices > place.devices:
            return None
        if self.most == 1:  # told apart since this is asked for every run and every worker
            return max((one.seconds for one in taken), default=0.0)
        moment = 0.0
        while True:
            left = tuple(one for one in taken if one.seconds > moment)
            full = self.most and len(left) >= self.most
            if not left or (not full and place._replace(taken=left).holds(takes)):
                return moment
            moment = min(one.seconds for one in left)

    def put(self, moment: float, takes: Taken) -> None:
        """Have the run at work from that moment on."""
        kept = tuple(one for one in self.room.taken if one.seconds > moment)
        ends = takes._replace(seconds=moment + takes.seconds)
        self.room = self.room._replace(taken=(*kept, ends))


_COLUMNS = (
    Run.id,
    Run.experiment_id,
    Experiment.name,
    Run.method,
    Run.state,
    Run.phase,
    Run.step,
    Run.num_steps,
    Run.forecast,
    Run.params,
    Run.worker,
    Run.started_at,
    Run.train_seconds,
)


def show(db: Session, page: int = 1) -> Schedule:
    """What is at work, and a page of the queue. Of what waits far behind no times are told."""
    found = select(*_COLUMNS).join(Experiment, Run.experiment_id == Experiment.id)
    by_place = found.order_by(Run.position, Run.id)
    states = select(Run.state, func.count()).where(
        Run.state.in_(("queued", "paused", "waiting")), Run.trashed_at.is_(None)
    )
    counts: dict[str, int] = dict(db.execute(states.group_by(Run.state)).all())
    pages = max(1, -(-counts.get("queued", 0) // PAGE))
    page = min(page, pages)
    first = 0 if page <= MOST_PAGES else (page - 1) * PAGE
    queued = by_place.where(*runs.waits_its_turn()).offset(first).limit(page * PAGE - first)
    held = db.execute(by_place.where(Run.state.in_(runs.HELD))).all()
    rows = db.execute(queued).all()
    tuners = [worker for worker in workers.alive(db) if worker.kind == "tuner"]
    held_since = order.held_since(db)
    running, benches = _at_work(held, tuners)
    waiting = _waiting(rows, first + 1, benches, timed=not held_since and page <= MOST_PAGES)
    return Schedule(
        _named(db, running),
        _named(db, waiting[-PAGE if len(rows) % PAGE == 0 else -(len(rows) % PAGE) :]),
        counts.get("queued", 0),
        counts.get("paused", 0) + counts.get("waiting", 0),
        held_since,
        tuners,
        page,
        pages,
    )


def _named(db: Session, lines: Sequence[Line]) -> list[Line]:
    names = naming.stored(db, {line.experiment_id for line in lines})
    return [line._replace(name=names[line.id]) for line in lines]


def _takes(row: Any, gpu: bool) -> Taken:
    share = 1 - row.step / row.num_steps if row.num_steps else 1.0
    seconds = row.forecast.get("seconds", UNKNOWN_SECONDS) * share
    told = capacity.need(row.forecast, gpu)
    return Taken(told, seconds, capacity.devices(row.params), capacity.needs_gpu(row.params))


def _at_work(held: Sequence[Any], tuners: list[Worker]) -> tuple[list[Line], list[_Bench]]:
    benches = {one.id: _Bench(place) for one in tuners if (place := workers.room(one))}
    lines, now = [], time.time()
    for row in held:
        bench = benches.get(row.worker)
        takes = _takes(row, bool(bench and bench.room.gpu))._replace(seconds=_left(row, now))
        if bench:
            bench.put(0.0, takes)
        line = _line(row, 0, takes)
        lines.append(line._replace(starts_at=row.started_at, ends_at=now + takes.seconds))
    return lines, list(benches.values())


def _left(row: Any, now: float) -> float:
    """Seconds that a run at work still takes: by its pace once it has one, else by forecast."""
    forecast = row.forecast.get("seconds", UNKNOWN_SECONDS)
    by_forecast: float = max(0.0, forecast - (now - (row.started_at or now)))
    if not row.num_steps or row.step < PACE_STEPS or not row.train_seconds:
        return by_forecast
    pace: float = row.train_seconds / row.step
    return pace * int(row.num_steps - row.step) + BESIDE_SHARE * float(forecast)


def _waiting(rows: Sequence[Any], place: int, benches: list[_Bench], *, timed: bool) -> list[Line]:
    """Each run, in order and from this place on, begins on the tuner that has room for it first."""
    lines, now = [], time.time()
    for row in rows:
        wanted = {gpu: _takes(row, gpu) for gpu in (False, True)}
        begin, bench = _earliest(benches, wanted)
        line = _line(row, place, wanted[bool(bench and bench.room.gpu)])
        if bench is None and benches:
            rooms = [one.room for one in benches]
            line = line._replace(misfit=misfits.why(row.forecast, row.params, rooms))
        elif bench and timed:
            takes = wanted[bench.room.gpu]
            bench.put(begin, takes)
            starts_at = now + begin
            line = line._replace(starts_at=starts_at, ends_at=starts_at + takes.seconds)
        lines.append(line)
        place += 1
    return lines


def _earliest(benches: Sequence[_Bench], wanted: dict[bool, Taken]) -> tuple[float, _Bench | None]:
    best: tuple[float, _Bench | None] = (math.inf, None)
    for bench in benches:
        begin = bench.begin(wanted[bench.room.gpu])
        if begin is not None and begin < best[0]:
            best = (begin, bench)
            if not begin:
                break
    return best


def _line(row: Any, place: int, takes: Taken) -> Line:
    return Line(
        row.id,
        row.experiment_id,
        row.name,
        row.method,
        "",
        row.state,
        row.phase,
        row.step,
        row.num_steps,
        place,
        takes.memory_mb,
        starts_at=None,
        ends_at=None,
        misfit="",
    )
