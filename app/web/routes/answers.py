"""Pages of an experiment's answers: every test example with every model's answer, filtered, and as files."""

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse

from app import experiments
from app.web import explorations
from app.web.pages import render
from app.web.sessions import Known, Reading

router = APIRouter(prefix="/experiments/{experiment_id}")
Page = Annotated[int, Query(ge=1, le=10_000)]


@router.get("/answers")
def answers(request: Request, db: Reading, experiment_id: str, page: Page = 1) -> Response:
    """The explorer; its whole state is in the address."""
    found = experiments.get(db, experiment_id)
    shown = explorations.page(db, found, request.query_params, page)
    return render(request, "explorer.html", **shown)


@router.get("/answers.csv")
def answers_csv(request: Request, experiment_id: Known) -> Response:
    """The examples of the filter as a file for spreadsheets."""
    lines = explorations.as_csv(experiment_id, request.query_params)
    return _file(lines, f"answers-{experiment_id}.csv", "text/csv")


@router.get("/answers.jsonl")
def answers_jsonl(request: Request, experiment_id: Known) -> Response:
    """The same for programs."""
    lines = explorations.as_jsonl(experiment_id, request.query_params)
    return _file(lines, f"answers-{experiment_id}.jsonl", "application/x-ndjson")


def _file(lines: object, name: str, kind: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return StreamingResponse(lines, media_type=kind, headers=headers)  # type: ignore[arg-type]
