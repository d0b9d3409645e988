"""The first page: the way in for a newcomer, what is going on for everyone else."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from sqlalchemy.orm import Session

from app import base_models, datasets, disk, experiments, order, queue, workers
from app.comparison import figures, scores
from app.tables import Experiment
from app.web import pages, panels
from app.web.sessions import Reading

router = APIRouter()
RECENT = 8


@router.get("/")
def home(request: Request, db: Reading) -> Response:
    """Tune your first model; later: running now, recent experiments, workers."""
    recent = experiments.all(db, limit=RECENT)
    return pages.render(
        request,
        "home.html",
        examples=datasets.EXAMPLES,
        ready=base_models.ready(db),
        broker=queue.is_up(),
        recent=[_line(db, experiment) for experiment in recent],
        **_now(db),
    )


@router.get("/now")
def now(request: Request, db: Reading) -> Response:
    """The part of the first page that looks again by itself."""
    return pages.render(request, "_now.html", **_now(db))


@router.get("/broker")
def broker(request: Request) -> Response:
    """What does not work while the broker is away; it looks again by itself."""
    return pages.render(request, "_broker.html", broker=queue.is_up())


def _now(db: Session) -> dict[str, Any]:
    kinds: dict[str, list[Any]] = {"tuner": [], "generator": []}
    for worker in workers.alive(db):
        kinds.setdefault(worker.kind, []).append(worker)
    return {
        "running": [(run, panels.one_of(db, run)) for run in order.at_work(db)],
        "num_waiting": order.count_waiting(db),
        "held_since": order.held_since(db),
        "workers": kinds,
        "disk": disk.summary(),
    }


def _line(db: Session, experiment: Experiment) -> dict[str, Any]:
    """An experiment with its best run's score and its interval, and how far that is from the base model's."""
    metric = scores.primary(experiment.task)
    found = {run: run.scores.get("metrics", {}).get(metric) for run in experiment.runs}
    scored = {run: score for run, score in found.items() if score is not None}
    best = max(scored, key=lambda run: scored[run], default=None)
    base = figures.baseline(db, experiment)
    base_score = base.scores.get("metrics", {}).get(metric) if base else None
    return {
        "experiment": experiment,
        "metric": scores.METRICS[experiment.task][metric],
        "best": best,
        "score": scored[best] if best else None,
        "interval": figures.intervals_of(best.scores).get(metric) if best else None,
        "base_score": base_score,
    }
