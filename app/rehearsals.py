"""Rehearsals: two steps on the longest batch of a configuration, asked for by a person, measured by a tuner.

A row holds one configuration, by a hash of what its memory and the time of a step depend on.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app import queue
from app.errors import NotFound
from app.tables import Rehearsal

# Parameters that change neither the memory nor the time of a step.
NO_MATTER = frozenset(
    {
        "learning_rate",
        "num_epochs",
        "validation_interval",
        "warmup_share",
        "weight_decay",
        "max_grad_norm",
        "alpha",
        "initialization",
        "initialization_text",
        "seed",
        "devices",  # it is rehearsed on one
    }
)
GOING_ON = frozenset({"waiting", "running"})


def key(
    base_model_id: str,
    dataset_id: str,
    template: str,
    labels: Sequence[str],
    method: str,
    params: dict[str, Any],
) -> str:
    """What a configuration is stored under."""
    matters = {name: value for name, value in params.items() if name not in NO_MATTER}
    parts = [base_model_id, dataset_id, template, list(labels), method, matters]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def find(db: Session, key: str) -> Rehearsal | None:
    """The configuration's rehearsal as it stands; None: nobody has asked for one."""
    query = select(Rehearsal).where(Rehearsal.key == key)
    return db.scalar(query.execution_options(populate_existing=True))


def get(db: Session, key: str) -> Rehearsal:
    """The same. Raises NotFound."""
    found = find(db, key)
    if found is None:
        raise NotFound("There is no such rehearsal.")
    return found


def ask(db: Session, **row: Any) -> Rehearsal:
    """Have a tuner rehearse the configuration, again if it was; one that is going on goes on."""
    name = key(**row)
    if find(db, name) is None:
        db.add(Rehearsal(key=name, **row))
        try:
            db.commit()
        except IntegrityError:  # two asked at the same moment
            db.rollback()
    else:
        anew = {"error": None, "progress": "", "created_at": time.time(), "finished_at": None}
        _move(db, name, ("done", "failed"), "waiting", **anew)
    queue.ring("tuner")
    return _afresh(db, name)


def _afresh(db: Session, key: str) -> Rehearsal:
    found = get(db, key)
    db.commit()  # reading opened a transaction, which would keep other writers of SQLite waiting
    return found


def _move(db: Session, key: str, sources: Sequence[str], target: str, **values: Any) -> bool:
    result = db.execute(
        update(Rehearsal)
        .where(Rehearsal.key == key, Rehearsal.state.in_(sources))
        .values(state=target, **values)
        .execution_options(synchronize_session=False)
    )
    db.commit()
    return bool(result.rowcount)  # type: ignore[attr-defined]


# --- For the workers: waiting -> running -> done or failed --------------------------------------


def claim(db: Session, worker: str) -> Rehearsal | None:
    """Take one that waits, or None."""
    waiting = select(Rehearsal.key).where(Rehearsal.state == "waiting")
    name = db.scalar(waiting.order_by(Rehearsal.created_at, Rehearsal.key).limit(1))
    db.rollback()
    if name and _move(db, name, ("waiting",), "running", worker=worker):
        return _afresh(db, name)
    return None


def progress(db: Session, key: str, text: str) -> None:
    """What is being done just now."""
    _move(db, key, ("running",), "running", progress=text)


def finish(db: Session, key: str, figures: dict[str, Any]) -> None:
    """It is done, with what was measured."""
    ended = {"figures": figures, "error": None, "progress": "", "finished_at": time.time()}
    _move(db, key, ("running",), "done", worker=None, **ended)


def fail(db: Session, key: str, reason: str) -> None:
    """It ended without a result; nothing changes if it has ended already."""
    ended = {"error": reason, "progress": "", "finished_at": time.time()}
    _move(db, key, ("running",), "failed", worker=None, **ended)


def free(db: Session, worker: str) -> None:
    """Put back what a worker that ends has not done."""
    mine = select(Rehearsal.key).where(Rehearsal.state == "running", Rehearsal.worker == worker)
    for name in db.scalars(mine).all():
        _move(db, name, ("running",), "waiting", worker=None, progress="")
    db.rollback()


def free_orphans(db: Session, alive: Sequence[str]) -> None:
    """Put back those whose worker is gone."""
    lost = select(Rehearsal.key).where(Rehearsal.state == "running", Rehearsal.worker.not_in(alive))
    for name in db.scalars(lost).all():
        _move(db, name, ("running",), "waiting", worker=None, progress="")
    db.rollback()
