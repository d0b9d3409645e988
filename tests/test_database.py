"""The database: many processes write at once, and what must hold of SQLite holds."""

import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import event, func, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app import database, runs
from app.settings import settings
from app.tables import Completion, Event, Point, Run
from tests import factories
from tests.servers import at_once

NUM_PROCESSES, NUM_RUNS, NUM_POINTS = 4, 20, 4

WORKER = f"""
from app import claims, database, points, runs
from tests.factories import measured
GO
while True:
    with database.session() as db:
        run = claims.claim_next(db, name)
    if run is None:
        break
    for step in range({NUM_POINTS}):
        with database.session() as db:
            points.record(db, run.id, run.attempt, [measured(step)])
            claims.beat(db, run.id, run.attempt)
        with database.reading() as db:
            runs.history(db, run.id)
    with database.session() as db:
        runs.finish(db, run.id, run.attempt)
    print(run.id)
"""


def test_processes_that_write_at_once(db: Session) -> None:
    """Each claims, records and finishes runs: none is taken twice, and no write is refused."""
    of = factories.experiment(db)
    for _ in range(NUM_RUNS):
        factories.run(db, of)
    done = " ".join(at_once(WORKER, NUM_PROCESSES)).split()
    assert len(done) == len(set(done)) == NUM_RUNS
    states = db.scalars(select(Run.state)).all()
    assert set(states) == {"succeeded"}
    assert db.scalar(select(func.count()).select_from(Point)) == NUM_RUNS * NUM_POINTS
    assert db.scalar(select(func.max(Run.attempt))) == 1
    assert db.scalar(select(func.min(Run.last_number))) == NUM_POINTS


def test_a_transaction_that_reads_first_may_still_write(db: Session) -> None:
    """The case that fails at once with "database is locked" when transactions begin deferred."""
    run = factories.run(db)
    num_threads, rounds = 4, 15
    errors: list[BaseException] = []

    def add_one() -> None:
        try:
            for _ in range(rounds):
                with database.session() as own:
                    found = runs.get(own, run.id)
                    time.sleep(0.001)
                    found.step += 1
                    own.commit()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=add_one) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert runs.get(db, run.id).step == num_threads * rounds


def test_readers_do_not_wait_for_a_writer(db: Session) -> None:
    run = factories.run(db)
    db.execute(text("UPDATE run SET step = 7"))  # and holds the lock
    begun = time.monotonic()
    with database.reading() as reader:
        assert runs.get(reader, run.id).step == 0
    assert time.monotonic() - begun < 2


def test_how_transactions_begin(home: Path) -> None:
    said: list[str] = []

    @event.listens_for(database.engine(), "before_cursor_execute")
    def note(_c: object, _k: object, statement: str, *_: object) -> None:
        said.append(statement)

    with database.session() as db:
        db.execute(text("SELECT 1"))
    with database.reading() as db:
        db.execute(text("SELECT 2"))
    assert said == ["BEGIN IMMEDIATE", "SELECT 1", "BEGIN", "SELECT 2"]


@pytest.mark.parametrize(
    ("version", "safe"),
    [
        ((3, 40, 1), False),
        ((3, 44, 5), False),
        ((3, 44, 6), True),
        ((3, 45, 0), False),
        ((3, 50, 6), False),
        ((3, 50, 7), True),
        ((3, 51, 0), False),
        ((3, 51, 2), False),
        ((3, 51, 3), True),
        ((3, 53, 4), True),
    ],
)
def test_the_write_ahead_log_is_for_safe_versions(
    version: tuple[int, ...], safe: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert database.wal_is_safe(version) is safe
    monkeypatch.setattr(settings, "home", str(tmp_path))
    monkeypatch.setattr(settings, "database_url", "")
    monkeypatch.setattr(database.sqlite, "sqlite_version_info", version)
    database.engine.cache_clear()
    with database.session() as db:
        assert db.scalar(text("PRAGMA journal_mode")) == ("wal" if safe else "delete")
    database.engine().dispose()
    database.engine.cache_clear()


def test_what_sqlite_is_told(db: Session) -> None:
    assert db.scalar(text("PRAGMA foreign_keys")) == 1
    assert db.scalar(text("PRAGMA synchronous")) == 2
    assert db.scalar(text("PRAGMA busy_timeout")) >= 10_000


def test_foreign_keys_hold(any_db: Session) -> None:
    any_db.add(Event(run_id="nothing", attempt=1, message="Of no run."))
    with pytest.raises(IntegrityError):
        any_db.commit()


def test_many_processes_may_open_a_new_file_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one turns the write-ahead log on while the others look in."""
    monkeypatch.setattr(settings, "home", str(tmp_path))
    monkeypatch.setattr(settings, "database_url", "")
    at_once("from app import database\nGO\nassert database.is_up()", 4)


def test_whether_it_is_up(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert database.is_up()
    monkeypatch.setattr(settings, "database_url", f"postgresql://studio@/studio?host={home}")
    database.engine.cache_clear()
    assert not database.is_up()
    database.engine.cache_clear()


def test_urls(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert database.url() == f"sqlite:///{home}/studio.sqlite"
    monkeypatch.setattr(settings, "database_url", "postgresql://user@host/name")
    assert database.url() == "postgresql+psycopg://user@host/name"


HOSTILE = "a\0b \ud800 \U0001f600 \u202e </script> ' -- %s {x}"


def test_any_text_is_stored_and_read_back(any_db: Session) -> None:
    """People paste such characters; models write them."""
    of = factories.base_model(any_db)
    any_db.add(
        Completion(
            ask="a", base_model_id=of.id, input=HOSTILE, template=HOSTILE, settings={}, text=HOSTILE
        )
    )
    any_db.commit()
    any_db.expire_all()
    found = any_db.scalars(select(Completion)).one()
    expected = "a\ufffdb ? \U0001f600 \u202e </script> ' -- %s {x}"
    assert (found.input, found.template, found.text) == (expected,) * 3
