"""The database is locked, restarted, full; the clock jumps. What is under way waits, and goes on."""

import os
import signal
import sqlite3
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from app import database, runs, storage, tables
from app.errors import LostClaim
from app.settings import settings
from app.tables import Event, Experiment, Point, Run, Worker
from tests import factories
from tests.faults import small
from tests.faults.plant import Plant, begun, reaches, until
from tests.faults.test_kills import same, step, whole
from tests.servers import die_with_tests, new_database, serving_postgres, use_database


def lock(seconds: float) -> None:
    """Nobody else may write for so long."""
    connection = sqlite3.connect(storage.database_file(), isolation_level=None, timeout=60)
    connection.execute("BEGIN EXCLUSIVE")
    time.sleep(seconds)
    connection.execute("ROLLBACK")
    connection.close()


@pytest.mark.parametrize(
    "seconds",
    [1, pytest.param(5, marks=pytest.mark.faults), pytest.param(25, marks=pytest.mark.faults)],
)
def test_the_database_is_locked(db: Session, model: Path, plant: Plant, seconds: int) -> None:
    """Longer than SQLite itself waits, too: the trainer keeps what it has, and writes it later."""
    plant.environment["STUDIO_LEASE_SECONDS"] = "60"
    run, curve, files = whole(db, model, plant, "quick tuner")
    until(lambda: step(run.id) >= 1)
    lock(seconds)
    reaches(run.id, "succeeded")
    assert small.now(run.id).attempt == 1
    same(run, curve, files)


@pytest.mark.faults
def test_the_web_answers_while_the_database_is_locked(db: Session, plant: Plant) -> None:
    """Pages come at once; what would be stored is refused with a sentence, and not half stored."""
    data = factories.dataset(db)
    plant.start("web")
    web = plant.web()
    held = threading.Thread(target=lock, args=(26,))
    held.start()
    time.sleep(0.5)
    began = time.monotonic()
    assert web.get("/datasets").status_code == 200
    assert time.monotonic() - began < 10
    answer = web.delete(f"/api/datasets/{data.id}")
    assert answer.status_code == 503
    assert "Nothing was changed" in answer.json()["error"]["message"]
    held.join()
    assert web.get(f"/api/datasets/{data.id}").status_code == 200
    assert web.delete(f"/api/datasets/{data.id}").status_code == 204


def test_work_that_is_under_way_outlasts_a_database_that_is_away(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0

    def act(db: Session) -> int:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise OperationalError("x", None, Exception("database is locked"))
        return int(db.scalar(text("SELECT 7")) or 0)

    monkeypatch.setattr(database.time, "sleep", lambda _seconds: None)
    assert database.lasting(act) == 7
    monkeypatch.setattr(database, "PATIENCE_SECONDS", -1.0)
    tries = 0
    with pytest.raises(OperationalError):
        database.lasting(act)
    with pytest.raises(ValueError):  # only what may pass is tried again
        database.lasting(lambda db: int("x"))


def test_a_database_without_room_is_waited_for(home: Path) -> None:
    """SQLite's own word that the disk is full."""
    run_id = ""
    with database.session() as db:
        run_id = factories.run(db, state="running").id
        pages = int(db.scalar(text("PRAGMA page_count")) or 0)

    def limit(pages: int) -> None:
        for _ in range(3):
            with database.session() as db:
                db.execute(text(f"PRAGMA max_page_count={pages}"))

    limit(pages)
    freed = threading.Timer(1.5, limit, (10**6,))
    freed.start()
    message = "x" * 100_000
    began = time.monotonic()

    def tell(db: Session) -> None:
        db.add(Event(run_id=run_id, attempt=1, message=message))
        db.commit()

    database.lasting(tell)
    freed.join()
    assert time.monotonic() - began > 1
    with database.reading() as db:
        assert [one.message for one in db.query(Event)] == [message]


# --- The clock --------------------------------------------------------------------------------


@pytest.mark.faults
def test_a_jump_of_the_clock_ends_no_lease(db: Session, model: Path, plant: Plant) -> None:
    """Leases count a clock that does not jump: wherever a row holds the time of day, it may be
    years from now or long ago, and the run goes on at its first attempt.
    """
    run, curve, files = whole(db, model, plant, "quick tuner")
    for shift in (-(10.0**8), 10.0**8, 0.0):
        with database.session() as other:
            for table, names in (
                (Run, ("created_at", "started_at", "position")),
                (Worker, ("started_at", "beat_at")),
                (Point, ("recorded_at",)),
                (Experiment, ("created_at",)),
            ):
                moved = {name: getattr(table, name) + shift for name in names}
                other.execute(update(table).values(moved))
            other.commit()
        time.sleep(1)
    reaches(run.id, "succeeded")
    assert small.now(run.id).attempt == 1
    same(run, curve, files)


@pytest.mark.postgres
def test_who_falls_asleep_over_a_run_does_not_keep_it_locked(
    postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 2, with the run's row locked by a machine that sleeps: it loses the lock and the run."""
    monkeypatch.setattr(settings, "lease_seconds", 1.5)
    with database.session() as db:
        run_id = factories.run(db, state="running").id
    tries = 0

    def place(db: Session) -> None:
        nonlocal tries
        tries += 1
        runs.lock(db, run_id, 1)
        if tries == 1:
            with database.session() as other:  # waits for the lock
                runs.settle(other, run_id, 1, "It was put back.")
        db.commit()

    began = time.monotonic()
    with pytest.raises(LostClaim):
        database.lasting(place)
    assert tries == 2
    assert time.monotonic() - began < 10
    assert small.now(run_id).state == "queued"


# --- PostgreSQL -------------------------------------------------------------------------------


class Server:
    """A PostgreSQL that can be restarted, by its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.command = [part.strip('"') for part in self._lines("postmaster.opts")[0].split()]
        self.user = (folder / "data").owner()

    def _lines(self, name: str) -> list[str]:
        return (self.folder / "data" / name).read_text().splitlines()

    def restart(self, pause: float) -> None:
        """End it at once, as when the machine is switched off, and start it anew."""
        self.stop()
        time.sleep(pause)
        as_user: dict[str, Any] = {"user": self.user} if os.getuid() == 0 else {}
        with (self.folder / "log").open("a") as log:
            subprocess.Popen(
                self.command,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_tests,
                **as_user,
            )

    def stop(self) -> None:
        """End it at once."""
        os.kill(int(self._lines("postmaster.pid")[0]), signal.SIGQUIT)
        until(lambda: not (self.folder / "data" / "postmaster.pid").exists())


@pytest.mark.faults
@pytest.mark.postgres
def test_postgresql_is_restarted(home: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_postgres() as url:
        server = Server(Path(url.partition("host=")[2]))
        use_database(new_database(url), monkeypatch)
        tables.Table.metadata.create_all(database.engine())
        with begun(monkeypatch) as plant, database.session() as db:
            plant.environment["STUDIO_LEASE_SECONDS"] = "30"
            run, curve, files = whole(db, model, plant, "quick tuner")
            db.close()
            plant.start("web")
            web = plant.web()
            until(lambda: step(run.id) >= 1)
            for pause in (0.0, 3.0):
                server.restart(pause)
                until(lambda: _answers(web))
                time.sleep(1)
            reaches(run.id, "succeeded")
            assert small.now(run.id).attempt == 1
            same(run, curve, files)
        database.engine().dispose()
        database.engine.cache_clear()
        server.stop()


def _answers(web: httpx.Client) -> bool:
    answer = web.get("/datasets")
    assert answer.status_code in (200, 503), answer.text
    return answer.status_code == 200
