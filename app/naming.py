"""What a run is called among the runs of its experiment: its method, and what sets it apart from others of it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import methods
from app.tables import Experiment, Run

MOST_PARTS = 3  # that a name lists
LONGEST_VALUE = 24  # characters


class _Plain(NamedTuple):
    """What the name of a run is made of."""

    id: str
    experiment_id: str
    method: str
    params: Mapping[str, Any]
    created_at: float
    position: float
    seed: int  # its experiment's


def name(run: Run) -> str:
    """Its name, such as "LoRA" or "LoRA · rank 32"."""
    alike = [one for one in run.experiment.runs if one.method == run.method]
    return names(alike).get(run.id) or methods.get(run.method).label


def names(runs: Iterable[Run]) -> dict[str, str]:
    """The names of an experiment's runs by id; no two are equal."""
    return _names(
        _Plain(
            *(run.id, run.experiment_id, run.method, run.params, run.created_at, run.position),
            run.experiment.seed,
        )
        for run in runs
    )


def stored(db: Session, experiment_ids: Iterable[str]) -> dict[str, str]:
    """The names of all runs of these experiments by id, found without reading anything else of them."""
    parts = (Run.id, Run.experiment_id, Run.method, Run.params, Run.created_at, Run.position)
    query = select(*parts, Experiment.seed).join(Experiment, Run.experiment_id == Experiment.id)
    found = db.execute(query.where(Run.experiment_id.in_(set(experiment_ids))))
    return _names(_Plain(*row) for row in found)


def planned(wanted: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """What runs that are not stored yet are called among each other: methods and parameters."""
    found = _names(
        _Plain(str(place), "", *one, created_at=0.0, position=place, seed=0)
        for place, one in enumerate(wanted)
    )
    return [found[str(place)] for place in range(len(wanted))]


def _names(runs: Iterable[_Plain]) -> dict[str, str]:
    groups: dict[tuple[str, str], list[_Plain]] = {}
    for run in runs:
        groups.setdefault((run.experiment_id, run.method), []).append(run)
    return {key: text for alike in groups.values() for key, text in _told_apart(alike)}


def settings(run: Run) -> dict[str, Any]:
    """Its parameters with those that its method has got since, and the seed that it is trained with."""
    return settled(run.method, run.params, run.experiment.seed)


def settled(method: str, params: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The same of a run that is not stored; `seed`: its experiment's."""
    fields = methods.get(method).schema.model_fields
    known = {key: field.default for key, field in fields.items()} | dict(params)
    return known | {"seed": seed if known["seed"] is None else known["seed"]}


def differences(
    method: str, mine: Mapping[str, Any], others: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    """Where two runs' settings differ: title, the first's value, the other's."""
    return [
        (_title(method, key), _said(mine.get(key)), _said(others.get(key)))
        for key in _ordered(method)
        if mine.get(key) != others.get(key)
    ]


def _told_apart(alike: list[_Plain]) -> Iterable[tuple[str, str]]:
    """Of runs of one method: each parameter in which they differ, with the run's value."""
    method = methods.get(alike[0].method)
    if len(alike) == 1:
        return [(alike[0].id, method.label)]
    found = {run.id: settled(run.method, run.params, run.seed) for run in alike}
    differ = [
        key
        for key in _ordered(method.key)
        if any(one.get(key) != found[alike[0].id].get(key) for one in found.values())
    ]
    made: dict[str, str] = {}
    for run in sorted(alike, key=lambda run: (run.created_at, run.position, run.id)):
        parts = [_part(method.key, key, found[run.id].get(key)) for key in differ[:MOST_PARTS]]
        text = " · ".join([method.label, *([", ".join(parts)] if parts else [])])
        made[run.id] = _unlike(text, set(made.values()))
    return made.items()


def _unlike(text: str, taken: set[str]) -> str:
    """A name that is taken already, as that of a run tried again is, gets a number."""
    number, made = 1, text
    while made in taken:
        number += 1
        made = f"{text} ({number})"
    return made


def _ordered(method: str) -> list[str]:
    """The method's parameters, those that are folded away in the form last."""
    fields = methods.get(method).schema.model_fields
    return sorted(fields, key=lambda key: bool(fields[key].json_schema_extra))


def _title(method: str, key: str) -> str:
    return methods.get(method).schema.model_fields[key].title or key


def _part(method: str, key: str, value: Any) -> str:
    title = _title(method, key)
    return f"{title[0].lower()}{title[1:]} {_said(value)}"


def written(value: Any) -> str:
    """A parameter's value as a person writes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.10f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _said(value: Any) -> str:
    """The same in few characters."""
    text = " ".join(written(value).split())
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 1] + "…"
