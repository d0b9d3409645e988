"""Migrations: they make the tables of this version, lose nothing, and go back."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    Float,
    Integer,
    MetaData,
    event,
    func,
    inspect,
    select,
    text,
)
from sqlalchemy.exc import DataError, IntegrityError

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


def _value(column: Column[Any], number: int) -> Any:
    """A value that shows whether it came through whole: not null, near the edge of its type."""
    if isinstance(column.type, Boolean):
        return True
    if isinstance(column.type, BigInteger) and column.table.name != "point":
        return 2**40 + number
    if isinstance(column.type, Integer):
        return 2**31 - 1 - number
    if isinstance(column.type, Double | Float):
        return 1_763_999_999.123456 + number
    if isinstance(column.type, JSON):
        return {"text": "\u00fc \U0001f600 'quoted'", "deep": [{"a": None}, 1.5, 2**40]}
    return f"{column.name} {number} \u00fc\U0001f600 'quoted'\nline"


def _fill() -> None:
    """Two rows in every table, each column with a value; the second refers to the first ones."""
    with database.session() as db:
        for table in tables.Table.metadata.sorted_tables:
            for number in (1, 2):
                row = {}
                for column in table.columns:
                    [key] = column.foreign_keys or [None]
                    row[column.name] = _value(key.column if key else column, 1 if key else number)
                db.execute(table.insert().values(row))
        db.commit()


Held = dict[str, dict[str, list[Any]]]  # table -> column -> values, in one order of rows


def _held() -> Held:
    """All that is in the database, by what the database itself says of its tables."""
    found, reflected = {}, MetaData()
    with database.engine().connect() as connection:
        reflected.reflect(connection)
        for table in reflected.sorted_tables:
            if table.name == "alembic_version":
                continue
            rows = connection.execute(table.select().order_by(*table.primary_key.columns)).all()
            names = [column.name for column in table.columns]
            found[table.name] = {name: [row[at] for row in rows] for at, name in enumerate(names)}
    return found


def _shared(held: Held, other: Held) -> Held:
    """The part of what is held that has a place in the other."""
    return {
        table: {name: held[table][name] for name in columns if name in held[table]}
        for table, columns in other.items()
        if table in held
    }


def test_there_and_back_with_data_in_every_table(empty: str) -> None:
    migrate.up()
    assert _names() == {*tables.Table.metadata.tables, "alembic_version"}
    _fill()
    whole = _held()
    assert all(len(values) == 2 for columns in whole.values() for values in columns.values())
    for revision in REVISIONS[1:]:  # step by step down, each time up again, and down to there
        before = _held()
        migrate.down(revision)
        older = _held()
        assert older == _shared(before, older)  # what the older tables hold is what was there
        migrate.up()
        newer = _held()
        assert newer.keys() == whole.keys()
        assert _shared(newer, older) == older
        for table in newer.keys() - older.keys():
            assert all(values == [] for values in newer[table].values())
        migrate.down(revision)
        assert _held() == older
    migrate.up()
    with database.session() as db:  # and the program can work with what came through
        run_id = db.scalar(select(Run.id).order_by(Run.id))
        assert run_id
        assert runs.get(db, run_id).params["deep"] == [{"a": None}, 1.5, 2**40]
        assert len(points.curve(db, run_id)) == 2
        assert len(runs.history(db, run_id)) == 2
        factories.run(db)
    migrate.down("base")
    assert _names() == {"alembic_version"}
    migrate.up()
    assert _names() == {*tables.Table.metadata.tables, "alembic_version"}


def test_going_back_to_where_the_data_does_not_fit_changes_nothing(empty: str) -> None:
    """Three thousand million tokens are more than 0001 can count on PostgreSQL."""
    migrate.up()
    with database.session() as db:
        run = factories.run(db, state="running")
        point = factories.measured(1, tokens=3_000_000_000)._asdict()
        db.add(Point(run_id=run.id, number=1, attempt=1, **point))
        db.commit()
    before = _held()
    if empty == "sqlite":  # where an integer is as long as it must be
        migrate.down("0001")
        assert _held()["point"]["tokens"] == [3_000_000_000]
        return
    with pytest.raises(DataError, match="out of range"):
        migrate.down("0001")
    assert _held() == before
    at_once("from app import migrate\nGO\nmigrate.up()", 1)  # nothing holds others up
    assert _held() == before


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


def test_an_upgrade_that_breaks_off_changes_nothing(empty: str) -> None:
    def break_off(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if "CREATE TABLE rehearsal" in statement:
            raise KeyboardInterrupt

    event.listen(database.engine(), "before_cursor_execute", break_off)
    with pytest.raises(KeyboardInterrupt):
        migrate.up()
    event.remove(database.engine(), "before_cursor_execute", break_off)
    assert _names() == set()
    migrate.up()
    assert "rehearsal" in _names()


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
