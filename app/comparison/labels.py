"""What the runs of an experiment are called, so that two of one method can be told apart."""

from collections import Counter
from collections.abc import Sequence

from app import methods
from app.tables import Run

MOST = 2  # parameters that a label names


def of(runs: Sequence[Run]) -> dict[str, str]:
    """By run id: the method; of several runs of one, also what is set differently, or a number."""
    made: dict[str, str] = {}
    for key in dict.fromkeys(run.method for run in runs):
        alike = [run for run in runs if run.method == key]
        made |= {run.id: _named(run, alike) for run in alike}
    seen = Counter(made.values())
    numbers: Counter[str] = Counter()
    for run in runs:
        label = made[run.id]
        numbers[label] += 1
        if seen[label] > 1:
            made[run.id] = f"{label} no. {numbers[label]}"
    return made


def _named(run: Run, alike: Sequence[Run]) -> str:
    method = methods.get(run.method)
    fields = method.schema.model_fields
    differing = [
        name for name in run.params if len({repr(one.params.get(name)) for one in alike}) > 1
    ]
    said = [
        f"{((fields[name].title if name in fields else None) or name).lower()} {_value(run.params[name])}"
        for name in differing[:MOST]
    ]
    return f"{method.label} ({', '.join(said)})" if said else method.label


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
