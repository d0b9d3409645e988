"""The luck of training: how far apart the scores of runs are that differ by nothing but their seed."""

import json
from statistics import fmean, stdev
from typing import NamedTuple

from app import naming
from app.comparison import scores
from app.tables import Experiment, Run


class Spread(NamedTuple):
    """Of two or more runs that are alike but for their seed; the scores are of the task's first metric."""

    method: str
    label: str
    seeds: list[int]
    scores: list[float]
    mean: float
    low: float
    high: float
    deviation: float | None  # of a sample, where three or more have been scored


def of(experiment: Experiment) -> list[Spread]:
    """Every such group of the experiment, in the order in which their first runs were added."""
    metric, groups = scores.primary(experiment.task), dict[str, list[Run]]()
    for run in sorted(experiment.runs, key=lambda run: (run.created_at, run.id)):
        if run.state == "succeeded" and metric in run.scores.get("metrics", {}):
            alike = naming.settings(run) | {"seed": None}
            groups.setdefault(f"{run.method} {json.dumps(alike, sort_keys=True)}", []).append(run)
    names = naming.names([runs[0] for runs in groups.values()])
    made = [_spread(runs, names[runs[0].id], metric) for runs in groups.values()]
    return [one for one in made if len(set(one.seeds)) > 1]


def _spread(runs: list[Run], label: str, metric: str) -> Spread:
    by_seed = {naming.settings(run)["seed"]: run.scores["metrics"][metric] for run in runs}
    found = list(by_seed.values())
    return Spread(
        runs[0].method,
        label,
        list(by_seed),
        found,
        fmean(found),
        min(found),
        max(found),
        stdev(found) if len(found) > 2 else None,
    )
