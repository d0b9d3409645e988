"""The database session of a request, as the two dependencies that handlers ask for."""

from collections.abc import Iterator
from typing import Annotated

from fastapi import Depends
from sqlalchemy.orm import Session

from app import database


def _reading() -> Iterator[Session]:
    with database.reading() as db:
        yield db


def _writing() -> Iterator[Session]:
    with database.session() as db:
        yield db


# Closed when the handler returns and not, as is FastAPI's default, after the whole answer is sent:
# a slow download must not hold a connection.
Reading = Annotated[Session, Depends(_reading, scope="function")]
Writing = Annotated[Session, Depends(_writing, scope="function")]
