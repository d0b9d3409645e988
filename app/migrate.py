"""Bring the database to the tables of this version."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from app import database, storage

_LOCK = 7_281_990  # any number, the same in every process


def configuration() -> Config:
    """Alembic's, with the studio's own scripts and database."""
    made = Config()
    made.set_main_option("script_location", str(storage.migrations_folder()))
    return made


def up() -> None:
    """Upgrade to the newest revision; of several processes one does it, the others wait."""
    _move(command.upgrade, "head")


def down(revision: str) -> None:
    """Go back to the tables of an older revision; what only newer ones hold is lost."""
    _move(command.downgrade, revision)


def newest() -> str:
    """The revision of this version's tables."""
    return _scripts().get_current_head() or ""


def is_known(revision: str) -> bool:
    """Whether this version has that revision."""
    return revision in {one.revision for one in _scripts().walk_revisions()}


def _scripts() -> ScriptDirectory:
    return ScriptDirectory(str(storage.migrations_folder()))


def build(connection: Connection, revision: str) -> None:
    """Bring a database that nobody else uses to the revision; not committed here."""
    made = configuration()
    made.attributes["connection"] = connection
    command.upgrade(made, revision)


def _move(by: Callable[[Config, str], None], revision: str) -> None:
    with database.engine().connect() as connection, _alone(connection):
        made = configuration()
        made.attributes["connection"] = connection
        by(made, revision)
        connection.commit()


@contextlib.contextmanager
def _alone(connection: Connection) -> Iterator[None]:
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT pg_advisory_lock({_LOCK})"))
        try:
            yield
        finally:
            connection.rollback()  # nothing, where all was committed
            connection.execute(text(f"SELECT pg_advisory_unlock({_LOCK})"))
            connection.commit()
        return
    driver: Any = connection.connection.driver_connection
    # SQLite changes a column by copying the table: dropping the old one must delete nothing else.
    # The switch has no effect inside a transaction, hence before and after it.
    driver.execute("PRAGMA foreign_keys=OFF")
    try:
        # One transaction around all revisions: in its own Alembic commits each, and reads only once
        # which are missing; a second process that came in between would run them again.
        connection.begin()
        yield
    finally:
        connection.rollback()  # nothing, where all was committed
        if not connection.invalidated:  # an interrupt closes it
            driver.execute("PRAGMA foreign_keys=ON")
