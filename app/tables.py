"""Every table. Times are seconds since the epoch (UTC); ids are random and safe as file names."""

import secrets
import time
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column, relationship

from app.database import Table
from app.vote_tables import Vote as Vote
from app.worker_tables import Rehearsal as Rehearsal  # all tables are had from here
from app.worker_tables import Sample as Sample
from app.worker_tables import Worker as Worker


def new_id() -> str:
    """Twelve hex digits."""
    return secrets.token_hex(6)


class Dataset(Table):
    """Examples with a name and a fingerprint; never changed after upload."""

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    name: Mapped[str]
    fingerprint: Mapped[str]  # sha256 of the stored file
    num_examples: Mapped[int]
    num_bytes: Mapped[int]
    report: Mapped[dict[str, Any]] = mapped_column(default=dict)  # what a look at the rows found
    created_at: Mapped[float] = mapped_column(default=time.time)
    trashed_at: Mapped[float | None]  # thrown away: gone for good a day later


class BaseModel(Table):
    """The pretrained model that tuning starts from. State: waiting, preparing, ready, failed."""

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    name: Mapped[str]
    source: Mapped[str]  # wheel, hub, folder
    address: Mapped[str]  # wheel: name==version, hub: organisation/model, folder: name in models/
    state: Mapped[str] = mapped_column(default="waiting")
    progress: Mapped[str] = mapped_column(default="")  # what preparing does just now
    error: Mapped[str | None]
    worker: Mapped[str | None]
    licence: Mapped[str | None]
    note: Mapped[str] = mapped_column(default="")
    architecture: Mapped[str | None]  # the class transformers loads
    quantization: Mapped[str | None]  # gptq, awq, bitsandbytes: then QLoRA alone, or refused
    shapes: Mapped[dict[str, Any]] = mapped_column(default=dict)  # what a forecast needs
    has_chat: Mapped[bool] = mapped_column(default=False)
    fingerprint: Mapped[str | None]  # of its files; see app/fingerprints.py
    created_at: Mapped[float] = mapped_column(default=time.time)
    trashed_at: Mapped[float | None]  # thrown away: gone for good a day later


class Experiment(Table):
    """One question: this base model, this dataset, this split, this seed, this template."""

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    name: Mapped[str]
    base_model_id: Mapped[str] = mapped_column(ForeignKey("base_model.id"))
    dataset_id: Mapped[str] = mapped_column(ForeignKey("dataset.id"))
    task: Mapped[str]
    labels: Mapped[list[Any]] = mapped_column(default=list)
    template: Mapped[str]
    seed: Mapped[int]
    split: Mapped[dict[str, Any]]  # {"train": [row, ...], "validation": [...], "test": [...]}
    watch: Mapped[list[Any]] = mapped_column(default=list)  # inputs answered while it learns
    created_at: Mapped[float] = mapped_column(default=time.time)
    trashed_at: Mapped[float | None]  # thrown away: gone for good a day later

    base_model: Mapped[BaseModel] = relationship(lazy="joined")
    dataset: Mapped[Dataset] = relationship(lazy="joined")
    runs: Mapped[list["Run"]] = relationship(
        back_populates="experiment", order_by="Run.position", lazy="selectin"
    )


class Run(Table):
    """One method with its parameters inside an experiment: what is queued, trained, measured."""

    __table_args__ = (Index("ix_run_state_position", "state", "position"),)

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    experiment_id: Mapped[str] = mapped_column(ForeignKey("experiment.id"), index=True)
    method: Mapped[str]
    params: Mapped[dict[str, Any]]
    forecast: Mapped[dict[str, Any]] = mapped_column(default=dict)  # memory_mb, seconds, bytes
    state: Mapped[str] = mapped_column(default="queued")
    phase: Mapped[str] = mapped_column(default="")  # of a running one: loading, training, scoring
    position: Mapped[float] = mapped_column(default=time.time)  # order in the queue
    error: Mapped[str | None]
    created_at: Mapped[float] = mapped_column(default=time.time)
    started_at: Mapped[float | None]  # first claim
    finished_at: Mapped[float | None]

    # Who works on it. Every write of a worker carries the attempt.
    attempt: Mapped[int] = mapped_column(default=0)
    worker: Mapped[str | None]
    lease_until: Mapped[float | None]  # by the clock that `clock` names
    clock: Mapped[str | None]  # boot id of the machine, or "server"

    # Progress and what was measured.
    step: Mapped[int] = mapped_column(default=0)
    num_steps: Mapped[int | None]
    last_number: Mapped[int] = mapped_column(default=0)  # of its points; never goes back
    rewinds: Mapped[list[Any]] = mapped_column(
        default=list
    )  # [last_number then, step gone back to]
    stuck: Mapped[int] = mapped_column(default=0)  # attempts lost since something was last saved
    best_step: Mapped[int | None]
    best_loss: Mapped[float | None]
    train_seconds: Mapped[float] = mapped_column(default=0.0)
    figures: Mapped[dict[str, Any]] = mapped_column(default=dict)
    scores: Mapped[dict[str, Any]] = mapped_column(default=dict)
    whole_state: Mapped[str] = mapped_column(default="")  # of the merged copy: "", waiting, ...
    whole_error: Mapped[str | None]
    whole_worker: Mapped[str | None]
    trashed_at: Mapped[float | None]  # the tuned model was thrown away: gone a day later
    deleted_at: Mapped[float | None]  # the tuned model's files are gone; the record stays
    copied_from: Mapped[str | None]  # the run whose settings it was made of

    experiment: Mapped[Experiment] = relationship(back_populates="runs", lazy="joined")


