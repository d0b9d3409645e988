"""Bring the database to the tables of this version."""

from alembic import command
from alembic.config import Config
from sqlalchemy import text

from app import database, storage

_LOCK = 7_281_990  # any number, the same in every process


def configuration() -> Config:
    """Alembic's, with the studio's own scripts and database."""
    made = Config()
    made.set_main_option("script_location", str(storage.migrations_folder()))
    return made


def up() -> None:
    """Upgrade to the newest revision; of several processes one does it, the others wait."""
    with database.engine().connect() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text(f"SELECT pg_advisory_lock({_LOCK})"))
        made = configuration()
        made.attributes["connection"] = connection
        command.upgrade(made, "head")
        connection.commit()
        if connection.dialect.name == "postgresql":
            connection.execute(text(f"SELECT pg_advisory_unlock({_LOCK})"))
            connection.commit()
