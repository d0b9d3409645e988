"""Experiments as JSON."""

from typing import Annotated, Any

import pydantic
from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse, Response
from sqlalchemy.orm import Session

from app import datasets, experiments, more_runs, points, prompts, trash
from app.comparison import figures, spread, tallies, verdict
from app.tables import Experiment
from app.web import outlooks
from app.web.api import runs
from app.web.sessions import Reading, Writing

router = APIRouter(prefix="/experiments", tags=["experiments"])


class NewExperiment(pydantic.BaseModel):
    """What to tune and how; `methods` names each method with its parameters, {} for its defaults."""

    name: str
    base_model_id: str
    dataset_id: str
    methods: dict[str, dict[str, Any]]
    task: str = "generation"
    template: str | None = None  # the task's own
    labels: list[str] | None = None  # the dataset's own
    seed: int = 1
    watch: list[str] = []  # up to five inputs that are answered while the runs learn
    override: bool = False  # start runs too that fit no tuning worker alive


class MoreRuns(pydantic.BaseModel):
    """Runs to add: a copy of `copied_from` with other `params`, or one of `method` by its defaults.

    With `vary` a run for each of `values` of that parameter, such as "rank" or "seed".
    """

    copied_from: str | None = None
    method: str = ""
    params: dict[str, Any] = {}
    vary: str = ""
    values: list[float] = []
    override: bool = False


def _plain(experiment: Experiment) -> dict[str, Any]:
    names = ("id", "name", "base_model_id", "dataset_id", "task", "labels", "template", "watch")
    plain = {name: getattr(experiment, name) for name in names}
    sizes = {part: len(rows) for part, rows in experiment.split.items()}
    shown = [runs.plain(run) for run in figures.ordered(experiment)]
    more = {"seed": experiment.seed, "split": sizes, "created_at": experiment.created_at}
    return plain | more | {"runs": shown}


def _given(db: Session, wanted: NewExperiment) -> dict[str, Any]:
    """With the task's template and the dataset's labels where none were named."""
    given = wanted.model_dump()
    if given["template"] is None and wanted.task in prompts.TASKS:
        given["template"] = prompts.TASKS[wanted.task].template
    if given["labels"] is None:
        given["labels"] = datasets.labels(datasets.get(db, wanted.dataset_id))
    return given | {"template": given["template"] or ""}


@router.get("")
def list_all(db: Reading) -> list[dict[str, Any]]:
    """Every experiment with its runs, newest first."""
    return [_plain(experiment) for experiment in experiments.all(db)]


@router.post("", status_code=201)
def create(db: Writing, wanted: NewExperiment) -> dict[str, Any]:
    """Start an experiment: each method becomes a run in the queue."""
    return _plain(experiments.create(db, **_given(db, wanted)))


@router.post("/forecast")
def forecast(db: Reading, wanted: NewExperiment) -> dict[str, Any]:
    """What each method would take and whether it fits, by the same arithmetic as the form; nothing is stored."""
    return outlooks.told(db, experiments.asked(db, **_given(db, wanted)))


@router.post("/rehearse", status_code=202)
def rehearse(db: Writing, after: Reading, wanted: NewExperiment) -> dict[str, Any]:
    """Have a tuner rehearse each method: two steps on its longest batch. `forecast` says how far it is."""
    asked = experiments.asked(db, **_given(db, wanted))
    outlooks.rehearse_all(db, asked)
    return outlooks.told(after, asked)


@router.post("/examples/{key}", status_code=201)
def tune_example(db: Writing, key: str) -> dict[str, Any]:
    """Start the example experiment of that name: all methods on the default base model."""
    return _plain(experiments.tune_example(db, key))


@router.get("/{experiment_id}")
def show(db: Reading, experiment_id: str) -> dict[str, Any]:
    """One experiment with its runs."""
    return _plain(experiments.get(db, experiment_id))


@router.post("/{experiment_id}/runs", status_code=201)
def add_runs(db: Writing, experiment_id: str, wanted: MoreRuns) -> list[dict[str, Any]]:
    """Add runs on the same split, template and order; those that are there already are left out."""
    given = wanted.model_dump()
    if wanted.copied_from:
        copied = more_runs.copied(experiments.get(db, experiment_id), wanted.copied_from)
        given |= {"method": copied.method, "params": copied.params | wanted.params}
    return [runs.plain(run) for run in more_runs.add(db, experiment_id, **given)]


@router.get("/{experiment_id}/comparison", response_model=dict[str, Any])
def comparison(
    db: Reading,
    experiment_id: str,
    start: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=0, le=2000)] = 20,
) -> Response:
    """Base model and runs side by side: figures with intervals, pairs, verdict, curves, answers."""
    found = experiments.get(db, experiment_id)
    shown = figures.answers(db, found, start=start, limit=limit)
    told = _compared(db, found) | {"answers": [answer._asdict() for answer in shown]}
    return JSONResponse(told)  # FastAPI's own way looks at each value of thousands of points


def _compared(db: Session, found: Experiment) -> dict[str, Any]:
    compared = figures.compare(db, found)
    return figures.as_dict(compared) | {
        "task": found.task,
        "verdict": verdict.of(compared, found.task),
        "seeds": [one._asdict() for one in spread.of(found)],
        "curves": {
            run.id: [runs.point(one) for one in points.curve(db, run.id)] for run in found.runs
        },
    }


@router.get("/{experiment_id}/votes")
def show_votes(db: Reading, experiment_id: str) -> dict[str, Any]:
    """What the blind votes add up to: how many are whose, shares, and pairs, with 95 % intervals."""
    return tallies.as_dict(tallies.result(db, experiments.get(db, experiment_id)))


@router.delete("/{experiment_id}", status_code=204)
def delete(db: Writing, experiment_id: str) -> Response:
    """Throw it away; `/api/trash` gives it back for a day. Refused while it is needed."""
    trash.throw_away(db, "experiment", experiment_id)
    return Response(status_code=204)