class Event(Table):
    """A line of a run's history, in words."""

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("run.id"), index=True)
    attempt: Mapped[int]
    at: Mapped[float] = mapped_column(default=time.time)
    level: Mapped[str] = mapped_column(default="info")  # info, warning, error
    message: Mapped[str]


class Point(Table):
    """What was measured of a run at a step; one per kind (train, validation), numbered in its run.

    Losses are nats per target token; a value that is not finite is stored as null.
    """

    __table_args__ = (UniqueConstraint("run_id", "number"),)

    run_id: Mapped[str] = mapped_column(ForeignKey("run.id"), primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int]
    attempt: Mapped[int]
    epoch: Mapped[float]
    loss: Mapped[float | None]
    learning_rate: Mapped[float | None]
    grad_norm: Mapped[float | None]
    tokens_per_second: Mapped[float | None]
    memory_mb: Mapped[float | None]  # high-water mark of the process or the GPU
    seconds: Mapped[float]  # training time since step 0
    tokens: Mapped[int] = mapped_column(BigInteger)  # seen since step 0
    recorded_at: Mapped[float] = mapped_column(default=time.time)


class Checkpoint(Table):
    """A checkpoint that was whole on the disk when this row was written."""

    run_id: Mapped[str] = mapped_column(ForeignKey("run.id"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str]  # sha256 of its manifest
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    seconds: Mapped[float]  # that writing it took
    created_at: Mapped[float] = mapped_column(default=time.time)


class Notice(Table):
    """A message to the outside that a run has ended. State: waiting, sent, failed.

    Stored with the run's last state, in one transaction: it is sent at least once, or said to fail.
    """

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    run_id: Mapped[str] = mapped_column(ForeignKey("run.id"), index=True)
    state: Mapped[str] = mapped_column(default="waiting", index=True)
    tries: Mapped[int] = mapped_column(default=0)
    next_at: Mapped[float] = mapped_column(default=time.time)
    error: Mapped[str | None]
    created_at: Mapped[float] = mapped_column(default=time.time)


class Choice(Table):
    """What a person has set for the whole studio, such as that the queue is held."""

    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[dict[str, Any]] = mapped_column(default=dict)


class Baseline(Table):
    """The base model's own figures on one split; kept, so that they are measured once.

    The key is a hash of base model, precision, dataset fingerprint, split, template and labels.
    """

    key: Mapped[str] = mapped_column(primary_key=True)
    validation_loss: Mapped[float | None]
    scores: Mapped[dict[str, Any]] = mapped_column(default=dict)
    created_at: Mapped[float] = mapped_column(default=time.time)


class Answer(Table):
    """A model's answer to one test example. `owner` is a run's id or a baseline's key."""

    owner: Mapped[str] = mapped_column(primary_key=True)
    row: Mapped[int] = mapped_column(primary_key=True)  # index in the dataset
    text: Mapped[str]
    score: Mapped[float]  # 0 to 1, by the task's metric
    loss: Mapped[float | None]


class Completion(Table):
    """One answer of one model to one prompt. State: queued, running, done, failed, stopping, stopped.

    Completions of one `ask` are written side by side. No run: the base model itself.
    """

    id: Mapped[str] = mapped_column(primary_key=True, default=new_id)
    ask: Mapped[str] = mapped_column(index=True)
    place: Mapped[int] = mapped_column(default=0)  # order on the screen
    base_model_id: Mapped[str] = mapped_column(ForeignKey("base_model.id"))
    run_id: Mapped[str | None] = mapped_column(ForeignKey("run.id"))
    input: Mapped[str]
    template: Mapped[str]  # what the input was put into; "{{input}}" alone: nothing
    settings: Mapped[dict[str, Any]]  # temperature, max_tokens, seed
    state: Mapped[str] = mapped_column(default="queued", index=True)
    text: Mapped[str] = mapped_column(default="")
    error: Mapped[str | None]
    worker: Mapped[str | None]
    num_tokens: Mapped[int] = mapped_column(default=0)
    first_token_seconds: Mapped[float | None]
    tokens_per_second: Mapped[float | None]
    created_at: Mapped[float] = mapped_column(default=time.time)
