"""The rows of every table as JSON lines: out of one database, and into another."""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from sqlalchemy import (
    JSON,
    Connection,
    Engine,
    MetaData,
    Table,
    create_engine,
    func,
    insert,
    select,
    text,
)

from app import database, migrate, storage

CHUNK = 1000  # rows
LEFT_OUT = {"alembic_version", "worker"}  # who is alive just now is no matter for later

Keep = Callable[[str, Any], bool]


@contextlib.contextmanager
def frozen() -> Iterator[Connection]:
    """A connection that sees the database as it stands now, and holds up nobody who writes."""
    engine = database.engine()
    if engine.dialect.name == "postgresql":
        how = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        with engine.connect().execution_options(**how) as connection:
            yield connection
        return
    folder = storage.passing_folder("snapshot")
    copy = storage.inside(folder, "studio.sqlite")
    try:
        _copy_sqlite(engine, copy)
        with sqlite(copy) as connection:
            yield connection
    finally:
        storage.remove(folder)


def _copy_sqlite(engine: Engine, copy: storage.Path) -> None:
    with engine.connect() as source:
        module: Any = engine.dialect.dbapi
        target = module.connect(str(copy))
        driver: Any = source.connection.driver_connection
        driver.backup(target)  # in one step: no write comes between its pages
        target.close()


@contextlib.contextmanager
def sqlite(file: storage.Path) -> Iterator[Connection]:
    """A connection to a file that nobody else uses."""
    engine = create_engine(f"sqlite:///{file}", module=database.engine().dialect.dbapi)
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def revision(connection: Connection) -> str:
    """Of the tables; those that were made without migrations are of this version."""
    if "alembic_version" not in tables(connection):
        return migrate.newest()
    return str(connection.scalar(text("SELECT version_num FROM alembic_version")))


def tables(connection: Connection) -> dict[str, Table]:
    """As they are in the database, those that others refer to first."""
    found = MetaData()
    found.reflect(connection)
    for table in found.tables.values():
        for column in table.columns:
            if isinstance(column.type, JSON):
                column.type.none_as_null = True
    return {table.name: table for table in found.sorted_tables}


def dump(connection: Connection, folder: storage.Path, keep: Keep) -> dict[str, int]:
    """Write NAME.jsonl for each table into the folder; how many rows each has.

    `keep(table, row)` says whether a row is wanted.
    """
    counts = {}
    for name, table in tables(connection).items():
        if name in LEFT_OUT:
            continue
        counts[name] = 0
        query = select(table).order_by(*table.primary_key.columns)
        rows = connection.execute(query, execution_options={"yield_per": CHUNK})
        with storage.inside(folder, f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for row in rows:
                if keep(name, row):
                    file.write(json.dumps(row._asdict(), ensure_ascii=False) + "\n")
                    counts[name] += 1
    return counts


def load(connection: Connection, folder: storage.Path) -> None:
    """Insert the rows of each NAME.jsonl in the folder; not committed here."""
    for name, table in tables(connection).items():
        file = storage.inside(folder, f"{name}.jsonl")
        if name in LEFT_OUT or not file.is_file():
            continue
        for rows in _chunks(file):
            connection.execute(insert(table), rows)
        _go_on_counting(connection, table)


def _chunks(file: storage.Path) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            rows.append(json.loads(line))
            if len(rows) == CHUNK:
                yield rows
                rows = []
    if rows:
        yield rows


def _go_on_counting(connection: Connection, table: Table) -> None:
    """Have PostgreSQL number new rows after those that were inserted with their numbers."""
    if connection.dialect.name != "postgresql":
        return
    for column in table.primary_key.columns:
        if column.autoincrement is True or column.server_default is not None:
            last = connection.scalar(select(func.max(column)))
            sequence = func.pg_get_serial_sequence(table.name, column.name)
            connection.execute(select(func.setval(sequence, last or 1, last is not None)))
