"""A run's page, and what a person can do to a run."""

from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response

from app import receipts, runs
from app.web import archives, frames, live, panels
from app.web.pages import redirect, render, unless_seen
from app.web.sessions import Reading, Writing

router = APIRouter(prefix="/runs")


@router.get("/{run_id}")
def one(request: Request, db: Reading, run_id: str) -> Response:
    """Parameters, what was measured, history."""
    return render(request, "run.html", **live.run_page(db, runs.get(db, run_id)))


@router.get("/{run_id}/panel")
def panel(request: Request, db: Reading, run_id: str) -> Response:
    """The run's panel alone, for a page on which its state has changed."""
    run = runs.get(db, run_id)
    shown = panels.one_of(db, run)
    return render(request, "_run.html", run=run, panel=shown, actions=panels.ACTIONS)


@router.get("/{run_id}/samples")
def samples(request: Request, db: Reading, run_id: str, seen: str = "") -> Response:
    """What it answered while it learned, for its page; 204: the page shows this already."""
    return unless_seen(request, "_moments.html", seen, frames.of_run(db, runs.get(db, run_id)))


@router.get("/{run_id}/receipt")
def receipt(db: Reading, run_id: str, data: bool = False) -> Response:
    """All that repeats the run, in one archive; the examples only if asked for."""
    run = receipts.get(db, run_id)
    files = receipts.contents(db, run, data=data)
    return archives.save(receipts.name(run), files, compressed=True)


@router.post("/{run_id}/{action}")
def act(
    db: Writing, run_id: str, action: Literal["pause", "resume", "cancel", "retry"]
) -> Response:
    """Pause, go on, stop for good, or try again; then back to the experiment."""
    acts = {"pause": runs.pause, "resume": runs.resume, "cancel": runs.cancel, "retry": runs.retry}
    run = acts[action](db, run_id) or runs.get(db, run_id)
    return redirect(f"/experiments/{run.experiment_id}#run-{run.id}")
