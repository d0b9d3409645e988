"""Runs of different experiments side by side: compared where they answered the same test examples."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app import naming, runs
from app.comparison import baselines, figures, scores
from app.errors import Invalid
from app.tables import Answer, Experiment, Run

MOST_RUNS = 20


class Line(NamedTuple):
    """One model. `common`: its mean score on the test examples that all of them share."""

    row: figures.Row
    experiment: Experiment
    label: str
    common: float | None


class Across(NamedTuple):
    """The lines, what makes them hard to compare, and how many test examples they share."""

    metrics: dict[str, str]  # of the first one's task
    lines: list[Line]
    warnings: list[str]
    num_common: int


def chosen(db: Session, run_ids: Iterable[str], experiments: Iterable[Experiment]) -> list[Run]:
    """The runs named, and all of the experiments' that have been scored. Raises NotFound or Invalid."""
    found = {run_id: runs.get(db, run_id) for run_id in dict.fromkeys(run_ids)}
    for one in experiments:
        found |= {run.id: run for run in one.runs if run.scores}
    if len(found) > MOST_RUNS:
        raise Invalid(
            f"{len(found)} runs were chosen; at most {MOST_RUNS} can be compared at once."
        )
    return list(found.values())


def compare(db: Session, compared: Sequence[Run]) -> Across:
    """Runs and their base models, with their figures; scores on the test examples they share."""
    experiments = {run.experiment_id: run.experiment for run in compared}
    bases = _bases(db, experiments.values())
    same_task = _same(experiments.values(), lambda one: (one.task, sorted(one.labels)))
    rows = _common(experiments.values()) if same_task else []
    means = _means(db, [*bases, *(run.id for run in compared)], rows)
    tables = {key: figures.compare(db, one) for key, one in experiments.items()}
    figure = {(key, row.key): row for key, table in tables.items() for row in table.rows}
    lines = [
        Line(figure[of.id, "base"], of, f"Base model {of.base_model.name}", means.get(key))
        for key, of in bases.items()
    ]
    for run in compared:
        row = figure[run.experiment_id, run.id]
        lines.append(Line(row, run.experiment, naming.name(run), means.get(run.id)))
    task = next(iter(experiments.values())).task if experiments else "classification"
    warnings = _warnings(list(experiments.values()), len(rows), same_task)
    return Across(scores.METRICS[task], lines, warnings, len(rows))


def _bases(db: Session, experiments: Iterable[Experiment]) -> dict[str, Experiment]:
    """The figures of base models that there are, each once, with an experiment that has them."""
    found: dict[str, Experiment] = {}
    for one in experiments:
        if base := baselines.find(db, one):
            found.setdefault(base.key, one)
    return found


def _same(experiments: Iterable[Experiment], what: Callable[[Experiment], object]) -> bool:
    seen = [what(one) for one in experiments]
    return all(one == seen[0] for one in seen)


def _common(experiments: Iterable[Experiment]) -> list[int]:
    """The test examples of all of them, as rows of the one dataset."""
    every = list(experiments)
    if not every or not _same(every, lambda one: one.dataset.fingerprint):
        return []
    return sorted(set.intersection(*(set(one.split["test"]) for one in every)))


def _means(db: Session, owners: Sequence[str], rows: Sequence[int]) -> dict[str, float]:
    """The mean score of each model that has answered all of these rows."""
    query = select(Answer.owner, func.avg(Answer.score), func.count())
    query = query.where(Answer.owner.in_(owners), Answer.row.in_(rows)).group_by(Answer.owner)
    found = db.execute(query) if rows else ()
    return {owner: float(mean) for owner, mean, count in found if count == len(rows)}


def _warnings(experiments: Sequence[Experiment], num_common: int, same_task: bool) -> list[str]:
    said = []
    if not same_task:
        said.append(
            "The tasks or their labels differ: scores stand side by side and mean different things."
        )
    if not _same(experiments, lambda one: one.dataset.fingerprint):
        said.append(
            "The datasets differ: no test example is shared, so that the scores stand side by side "
            "and cannot be compared."
        )
    elif not _same(experiments, lambda one: one.split["test"]):
        said.append(
            f"The splits differ: {num_common:,} test examples are shared, and scores are compared on "
            "those alone. The examples that were trained on differ too."
            if num_common
            else "The splits differ and share no test example: the scores cannot be compared."
        )
    elif not _same(experiments, lambda one: one.split["train"]):
        said.append("The examples that were trained on differ; the test examples are the same.")
    if not _same(experiments, lambda one: one.template):
        said.append(
            "The templates differ: a difference may be the template's and not the method's."
        )
    if not _same(experiments, lambda one: one.base_model_id):
        said.append("The base models differ: a difference may be theirs and not the method's.")
    return said
