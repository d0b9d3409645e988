"""Runs as JSON."""

from typing import Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from app import naming, points, receipts, runs, samples
from app.tables import Point, Run
from app.web import archives
from app.web.sessions import Reading, Writing

router = APIRouter(prefix="/runs", tags=["runs"])
FIELDS = (
    "id",
    "experiment_id",
    "method",
    "params",
    "state",
    "phase",
    "error",
    "attempt",
    "step",
    "num_steps",
    "best_step",
    "best_loss",
    "train_seconds",
    "forecast",
    "figures",
    "scores",
    "created_at",
    "started_at",
    "finished_at",
    "deleted_at",
    "copied_from",
)
MEASURED = ("number", "kind", "step", "epoch", "loss", "learning_rate", "grad_norm")
PACE = ("tokens_per_second", "memory_mb", "seconds", "tokens")


def plain(run: Run) -> dict[str, Any]:
    """A run as JSON has it."""
    return {name: getattr(run, name) for name in FIELDS} | {"name": naming.name(run)}


def point(one: Point) -> dict[str, Any]:
    """A point as JSON has it; a loss that was not a number is null."""
    return {name: getattr(one, name) for name in (*MEASURED, *PACE)}


@router.get("/{run_id}")
def show(db: Reading, run_id: str) -> dict[str, Any]:
    """One run with its history."""
    found = runs.get(db, run_id)
    history = [
        {"at": event.at, "attempt": event.attempt, "level": event.level, "message": event.message}
        for event in runs.history(db, run_id)
    ]
    return plain(found) | {"history": history}


@router.get("/{run_id}/points", response_model=list[dict[str, Any]])
def curve(db: Reading, run_id: str) -> Response:
    """What was measured of it, by step."""
    # Written here: FastAPI's own way looks at each value of thousands of points.
    return JSONResponse([point(one) for one in points.curve(db, runs.get(db, run_id).id)])


@router.get("/{run_id}/samples")
def answered(db: Reading, run_id: str) -> list[dict[str, Any]]:
    """What it answered while it learned to the inputs that its experiment watches, by step."""
    return [frame._asdict() for frame in samples.frames(db, runs.get(db, run_id))]


@router.get("/{run_id}/receipt")
def receipt(db: Reading, run_id: str, data: bool = False) -> Response:
    """A zip with all that repeats a finished run; `data=true`: with the examples."""
    run = receipts.get(db, run_id)
    files = receipts.contents(db, run, data=data)
    return archives.save(receipts.name(run), files, compressed=True)


@router.post("/{run_id}/{action}")
def act(
    db: Writing, run_id: str, action: Literal["pause", "resume", "cancel", "retry"]
) -> dict[str, Any]:
    """Pause, go on, stop for good, or try again (which answers with the new run)."""
    acts = {"pause": runs.pause, "resume": runs.resume, "cancel": runs.cancel, "retry": runs.retry}
    return plain(acts[action](db, run_id) or runs.get(db, run_id))
