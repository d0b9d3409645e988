"""`studio add`: more runs in an experiment without a browser, by the rules of the page that adds them."""

from typing import Any, NamedTuple

from rich.console import Console
from sqlalchemy import select
from sqlalchemy.orm import Session

from app import assignments, database, experiments, methods, more_runs, naming, tuning
from app.errors import Invalid, NotFound
from app.results import Result
from app.tables import Experiment, Run


class Wish(NamedTuple):
    """What the command line asks for."""

    experiment: str
    method: str
    copy: str
    parameters: list[str]
    vary: str
    seeds: int
    override: bool = False


class _Asked(NamedTuple):
    """The same, as it is understood."""

    method: str
    params: dict[str, Any]
    vary: str
    values: list[Any]
    copied_from: str | None


def add(wish: Wish, notes: Console) -> Result:
    """Add the runs, say which, follow them to their end, and compare them with all others."""
    _check(wish)
    with tuning.studio(notes):
        with database.session() as db:
            experiment = find(db, wish.experiment)
            made, known = _add(db, experiment, wish)
            names = naming.stored(db, [experiment.id])
        for run in known:
            notes.print(f"Is there already: {names[run.id]}", highlight=False, markup=False)
        for run in made:
            line = f"Added run {run.id}. {tuning.told(run, names[run.id])}"
            notes.print(line, highlight=False, markup=False)
        return tuning.finish(experiment.id, {run.id: names[run.id] for run in made}, notes)


def find(db: Session, words: str) -> Experiment:
    """The experiment with this id, or the only one with this name. Raises NotFound, Invalid."""
    known = select(Experiment.id).where(Experiment.trashed_at.is_(None))
    ids = [words] if db.get(Experiment, words) else db.scalars(known.filter_by(name=words)).all()
    if not ids:
        raise NotFound(f"There is no experiment {words}. Give its id, as its address has it.")
    if len(ids) > 1:
        raise Invalid(f"{len(ids)} experiments are called {words}. Give the id of one.")
    return experiments.get(db, ids[0])


def _check(wish: Wish) -> None:
    """What can be told without the studio. Raises Invalid."""
    if bool(wish.method) == bool(wish.copy):
        raise Invalid("Say --method, or with --copy which run to copy.")
    if wish.vary and wish.seeds:
        raise Invalid("Say --vary or --seeds: one thing is varied at a time.")
    if wish.method:
        methods.get(wish.method)


def _add(db: Session, experiment: Experiment, wish: Wish) -> tuple[list[Run], list[Run]]:
    """The runs that were added, and those that were there already."""
    asked = _asked(experiment, wish)
    method, params, vary, values, copied_from = asked
    planned = more_runs.plan(experiment, method, params, vary, values)
    known = [one.known for one in planned if one.known]
    made = more_runs.add(
        db,
        experiment.id,
        method,
        params,
        vary=vary,
        values=values,
        copied_from=copied_from,
        override=wish.override,
    )
    return made, known


def _asked(experiment: Experiment, wish: Wish) -> _Asked:
    source = _source(experiment, wish.copy) if wish.copy else None
    method = source.method if source else methods.get(wish.method).key
    given = {method: source.params if source else {}}
    params = assignments.assigned(wish.parameters, given)[method]
    vary, _, listed = wish.vary.removeprefix(f"{method}.").partition("=")
    values: list[Any] = [value.strip() for value in listed.split(",") if value.strip()]
    if wish.seeds:
        first = str(experiment.seed if params.get("seed") is None else params["seed"])
        if not first.isdecimal():
            raise Invalid(f"--set seed={first}: give a whole number.")
        vary, values = "seed", [int(first) + more for more in range(wish.seeds)]
    return _Asked(method, params, vary, values, source.id if source else None)


def _source(experiment: Experiment, words: str) -> Run:
    """The run to copy, by its id or its name in the experiment. Raises NotFound."""
    names = naming.names(experiment.runs)
    named = next((key for key, name in names.items() if name == words), words)
    return more_runs.copied(experiment, named)
