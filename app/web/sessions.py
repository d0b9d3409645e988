"""What handlers ask for as dependencies: a database session, the form that was sent, an experiment that is there."""

from collections.abc import Iterator
from typing import Annotated

from fastapi import Depends, Request
from sqlalchemy.orm import Session
from starlette.datastructures import FormData

from app import database, experiments


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


async def _form(request: Request) -> FormData:
    return await request.form()


def _exists(experiment_id: str) -> str:
    # A session of its own, closed before a stream or a file begins.
    with database.reading() as db:
        return experiments.get(db, experiment_id).id


Sent = Annotated[FormData, Depends(_form)]
Known = Annotated[str, Depends(_exists)]
