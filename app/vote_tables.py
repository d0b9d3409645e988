"""The table of blind votes; had from app/tables.py, like all others."""

import time
from typing import Any

from sqlalchemy import ForeignKey, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.database import Table


class Vote(Table):
    """Which answer to a test example a person found best, without knowing whose it was."""

    __table_args__ = (UniqueConstraint("experiment_id", "voter", "row"),)

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    experiment_id: Mapped[str] = mapped_column(ForeignKey("experiment.id"))
    voter: Mapped[str] = mapped_column(default="")  # a name, where there is one
    row: Mapped[int]  # index in the dataset
    shown: Mapped[list[Any]]  # as shown: of each distinct answer its models, run ids or "base"
    choice: Mapped[int]  # place in `shown`, from 1; 0: none is best
    created_at: Mapped[float] = mapped_column(default=time.time)
