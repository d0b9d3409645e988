"""More runs in an experiment: one with other parameters, a sweep over one of them, or several seeds."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import admission, experiments, forecast, methods, naming, queue
from app.admission import Wanted
from app.errors import Invalid, NotFound
from app.tables import Experiment, Run

MOST_AT_ONCE = 10
MOST_RUNS = 60  # in one experiment: its page draws each of them
FIRST = ("learning_rate", "rank", "num_virtual_tokens", "seed")  # what is varied most
_LOST = frozenset({"failed", "cancelled"})  # a run that ended so may be asked for again


class Planned(NamedTuple):
    """A run that may be added. `known`: the experiment's run with just these settings, if there is one."""

    wanted: Wanted
    known: Run | None


def plan(
    experiment: Experiment,
    method: str,
    params: Mapping[str, Any],
    vary: str = "",
    values: Sequence[Any] = (),
) -> list[Planned]:
    """A run with these parameters, or one for each value of the parameter `vary`. Raises Invalid."""
    if method not in methods.METHODS:
        raise Invalid(f"There is no method {method}.", field="method")
    if vary and vary not in varied(method):
        raise Invalid(f"{vary} cannot be varied for this method.", field="vary")
    if vary and not 1 <= len(values) <= MOST_AT_ONCE:
        raise Invalid(f"Give 1 to {MOST_AT_ONCE} values, with commas between.", field="values")
    each = [dict(params) | {vary: value} for value in values] if vary else [dict(params)]
    made: list[Planned] = []
    for one in each:
        try:
            wanted = _wanted(experiment, method, one)
        except Invalid as problem:
            of_values = vary and problem.field == f"{method}.{vary}"
            raise Invalid(problem.message, field="values" if of_values else problem.field) from None
        if wanted not in [other.wanted for other in made]:
            made.append(Planned(wanted, _like(experiment, wanted)))
    return made


def varied(method: str) -> list[str]:
    """The parameters that can be varied: those that are numbers, the usual ones first."""
    fields = methods.get(method).schema.model_fields
    numbers = [key for key, field in fields.items() if field.annotation in (int, float)]
    usual = [key for key in FIRST if key in fields]
    return [*usual, *(key for key in numbers if key not in usual)]


def suggested(experiment: Experiment, method: str, vary: str, value: Any) -> list[Any]:
    """A few values around this one to begin a sweep with; of seeds the next ones."""
    if vary == "seed":
        first = experiment.seed if value in (None, "") else int(value)
        return [first, first + 1, first + 2]
    around = [value / 4, value / 2, value, value * 2, value * 4]
    if vary == "learning_rate":
        around = around[1:4]
    whole = isinstance(value, int)
    tidy = [max(1, round(one)) if whole else float(f"{one:.6g}") for one in around]
    return [one for one in dict.fromkeys(tidy) if _allowed(method, vary, one)]


def add(
    db: Session,
    experiment_id: str,
    method: str,
    params: Mapping[str, Any],
    *,
    vary: str = "",
    values: Sequence[Any] = (),
    copied_from: str | None = None,
    override: bool = False,
) -> list[Run]:
    """Queue what is planned and not there yet, on the experiment's own split, template and order.

    Raises Invalid, and stores nothing; also for what fits no worker alive, unless `override`.
    """
    # Locked, so that nobody throws the experiment away before the new runs are part of it.
    mine = select(Experiment.id).where(Experiment.id == experiment_id)
    db.execute(mine.with_for_update(read=True))
    experiment = experiments.get(db, experiment_id)
    found = plan(experiment, method, params, vary, values)
    wanted = [one.wanted for one in found if one.known is None]
    if not wanted:
        raise Invalid(
            "Nothing was started: the experiment has a run with just these settings already.",
            field="method",
        )
    if len(experiment.runs) + len(wanted) > MOST_RUNS:
        raise Invalid(f"An experiment holds at most {MOST_RUNS} runs.", field="method")
    told = admission.forecasts(db, forecast.given(experiment), wanted, override)
    source = copied(experiment, copied_from).id if copied_from else None
    pairs = zip(wanted, told, strict=True)
    made = [admission.enqueue(db, experiment.id, *pair, copied_from=source) for pair in pairs]
    db.commit()
    queue.ring("tuner")
    queue.announce(experiment.id)
    return made


def copied(experiment: Experiment, run_id: str) -> Run:
    """The experiment's run to copy. Raises NotFound."""
    for run in experiment.runs:
        if run.id == run_id:
            return run
    raise NotFound("The run to copy is not in this experiment.")


def _wanted(experiment: Experiment, method: str, params: Mapping[str, Any]) -> Wanted:
    checked = admission.checked_params(experiment.base_model, {method: params})[method]
    if checked["seed"] == experiment.seed:
        checked["seed"] = None  # one way to say it
    return Wanted(method, checked)


def _like(experiment: Experiment, wanted: Wanted) -> Run | None:
    settled = naming.settled(wanted.method, wanted.params, experiment.seed)
    alike = (
        run
        for run in experiment.runs
        if run.method == wanted.method and run.state not in _LOST
        if naming.settings(run) == settled
    )
    return next(alike, None)


def _allowed(method: str, key: str, value: Any) -> bool:
    for limit in methods.get(method).schema.model_fields[key].metadata:
        if value < getattr(limit, "ge", value) or value > getattr(limit, "le", value):
            return False
    return True
