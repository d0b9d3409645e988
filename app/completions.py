"""Completions: one prompt put to several models, answered side by side."""

from collections.abc import Sequence
from typing import Any

import pydantic
from pydantic import Field
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app import base_models, prompts, queue, tuned_models
from app.crashpoints import crashpoint
from app.errors import Invalid, NotFound
from app.tables import Completion, new_id

LONGEST_INPUT = 100_000  # characters
MOST_MODELS = 8
OPEN = ("queued", "running", "stopping")


class Sampling(pydantic.BaseModel):
    """How answers are drawn."""

    temperature: float = Field(0.0, ge=0, le=2, allow_inf_nan=False)
    max_tokens: int = Field(128, ge=1, le=2048)
    seed: int = Field(1, ge=0, lt=2**31)


def ask(
    db: Session,
    *,
    base_model_id: str,
    run_ids: Sequence[str | None],
    input: str,
    template: str,
    labels: Sequence[str] = (),
    sampling: Sampling | None = None,
) -> str:
    """Put the input to each model (None: the base model itself); the ask's id.

    Raises Invalid or NotFound, and stores nothing.
    """
    _check_asked(input, run_ids)
    base_model = base_models.get(db, base_model_id)
    for run_id in run_ids:
        if run_id and tuned_models.get(db, run_id).experiment.base_model_id != base_model.id:
            raise Invalid("The models must all come from one base model.", field="models")
    settings: dict[str, Any] = (sampling or Sampling()).model_dump() | {"labels": list(labels)}
    ask_id = new_id()
    template = prompts.check_template(template)
    for place, run_id in enumerate(dict.fromkeys(run_ids)):
        db.add(
            Completion(
                ask=ask_id,
                place=place,
                base_model_id=base_model.id,
                run_id=run_id,
                input=input,
                template=template,
                settings=settings,
            )
        )
    crashpoint("ask.stored")
    db.commit()
    crashpoint("ask.committed")
    queue.ring("generator")
    return ask_id


def _check_asked(input: str, run_ids: Sequence[str | None]) -> None:
    if not input.strip():
        raise Invalid("Write something to prompt the models with.", field="input")
    if len(input) > LONGEST_INPUT:
        raise Invalid(f"The prompt may have at most {LONGEST_INPUT} characters.", field="input")
    if not 1 <= len(run_ids) <= MOST_MODELS:
        raise Invalid(f"Choose 1 to {MOST_MODELS} models to prompt.", field="models")


def of(db: Session, ask_id: str) -> list[Completion]:
    """The ask's completions, in their order on the screen. Raises NotFound."""
    query = select(Completion).where(Completion.ask == ask_id).order_by(Completion.place)
    found = list(db.scalars(query.execution_options(populate_existing=True)))
    if not found:
        raise NotFound("There is no such prompt. It may have been deleted with its experiment.")
    return found


def recent(db: Session, limit: int = 20) -> list[Completion]:
    """The first completion of each of the newest asks."""
    query = select(Completion).where(Completion.place == 0)
    return list(db.scalars(query.order_by(Completion.created_at.desc()).limit(limit)))


def stop(db: Session, ask_id: str) -> None:
    """Stop all answers of the ask; what is written stays."""
    of(db, ask_id)
    _move(db, Completion.ask == ask_id, "queued", "stopped")
    _move(db, Completion.ask == ask_id, "running", "stopping")
    db.commit()
    queue.announce(ask_id)


def _move(db: Session, which: Any, source: str, target: str, **values: Any) -> int:
    result = db.execute(
        update(Completion)
        .where(which, Completion.state == source)
        .values(state=target, **values)
        .execution_options(synchronize_session=False)
    )
    return int(result.rowcount)  # type: ignore[attr-defined]


def claim_ask(db: Session, worker: str) -> list[Completion]:
    """Take all queued completions of the oldest ask for this worker; empty if there is none."""
    oldest = select(Completion.ask).where(Completion.state == "queued")
    ask_id = db.scalar(oldest.order_by(Completion.created_at).limit(1))
    taken = ask_id and _move(db, Completion.ask == ask_id, "queued", "running", worker=worker)
    db.commit()
    if not taken or ask_id is None:
        return []
    crashpoint("ask.claimed")
    queue.announce(ask_id)
    mine = [one for one in of(db, ask_id) if one.worker == worker and one.state == "running"]
    db.commit()
    return mine


def write(db: Session, completion: Completion, **values: Any) -> bool:
    """Store the text so far or the figures; whether to go on (false: someone stopped it)."""
    db.execute(
        update(Completion)
        .where(Completion.id == completion.id, Completion.worker == completion.worker)
        .values(**values)
        .execution_options(synchronize_session=False)
    )
    state = db.scalar(select(Completion.state).where(Completion.id == completion.id))
    crashpoint("answer.written")
    db.commit()
    queue.announce(completion.ask)
    return state == "running"


def end(db: Session, completion: Completion, error: str | None = None) -> None:
    """The answer is whole, was stopped, or failed with the reason given."""
    this = Completion.id == completion.id
    if error is not None:
        _move(db, this, "running", "failed", error=error)
    else:
        _move(db, this, "running", "done")
    _move(db, this, "stopping", "stopped")
    crashpoint("answer.ending")
    db.commit()
    crashpoint("answer.ended")
    queue.announce(completion.ask)


def fail_lost(db: Session, worker: str) -> None:
    """Fail what this worker's answering process left open when it died."""
    _fail_open(db, Completion.worker == worker)


def fail_orphans(db: Session, alive: Sequence[str]) -> None:
    """Fail what workers that are no longer alive left open."""
    _fail_open(db, Completion.worker.not_in(alive))


def _fail_open(db: Session, which: Any) -> None:
    query = select(Completion).where(Completion.state.in_(("running", "stopping")), which)
    for completion in db.scalars(query).all():
        end(
            db, completion, "The generating process stopped before the answer was whole. Ask again."
        )
    db.commit()


def choices(db: Session) -> dict[str, list[Any]]:
    """What can be prompted: each ready base model's id with the runs tuned from it."""
    found: dict[str, list[Any]] = {model.id: [] for model in base_models.ready(db)}
    for run in tuned_models.all(db):
        found.setdefault(run.experiment.base_model_id, []).append(run)
    return found
