"""What a home holds already, published for a studio that has been given a file store only now."""

from collections.abc import Callable, Iterator

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import files, registry, runs, storage
from app.storage import Path
from app.tables import BaseModel, Dataset, Run


def publish(db: Session, say: Callable[[str], None]) -> None:
    """Publish all that lies here and others may need; what is in the store stays as it is there."""
    found = [one for one in _all(db) if one[0].exists()]
    for number, (path, attempt) in enumerate(found, 1):
        say(f"{number} of {len(found)}: {path}")
        files.publish(path, attempt)


def _all(db: Session) -> Iterator[tuple[Path, int]]:
    for dataset_id in db.scalars(select(Dataset.id)):
        yield storage.dataset_file(dataset_id), 0
    for base_model_id in db.scalars(select(BaseModel.id).where(BaseModel.state == "ready")):
        yield storage.base_model_folder(base_model_id), 0
    # One at work publishes by itself.
    for run in db.scalars(select(Run).where(Run.state.not_in(runs.HELD))):
        for folder in (storage.tuned_model_folder, storage.last_model_folder):
            yield folder(run.id), run.attempt
        yield storage.whole_model_folder(run.id), run.attempt
        for one in registry.of(db, run.id):
            yield storage.checkpoint_folder(run.id, one.step, one.attempt), 0
