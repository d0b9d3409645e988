"""Pages of experiments: the list, the form for a new one, and the one page that lives."""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import Response, StreamingResponse

from app import base_models, datasets, experiments, trash
from app.comparison import figures
from app.errors import NotFound
from app.web import (
    confusions,
    curves,
    drafts,
    frames,
    live,
    outlooks,
    panels,
    previews,
    reports,
    streams,
)
from app.web.pages import redirect, render, unless_seen
from app.web.sessions import Known, Reading, Sent, Writing

router = APIRouter(prefix="/experiments")
Page = Annotated[int, Query(ge=1, le=10_000)]


@router.get("")
def every(request: Request, db: Reading) -> Response:
    """All experiments with the state of their runs."""
    lines = [
        (one, [(run, panels.words(run)) for run in figures.ordered(one)])
        for one in experiments.all(db)
    ]
    return render(request, "experiments.html", lines=lines, examples=datasets.EXAMPLES)


def _page(db: Any, draft: drafts.Draft) -> dict[str, Any]:
    page = drafts.page(db, draft)
    return page | {
        "preview": previews.of(draft.sent, page),
        "overlap": previews.overlapping(draft.sent, page["dataset"]),
        "outlooks": outlooks.of(db, draft.sent, page),
    }


def _draft(request: Request, db: Any, draft: drafts.Draft, status: int = 200) -> Response:
    return render(request, "new_experiment.html", status=status, **_page(db, draft))


@router.get("/new")
def new(request: Request, db: Reading, dataset: str = "", base: str = "") -> Response:
    """The form, filled as far as dataset and base model tell."""
    return _draft(request, db, drafts.begin(db, dataset, base))


@router.post("/new")
def adapt(request: Request, db: Reading, form: Sent) -> Response:
    """The same form after another dataset, task or base model was chosen; nothing is stored."""
    return _draft(request, db, drafts.completed(db, drafts.read(form)))


@router.post("/preview")
def preview(request: Request, db: Reading, form: Sent) -> Response:
    """A row exactly as the model would see it, and what each method will take."""
    return render(request, "_previewed.html", **_page(db, drafts.read(form)))


@router.post("/rehearse")
def rehearse(request: Request, db: Writing, after: Reading, form: Sent) -> Response:
    """Have a tuner rehearse the method of the button pressed; the form as it was, which then tells."""
    draft = drafts.read(form)
    outlooks.rehearse(db, draft)
    return _draft(request, after, draft)


@router.post("")
def create(request: Request, db: Writing, form: Sent) -> Response:
    """Start the experiment, or show the form again with what is wrong."""
    draft = drafts.read(form)
    made = drafts.submit(db, draft)
    if made is None:
        return _draft(request, db, draft, status=422)
    return redirect(f"/experiments/{made.id}")


@router.post("/example")
def example(db: Writing, form: Sent) -> Response:
    """Start the example experiment, or show how far its base model is."""
    key = str(form.get("example", ""))
    if base_models.add_default(db).state != "ready":
        return redirect(f"/experiments/example/{key}")
    return redirect(f"/experiments/{experiments.tune_example(db, key).id}")


@router.get("/example/{key}")
def preparing(request: Request, db: Writing, key: str) -> Response:
    """How far the default base model is, and the way on once it is ready."""
    if key not in datasets.EXAMPLES:
        raise NotFound("There is no such example.")
    base_model, chosen = base_models.add_default(db), datasets.EXAMPLES[key]
    return render(request, "preparing.html", base_model=base_model, key=key, example=chosen)


@router.get("/{experiment_id}")
def one(request: Request, db: Reading, experiment_id: str, page: Page = 1) -> Response:
    """The experiment's page: runs, curves, comparison."""
    found = experiments.get(db, experiment_id)
    return render(request, "experiment.html", **live.page(db, found, page))


@router.get("/{experiment_id}/comparison")
def comparison(request: Request, db: Reading, experiment_id: str) -> Response:
    """The comparison alone, for a page whose run has just ended."""
    found = experiments.get(db, experiment_id)
    return render(request, "_comparison.html", **live.comparison(db, found, 1))


@router.get("/{experiment_id}/side-by-side")
def side_by_side(request: Request, db: Reading, experiment_id: str, page: Page = 1) -> Response:
    """One page of test inputs with every model's answer."""
    found = experiments.get(db, experiment_id)
    return render(request, "_side_by_side.html", **live.comparison(db, found, page))


@router.get("/{experiment_id}/classes")
def classes(
    request: Request, db: Reading, experiment_id: str, model: str = "", match: str = ""
) -> Response:
    """A classification class by class, for one model."""
    found = experiments.get(db, experiment_id)
    return render(request, "classes.html", **confusions.page(db, found, model, match))


@router.get("/{experiment_id}/report")
def report(request: Request, db: Reading, experiment_id: str) -> Response:
    """The comparison as one file to hand on."""
    found = experiments.get(db, experiment_id)
    sent = render(request, "report.html", **reports.page(db, found))
    sent.headers["Content-Disposition"] = f'attachment; filename="{reports.name(found)}"'
    return sent


@router.get("/{experiment_id}/samples")
def samples(request: Request, db: Reading, experiment_id: str) -> Response:
    """What the runs answered while they learned, side by side."""
    found = experiments.get(db, experiment_id)
    return render(request, "samples.html", experiment=found, **frames.of_experiment(db, found))


@router.get("/{experiment_id}/samples/moments")
def moments(request: Request, db: Reading, experiment_id: str, seen: str = "") -> Response:
    """The part of that page that looks again by itself; 204: it shows this already."""
    shown = frames.of_experiment(db, experiments.get(db, experiment_id))
    return unless_seen(request, "_moments.html", seen, shown)


@router.get("/{experiment_id}/points")
def points(request: Request, db: Reading, experiment_id: str, page: Page = 1) -> Response:
    """The curves as a table."""
    found = experiments.get(db, experiment_id)
    rows = curves.table(db, found, page)
    return render(request, "points.html", experiment=found, **rows)


@router.get("/{experiment_id}/points.csv")
def points_csv(experiment_id: Known) -> Response:
    """The curves as a file."""
    name = {"Content-Disposition": f'attachment; filename="points-{experiment_id}.csv"'}
    return StreamingResponse(curves.as_csv(experiment_id), media_type="text/csv", headers=name)


@router.get("/{experiment_id}/events")
def events(
    request: Request,
    experiment_id: Known,
    after: str = "",
    last_event_id: Annotated[str, Header()] = "",
) -> Response:
    """What is new, as it comes; from where the browser left off."""
    seen = streams.parse(last_event_id or after)
    following = streams.follow_experiment(request.app, experiment_id, seen)
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # no proxy may hold it back
    return StreamingResponse(following, media_type="text/event-stream", headers=headers)


@router.post("/{experiment_id}/delete")
def delete(db: Writing, experiment_id: str) -> Response:
    """Throw it away; for a day it can be put back."""
    trash.throw_away(db, "experiment", experiment_id)
    return redirect(
        "/experiments", "The experiment is in the trash.", undo=f"experiment/{experiment_id}"
    )
