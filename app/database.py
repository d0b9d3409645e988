"""Engine and session, and what SQLite and PostgreSQL need to be safe."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any, TypeVar

from sqlalchemy import JSON, Engine, MetaData, Text, TypeDecorator, create_engine, event, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Session, declared_attr

from app import storage
from app.settings import settings

T = TypeVar("T")
PATIENCE_SECONDS = 600.0  # how long work that is under way waits for a database to come back

try:
    from pysqlite3 import dbapi2 as sqlite
except ImportError:  # no wheel for this system: the interpreter's own SQLite
    import sqlite3 as sqlite


def wal_is_safe(version: tuple[int, ...]) -> bool:
    """Whether this SQLite is free of the WAL-reset bug, which can corrupt a file with several
    writer processes (sqlite.org/wal.html#walresetbug): 3.51.3 and later, and two backports.
    """
    return version >= (3, 51, 3) or version[:3] in {(3, 50, 7), (3, 44, 6)}


def url() -> str:
    """The database's URL: PostgreSQL if set, else SQLite in the home folder."""
    if settings.database_url:
        return settings.database_url.replace("postgresql://", "postgresql+psycopg://", 1)
    return f"sqlite:///{storage.database_file()}"


class Words(TypeDecorator[str]):
    """Text that every database takes: PostgreSQL refuses NUL, and none reads back half a pair of
    surrogates. People paste such characters, and models write them.
    """

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        """Put a replacement character in the place of what no database takes."""
        if value is None:
            return None
        return value.replace("\0", "\ufffd").encode(errors="replace").decode()


class Table(DeclarativeBase):
    """The declarative base: a table is named like its class, in small letters and underscores."""

    @declared_attr.directive
    def __tablename__(cls) -> str:  # noqa: N805 - a class here
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy reads it from the class
        dict[str, Any]: JSON(none_as_null=True),
        list[Any]: JSON(none_as_null=True),
        str: Words(),
    }


@cache
def engine() -> Engine:
    """The process's one engine, made at first use."""
    address = url()
    if not address.startswith("sqlite"):
        return create_engine(address, pool_pre_ping=True, pool_size=10, max_overflow=20)
    made = create_engine(address, module=sqlite, connect_args={"timeout": 20})
    event.listen(made, "connect", _prepare_sqlite)
    event.listen(made, "begin", _begin_immediate)
    return made


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy's begin event opens transactions, not the driver
    cursor = connection.cursor()
    cursor.execute("PRAGMA busy_timeout=20000")
    _set_journal(cursor, "wal" if wal_is_safe(sqlite.sqlite_version_info) else "delete")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _set_journal(cursor: Any, wanted: str) -> None:
    """Choose the journal once for the file. SQLite does not wait, whatever the timeout, when another
    process holds it at that moment, as when several open a new file together: try again.
    """
    end = time.monotonic() + 20
    while True:
        try:
            if cursor.execute("PRAGMA journal_mode").fetchone()[0] != wanted:
                cursor.execute(f"PRAGMA journal_mode={wanted}")
            return
        except sqlite.OperationalError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)


def _begin_immediate(connection: Any) -> None:
    # A deferred transaction that turns from reading to writing fails at once with "database is
    # locked" when its snapshot is stale, whatever the timeout. Readers say so and stay deferred.
    reading = connection.get_execution_options().get("reading", False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


@contextmanager
def session() -> Iterator[Session]:
    """A session that may write. What changes something commits as its last database act."""
    with Session(engine(), expire_on_commit=False) as db:
        yield db


@contextmanager
def reading() -> Iterator[Session]:
    """A session that only reads, and so never waits for a writer."""
    with Session(engine().execution_options(reading=True), expire_on_commit=False) as db:
        yield db


def wake_or_lose(db: Session, seconds: float) -> None:
    """From here on whoever falls asleep in this transaction for so long has lost it.

    A machine that sleeps must not keep a row of PostgreSQL locked; SQLite is on the same machine.
    """
    if db.get_bind().dialect.name == "postgresql":
        limit = max(1, int(seconds * 1000))
        db.execute(text(f"SET LOCAL idle_in_transaction_session_timeout = {limit}"))


def lasting(
    act: Callable[[Session], T],
    *,
    opened: Callable[[], AbstractContextManager[Session]] = session,
) -> T:
    """Do it in a session of its own; again and again while the database is away, locked or full.

    What was committed may be done once more if the connection broke before the answer came: give
    it only what can be done twice.
    """
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            with opened() as db:
                return act(db)
        except DBAPIError as error:
            passes = isinstance(error, (OperationalError, InterfaceError))
            if time.monotonic() > end or not (passes or error.connection_invalidated):
                raise
            time.sleep(0.5)


def is_up() -> bool:
    """Whether the database answers."""
    try:
        with reading() as db:
            db.execute(text("SELECT 1"))
    except Exception:  # any driver's error means the same here
        return False
    return True
