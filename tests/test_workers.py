"""Which workers are alive: those that were heard of just now."""

import time

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from app import database, workers
from app.capacity import Room, gpu_name
from app.tables import Worker


def _worker(name: str, kind: str = "tuner") -> Worker:
    return Worker(id=name, kind=kind, host="here", pid=1)


def _alive(db: Session) -> list[str]:
    return [worker.id for worker in workers.alive(db)]


def test_a_worker_that_beats_is_alive_until_it_leaves(any_db: Session) -> None:
    mine = _worker("w1")
    workers.beat(any_db, mine)
    workers.beat(any_db, mine)
    workers.beat(any_db, _worker("w2", "generator"))
    assert _alive(any_db) == ["w2", "w1"]
    workers.leave(any_db, "w1")
    assert _alive(any_db) == ["w2"]


def test_what_a_worker_has_is_kept_over_its_beats(any_db: Session) -> None:
    mine = _worker("w1")
    workers.beat(any_db, mine)
    workers.describe(any_db, "w1", "CPU", 16000.0, 2)
    workers.beat(any_db, mine)
    (found,) = any_db.scalars(select(Worker).execution_options(populate_existing=True))
    assert (found.device, found.memory_mb, found.num_devices) == ("CPU", 16000.0, 2)


def test_a_worker_learns_from_its_processes_what_room_it_has(any_db: Session) -> None:
    mine = _worker("w1")
    workers.recall(any_db, mine)  # it has no row yet
    workers.beat(any_db, mine)
    workers.recall(any_db, mine)
    assert workers.room(mine) is None
    workers.describe(any_db, "w1", gpu_name("Large"), 80000.0)
    workers.recall(any_db, mine)
    assert workers.room(mine) == Room(80000.0, gpu=True)
    workers.leave(any_db, "w1")
    workers.beat(any_db, mine)  # forgotten and known again, with what it has
    assert _alive(any_db) == ["w1"]
    assert any_db.scalar(select(Worker.memory_mb)) == 80000.0


def test_a_worker_not_heard_of_is_not_alive_and_later_forgotten(
    db: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers.beat(db, _worker("w1"))
    moment = time.time()
    monkeypatch.setattr(time, "time", lambda: moment + workers.ALIVE_SECONDS + 1)
    assert _alive(db) == []
    workers.beat(db, _worker("w2"))
    assert set(db.scalars(select(Worker.id))) == {"w1", "w2"}
    monkeypatch.setattr(time, "time", lambda: moment + workers.FORGET_SECONDS + 60)
    workers.beat(db, _worker("w3"))
    assert set(db.scalars(select(Worker.id))) == {"w3"}


def test_a_worker_that_was_forgotten_is_known_again_at_its_next_beat(db: Session) -> None:
    mine = _worker("w1")
    workers.beat(db, mine)
    workers.leave(db, "w1")
    workers.beat(db, mine)
    assert _alive(db) == ["w1"]


@pytest.mark.postgres
def test_machines_whose_clocks_differ_see_each_other(
    postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one would fail the answers that another one is writing."""
    with database.session() as db:
        workers.beat(db, _worker("w1"))
        moment = time.time()
        monkeypatch.setattr(time, "time", lambda: moment + 600)
        assert _alive(db) == ["w1"]
        workers.beat(db, _worker("w2"))
        monkeypatch.setattr(time, "time", lambda: moment)
        assert _alive(db) == ["w1", "w2"]
