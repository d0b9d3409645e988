"""What a run that was out of memory does differently when it is taken up again."""

from typing import Any

from sqlalchemy.orm import Session

from app import methods, runs
from app.tables import Run


def params(run: Run) -> Any:
    """The run's parameters, with activation checkpointing where it has come to need it."""
    schema = methods.get(run.method).schema
    given = schema.model_validate(run.params)
    if run.figures.get("gradient_checkpointing"):
        given = given.model_copy(update={"gradient_checkpointing": True})
    return given


def find(run: Run) -> tuple[dict[str, Any], str] | None:
    """The figures that make it take less, and that in words; None: there is nothing left to try.

    A step's examples are the same, so that the result is the same but for the order of sums.
    """
    figures, given = run.figures, params(run)
    if not (longest := figures.get("longest_tokens")):
        return None  # it did not even get as far as training
    size = given.batch_size * given.accumulate_steps
    row = min(figures["token_budget"], size * longest)
    prompts = figures.get("prompts_at_once", 1)
    fewer = {"prompts_at_once": max(1, prompts // 2)}
    trained = 0 < (run.num_steps or 0) <= run.step
    if trained and prompts > 1:
        # Rows stay at first: by their length a receipt tells how the run was trained.
        return fewer, (
            f"half as many prompts answered at a time ({prompts // 2} instead of {prompts}); its "
            "training is finished and stays"
        )
    if row > longest:
        smaller = max(longest, row // 2)
        return {"token_budget": smaller, **fewer}, (
            f"half the batch at a time and twice the accumulation (rows of at most {smaller} tokens "
            f"instead of {row}); the effective batch of {size} examples stays"
        )
    if not (trained or given.gradient_checkpointing):
        return {"gradient_checkpointing": True}, "activation checkpointing, which takes more time"
    return None


def take(db: Session, run_id: str, attempt: int) -> bool:
    """Hand the run back so that it goes on with less; whether anything was left to try.

    Raises LostClaim.
    """
    run = runs.get(db, run_id)
    found = find(run)
    if found is None:
        return False
    figures, words = found
    reason = (
        f"The machine ran out of memory at step {run.step}. The run goes on from its last "
        f"checkpoint with {words}."
    )
    runs.update_held(db, run_id, attempt, figures={**run.figures, **figures})
    runs.settle(db, run_id, attempt, reason)
    return True
