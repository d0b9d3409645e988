"""The queue as it is shown: order, forecast times, pages, and what fits no worker."""

import time

import pytest
from sqlalchemy.orm import Session

from app import misfits, order, runs, schedule, workers
from app.capacity import gpu_name
from app.settings import settings
from app.tables import Run, Worker
from tests import factories


def _tuner(
    db: Session, name: str, memory_mb: float | None, device: str = "CPU", **more: int
) -> None:
    workers.beat(db, Worker(id=name, kind="tuner", host="here", pid=1, **more))
    if memory_mb:
        workers.describe(db, name, device, memory_mb, more.get("num_devices", 1))


def _run(db: Session, memory_mb: float, seconds: float, **changes: object) -> Run:
    of = changes.pop("of", None) or factories.experiment(db)
    forecast = {"memory_mb": memory_mb, "gpu_memory_mb": memory_mb, "seconds": seconds}
    return factories.run(db, of, forecast=forecast, **changes)  # type: ignore[arg-type]


def _times(shown: schedule.Schedule) -> dict[str, tuple[float | None, float | None]]:
    """In seconds from now, begin and end of what waits."""
    now = time.time()
    return {
        line.id: tuple(at if at is None else pytest.approx(at - now, abs=2) for at in line[-3:-1])  # type: ignore[misc]
        for line in shown.queued
    }


def test_one_after_another_on_a_cpu(any_db: Session) -> None:
    _tuner(any_db, "w1", 1000.0)
    of = factories.experiment(any_db)
    running = _run(any_db, 100.0, 300.0, of=of, state="running", started_at=time.time() - 100)
    second = _run(any_db, 100.0, 50.0, of=of, position=2.0)
    first = _run(any_db, 100.0, 60.0, of=of, position=1.0)
    shown = schedule.show(any_db)
    (line,) = shown.running
    assert (line.id, line.place, line.experiment) == (running.id, 0, of.name)
    assert line.ends_at == pytest.approx(time.time() + 200, abs=2)
    assert [(line.id, line.place) for line in shown.queued] == [(first.id, 1), (second.id, 2)]
    assert _times(shown) == {first.id: (200, 260), second.id: (260, 310)}


def test_several_at_once_on_a_gpu_and_on_other_workers(any_db: Session) -> None:
    _tuner(any_db, "w1", 1000.0, gpu_name("Fast"))
    _tuner(any_db, "w2", 500.0)
    of = factories.experiment(any_db)
    wanted = [(400.0, 100.0), (400.0, 50.0), (300.0, 30.0), (800.0, 10.0)]
    ids = [
        _run(any_db, memory, seconds, of=of, position=float(place)).id
        for place, (memory, seconds) in enumerate(wanted)
    ]
    shown = schedule.show(any_db)
    assert list(_times(shown).values()) == [(0, 100), (0, 50), (0, 30), (100, 110)]
    assert [line.id for line in shown.queued] == ids


def test_a_setting_lets_a_cpu_work_on_several(
    any_db: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "runs_at_once", 2)
    _tuner(any_db, "w1", 1000.0)
    of = factories.experiment(any_db)
    for place in range(3):
        _run(any_db, 100.0, 60.0, of=of, position=float(place))
    assert list(_times(schedule.show(any_db)).values()) == [(0, 60), (0, 60), (60, 120)]


def test_a_run_at_work_is_told_by_its_pace(db: Session) -> None:
    _tuner(db, "w1", 1000.0)
    _run(db, 1.0, 50.0, state="running", step=20, num_steps=100, train_seconds=40.0)
    (line,) = schedule.show(db).running
    assert line.ends_at == pytest.approx(time.time() + 160 + 10, abs=2)


def test_without_workers_or_while_held_no_time_is_told(db: Session) -> None:
    run = _run(db, 1.0, 50.0)
    assert _times(schedule.show(db)) == {run.id: (None, None)}
    _tuner(db, "w1", None)  # it has not said yet what it has
    assert _times(schedule.show(db)) == {run.id: (None, None)}
    _tuner(db, "w1", 1000.0)
    order.hold(db)
    shown = schedule.show(db)
    assert shown.held_since
    assert _times(shown) == {run.id: (None, None)}
    order.release(db)
    assert _times(schedule.show(db)) == {run.id: (0, 50)}


def test_an_empty_queue_and_what_stands_aside(db: Session) -> None:
    shown = schedule.show(db)
    assert (shown.running, shown.queued, shown.num_queued, shown.pages) == ([], [], 0, 1)
    for state in ("paused", "waiting", "failed"):
        factories.run(db, state=state)
    assert schedule.show(db).aside == 2


def test_pages(db: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "PAGE", 3)
    monkeypatch.setattr(schedule, "MOST_PAGES", 2)
    _tuner(db, "w1", 1000.0)
    of = factories.experiment(db)
    ids = [_run(db, 1.0, 10.0, of=of, position=float(place)).id for place in range(8)]
    found = [schedule.show(db, page) for page in (1, 2, 3, 9)]
    assert [[line.id for line in one.queued] for one in found] == [
        ids[:3],
        ids[3:6],
        ids[6:],
        ids[6:],
    ]
    assert [line.place for line in found[2].queued] == [7, 8]
    assert found[1].queued[0].starts_at == pytest.approx(time.time() + 30, abs=2)
    assert found[2].queued[0].starts_at is None
    assert found[3].page == found[3].pages == 3


def test_what_fits_no_worker_says_so(any_db: Session) -> None:
    of = factories.experiment(any_db)
    large = _run(any_db, 5000.0, 50.0, of=of, position=1.0)
    wide = _run(any_db, 10.0, 50.0, of=of, position=2.0)
    wide.params = wide.params | {"devices": 8}
    small = _run(any_db, 10.0, 50.0, of=of, position=3.0)
    any_db.commit()
    misfits.tell(any_db, "w1")  # no worker is alive: nothing can be said
    assert not any(line.misfit for line in schedule.show(any_db).queued)
    _tuner(any_db, "w1", 1000.0)
    _tuner(any_db, "w2", 1000.0, num_devices=2)
    first, second, third = schedule.show(any_db).queued
    assert first.misfit.startswith("it needs about 5.0 GB of memory, and the largest has 1.0 GB.")
    assert second.misfit == "it wants 8 devices, and the most that a worker has is 2."
    assert (third.misfit, third.starts_at is not None) == ("", True)
    misfits.tell(any_db, "w2")  # one of them does it for all
    assert runs.history(any_db, large.id) == []
    for _ in range(2):
        misfits.tell(any_db, "w1")
    for run, line in ((large, first), (wide, second)):
        (event,) = runs.history(any_db, run.id)
        assert (event.message, event.level) == (misfits.BEGINNING + line.misfit, "warning")
    assert runs.history(any_db, small.id) == []
    _tuner(any_db, "w3", 6000.0)
    assert schedule.show(any_db).queued[0].misfit == ""
