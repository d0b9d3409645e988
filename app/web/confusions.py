"""The page of a classification's classes: one model's figures by class, and what it confuses."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy.orm import Session

from app import naming
from app.comparison import baselines, classes, figures, scores
from app.errors import NotFound
from app.tables import Experiment

MOST_COLUMNS = 16  # of a matrix on the screen; beyond that the list of confusions says more
MOST_CONFUSIONS = 40
WORDS = {
    "normalised": "Normalised text",
    "exact": "Exact text",
    "choice": "Choice among the labels",
}


class Model(NamedTuple):
    """Who has answered: the base model or a run."""

    key: str
    label: str
    owner: str
    stored: dict[str, Any]


def page(db: Session, experiment: Experiment, wanted: str, matching: str) -> dict[str, Any]:
    """Of the model asked for, else of the best run; matched as asked for, if that can be."""
    if experiment.task != "classification":
        raise NotFound("Only a classification has classes.")
    models = _models(db, experiment)
    matching = matching if matching in classes.MATCHINGS else "normalised"
    model = next((one for one in models if one.key == wanted), None) or _best(models)
    found = None
    if model:
        pairs = classes.pairs_of(db, experiment, model.owner, model.stored, matching)
        found = classes.of(experiment.labels, pairs, matching) if pairs else None
    return {
        "experiment": experiment,
        "models": models,
        "model": model,
        "matching": matching,
        "matchings": WORDS,
        "meaning": classes.MATCHINGS[matching],
        "found": found,
        "no_choices": model.stored.get("no_choices", "") if model else "",
        "is_small": found is not None and len(found.classes) < MOST_COLUMNS,
        "confusions": found.confusions[:MOST_CONFUSIONS] if found else [],
    }


def _best(models: Sequence[Model]) -> Model | None:
    """The run with the highest score by the task's first metric; the base model where there is none."""
    metric = scores.primary("classification")
    runs = [one for one in models if one.key != "base"] or models
    return max(runs, key=lambda one: one.stored.get("metrics", {}).get(metric, -1.0), default=None)


def _models(db: Session, experiment: Experiment) -> list[Model]:
    base, shown = baselines.find(db, experiment), figures.ordered(experiment)
    named = naming.names(shown)
    made = [Model("base", "Base model", base.key, base.scores)] if base and base.scores else []
    return made + [
        Model(run.id, named[run.id], run.id, run.scores)
        for run in shown
        if run.state == "succeeded" and run.scores
    ]
