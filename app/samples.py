"""What a run answers, while it learns, to the inputs that its experiment watches."""

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from app import queue, runs
from app.crashpoints import crashpoint
from app.tables import Run, Sample


class Frame(NamedTuple):
    """All answers of a run at one step, in the order of the watched inputs; None: not answered."""

    step: int
    texts: list[str | None]


def record(db: Session, run_id: str, attempt: int, step: int, texts: Sequence[str]) -> None:
    """Store the answers of a step, in place of any that are there. Raises LostClaim."""
    runs.lock(db, run_id, attempt)
    db.execute(delete(Sample).where(Sample.run_id == run_id, Sample.step == step))
    row = {"run_id": run_id, "attempt": attempt, "step": step}
    db.execute(insert(Sample), [row | {"place": at, "text": text} for at, text in enumerate(texts)])
    experiment = db.scalar(select(Run.experiment_id).where(Run.id == run_id))
    crashpoint("samples.stored")
    db.commit()
    queue.announce(str(experiment))


def frames(db: Session, run: Run) -> list[Frame]:
    """The run's answers step by step."""
    query = select(Sample).where(Sample.run_id == run.id).order_by(Sample.step, Sample.place)
    found: dict[int, list[str | None]] = {}
    for sample in db.scalars(query):
        texts = found.setdefault(sample.step, [None] * len(run.experiment.watch))
        if sample.place < len(texts):
            texts[sample.place] = sample.text
    return [Frame(step, texts) for step, texts in found.items()]


def has(db: Session, run_id: str, step: int) -> bool:
    """Whether the answers of that step are stored."""
    query = select(Sample.step).where(Sample.run_id == run_id, Sample.step == step)
    return db.scalar(query.limit(1)) is not None
