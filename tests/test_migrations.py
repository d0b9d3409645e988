"""Migrations: they make the tables of this version, lose nothing, and go back."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from sqlalchemy import func, inspect, select, text
from sqlalchemy.exc import IntegrityError

from app import database, migrate, points, runs, tables
from app.settings import settings
from app.tables import Event, Point, Run
from tests import factories
from tests.servers import at_once


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def empty(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A database without tables; its kind."""
    if request.param == "postgres":
        request.getfixturevalue("empty_postgres")
    else:
        monkeypatch.setattr(settings, "home", str(tmp_path / "empty"))
        monkeypatch.setattr(settings, "database_url", "")
        database.engine.cache_clear()
    yield request.param
    database.engine().dispose()
    database.engine.cache_clear()


REVISIONS = [
    script.revision
    for script in ScriptDirectory.from_config(migrate.configuration()).walk_revisions()
]  # the newest first


def _names() -> set[str]:
    return set(inspect(database.engine()).get_table_names())


def test_the_newest_revision_equals_the_tables(empty: str) -> None:
    migrate.up()
    with database.engine().connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, tables.Table.metadata) == []


def test_there_and_back(empty: str) -> None:
    migrate.up()
    assert _names() == {*tables.Table.metadata.tables, "alembic_version"}
    with database.session() as db:
        run = factories.run(db, state="running")
        run_id = run.id
        db.add(Event(run_id=run_id, attempt=1, message="Taken up."))
        db.add(Point(run_id=run_id, number=1, attempt=1, **factories.measured(1)._asdict()))
        db.commit()
    for revision in REVISIONS[1:]:  # back to the first and up again, step by step: nothing is lost
        migrate.down(revision)
    migrate.up()
    with database.session() as db:
        assert runs.get(db, run_id).state == "running"
        assert [point.step for point in points.curve(db, run_id)] == [1]
        assert len(runs.history(db, run_id)) == 1
    migrate.down("base")
    assert _names() == {"alembic_version"}
    migrate.up()
    assert _names() == {*tables.Table.metadata.tables, "alembic_version"}


def test_upgrading_again_keeps_everything(empty: str) -> None:
    migrate.up()
    with database.session() as db:
        run_id = factories.run(db).id
    migrate.up()
    with database.session() as db:
        assert db.scalars(select(Run.id)).all() == [run_id]


def test_there_is_one_newest_revision() -> None:
    assert len(ScriptDirectory.from_config(migrate.configuration()).get_heads()) == 1


def test_of_several_processes_one_upgrades(empty: str) -> None:
    at_once("from app import migrate\nGO\nmigrate.up()", 2)
    assert "run" in _names()


def test_changing_a_column_deletes_nothing_that_refers_to_its_table(
    empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite copies the table and drops the old one, to which other rows refer."""
    migrate.up()
    with database.session() as db:
        run = factories.run(db, state="running")
        db.add(Event(run_id=run.id, attempt=1, message="Taken up."))
        db.add(Point(run_id=run.id, number=1, attempt=1, **factories.measured(1)._asdict()))
        db.commit()

    def change(made: object, _revision: str) -> None:
        context = MigrationContext.configure(made.attributes["connection"])  # type: ignore[attr-defined]
        with Operations(context).batch_alter_table("run") as batch:
            batch.alter_column("method", new_column_name="way")

    monkeypatch.setattr(command, "upgrade", change)
    migrate.up()
    with database.session() as db:
        assert db.scalar(text("SELECT way FROM run")) == "lora"
        for table in (Event, Point):
            assert db.scalar(select(func.count()).select_from(table)) == 1
        db.add(Event(run_id="nothing", attempt=1, message="Of no run."))
        with pytest.raises(IntegrityError):  # foreign keys hold again
            db.commit()
