"""Tuned models as JSON, and their files."""

from typing import Any, Literal

from fastapi import APIRouter
from fastapi.responses import Response

from app import naming, trash, tuned_models
from app.tables import Run
from app.web import archives
from app.web.sessions import Reading, Writing

router = APIRouter(prefix="/tuned-models", tags=["tuned models"])
COLUMNS = (
    *("id", "method", "params", "best_step", "best_loss", "finished_at", "train_seconds"),
    *("figures", "scores", "whole_state", "whole_error"),
)


def _plain(run: Run) -> dict[str, Any]:
    experiment = run.experiment
    return {name: getattr(run, name) for name in COLUMNS} | {
        "name": naming.name(run),
        "experiment": {"id": experiment.id, "name": experiment.name, "task": experiment.task},
        "base_model": {"id": experiment.base_model_id, "name": experiment.base_model.name},
    }


@router.get("")
def list_all(db: Reading) -> list[dict[str, Any]]:
    """Every tuned model, newest first."""
    return [_plain(run) for run in tuned_models.all(db)]


@router.get("/{run_id}")
def show(db: Reading, run_id: str) -> dict[str, Any]:
    """One tuned model."""
    return _plain(tuned_models.get(db, run_id))


@router.get("/{run_id}/files/{which}.zip", response_class=Response)
def download(db: Reading, run_id: str, which: Literal["tuned", "last", "whole"]) -> Response:
    """What was tuned, its last state, or the whole model, as a zip archive."""
    return archives.tuned_model(db, tuned_models.get(db, run_id), which)


@router.post("/{run_id}/whole", status_code=202)
def ask_whole(db: Writing, run_id: str) -> dict[str, Any]:
    """Have the whole model put together; `whole_state` says when it is ready."""
    tuned_models.ask_whole(db, run_id)
    return _plain(tuned_models.get(db, run_id))


@router.delete("/{run_id}", status_code=204)
def delete(db: Writing, run_id: str) -> Response:
    """Throw it away; `/api/trash` gives it back for a day. Refused while it is needed."""
    trash.throw_away(db, "tuned-model", run_id)
    return Response(status_code=204)
