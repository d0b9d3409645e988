"""Pages that add runs to an experiment: a copy with other parameters, a sweep, several seeds."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from app import experiments
from app.web import additions
from app.web.pages import redirect, render
from app.web.sessions import Reading, Sent, Writing

router = APIRouter(prefix="/experiments/{experiment_id}/runs")


@router.get("/new")
def new(
    request: Request,
    db: Reading,
    experiment_id: str,
    copy: str = "",
    method: str = "",
    vary: str = "",
) -> Response:
    """The form, filled with the settings of the run to copy."""
    found = experiments.get(db, experiment_id)
    addition = additions.begin(found, copy, method, vary)
    return render(request, "more_runs.html", **additions.page(db, found, addition))


@router.post("/new")
def again(request: Request, db: Reading, experiment_id: str, form: Sent) -> Response:
    """The same form after something was changed, with what would start; nothing is stored."""
    found = experiments.get(db, experiment_id)
    addition = additions.read(found, form)
    return render(request, "more_runs.html", **additions.page(db, found, addition))


@router.post("")
def add(request: Request, db: Writing, experiment_id: str, form: Sent) -> Response:
    """Start the runs, or show the form again with what is wrong."""
    found = experiments.get(db, experiment_id)
    addition = additions.read(found, form)
    made = additions.submit(db, found, addition)
    if made:
        return redirect(f"/experiments/{found.id}#run-{made[0].id}", additions.said(made))
    return render(request, "more_runs.html", status=422, **additions.page(db, found, addition))
