"""Tables that only workers fill, but for those of runs; had from app/tables.py, like all others."""

import time
from typing import Any

from sqlalchemy import ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from app.database import Table


class Worker(Table):
    """A worker process that was alive at `beat_at`. Kind: tuner or generator."""

    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    host: Mapped[str]
    pid: Mapped[int]
    device: Mapped[str] = mapped_column(default="")
    memory_mb: Mapped[float | None]
    num_devices: Mapped[int] = mapped_column(default=1)
    started_at: Mapped[float] = mapped_column(default=time.time)
    beat_at: Mapped[float] = mapped_column(default=time.time)


class Rehearsal(Table):
    """Two steps on the longest batch of one configuration. State: waiting, running, done, failed.

    It outlives what it names, so these are no references: without them it is of no use to anyone.
    """

    key: Mapped[str] = mapped_column(primary_key=True)
    base_model_id: Mapped[str]
    dataset_id: Mapped[str]
    template: Mapped[str]
    labels: Mapped[list[Any]] = mapped_column(default=list)
    method: Mapped[str]
    params: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(default="waiting", index=True)
    progress: Mapped[str] = mapped_column(default="")
    error: Mapped[str | None]
    worker: Mapped[str | None]
    figures: Mapped[dict[str, Any]] = mapped_column(default=dict)  # what was measured, and on what
    created_at: Mapped[float] = mapped_column(default=time.time)
    finished_at: Mapped[float | None]


class Sample(Table):
    """What a run answered at a step to one of the inputs that its experiment watches."""

    run_id: Mapped[str] = mapped_column(ForeignKey("run.id"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    place: Mapped[int] = mapped_column(primary_key=True)  # of the input in `Experiment.watch`
    attempt: Mapped[int]
    text: Mapped[str]
