"""What becomes of a run whose process has failed: it goes on with less, waits, or ends with the reason."""

import torch

from app import database, registry, runs, space
from app.errors import StudioError
from worker import relief

LITTLE = 2**20  # bytes that may have been asked for when a write of unknown size found no room


def let_go(run_id: str, attempt: int, error: Exception) -> None:
    """The run goes on with less memory if it can, waits if the disk is full, else it has failed."""
    if is_lack_of_memory(error) and database.lasting(lambda db: relief.take(db, run_id, attempt)):
        return
    if space.is_full(error):
        database.lasting(lambda db: space.wait(db, run_id, attempt, error, LITTLE))
    else:
        words = f"{_in_words(error)} {_kept(run_id)}"
        database.lasting(lambda db: runs.fail(db, run_id, attempt, words))


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether the machine, or its accelerator, had no memory left."""
    lacks = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, lacks) or "can't allocate" in str(error)


def _in_words(error: Exception) -> str:
    if isinstance(error, StudioError):
        return error.message
    if is_lack_of_memory(error):
        return (
            "The machine has not enough memory for this run, not even for one example at a time. "
            "Choose a shorter maximum length, QLoRA, or a smaller base model."
        )
    return f"The run stopped on an unexpected error: {type(error).__name__}: {error}."


def _kept(run_id: str) -> str:
    """What is safe."""
    saved = database.lasting(lambda db: registry.of(db, run_id))
    if not saved:
        return "What was measured before is kept; no checkpoint had been saved yet."
    return f"What was measured before is kept, and the checkpoint of step {saved[0].step}."
