"""Alembic's environment: the studio's own engine and tables."""

from alembic import context
from sqlalchemy import Connection

from app import database, tables


def run(connection: Connection) -> None:
    """Run the migrations in one transaction; SQLite changes columns by copying the table."""
    context.configure(
        connection=connection, target_metadata=tables.Table.metadata, render_as_batch=True
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    with database.engine().connect() as made:
        run(made)
