"""Whether runs may join the queue: their parameters are right, they are forecast, and fit somewhere."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pydantic
from sqlalchemy.orm import Session

from app import base_models, capacity, forecast, methods, runs, verdicts
from app.errors import Conflict, Invalid, own_words
from app.forecast import Given
from app.methods import Method
from app.tables import BaseModel, Run


class Wanted(NamedTuple):
    """A run that is asked for: its method with all its parameters."""

    method: str
    params: dict[str, Any]


def checked_params(
    base_model: BaseModel, chosen: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The parameters of each method, complete and within range. Raises Invalid."""
    if base_model.state != "ready":
        raise Conflict(
            f"The base model {base_model.name} is not ready yet ({base_model.state}). "
            "Nothing was started; try again when it is."
        )
    if not chosen:
        raise Invalid("Choose at least one method.", field="methods")
    allowed = base_models.methods_for(base_model)
    for key in chosen:
        if key not in allowed:
            label = methods.get(key).label
            raise Invalid(f"{base_model.name} cannot be tuned by {label}.", field="methods")
    ordered = [key for key in methods.METHODS if key in chosen]
    return {key: _params(base_model, key, chosen[key]) for key in ordered}


def _reason(error: Any, fields: Mapping[str, Any]) -> str:
    """What a parameter may be, in plain words where pydantic's are a programmer's."""
    kind = error["type"]
    if kind == "extra_forbidden":
        return f"there is no such parameter. There are {', '.join(fields)}"
    if kind.startswith("int_"):
        return f"give a whole number, not {error['input']!r}"
    if kind.startswith(("float_", "finite_")):
        return f"give a number, not {error['input']!r}"
    return own_words(error)


def _params(base_model: BaseModel, key: str, given: Mapping[str, Any]) -> dict[str, Any]:
    method = methods.get(key)
    try:
        params = method.schema.model_validate(given)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else "initialization_text"
        known = method.schema.model_fields.get(field)
        title = (known.title if known else None) or field
        reason = _reason(first, method.schema.model_fields)
        raise Invalid(f"{method.label}: {title}: {reason}.", field=f"{key}.{field}") from None
    longest = base_model.shapes.get("max_positions")
    if longest and params.max_length > longest:
        raise Invalid(
            f"{method.label}: Maximum length: {base_model.name} reads at most {longest} tokens.",
            field=f"{key}.max_length",
        )
    if method.virtual_tokens(params) >= params.max_length - 8:
        raise Invalid(
            f"{method.label}: the virtual tokens leave no room for text in the maximum length.",
            field=f"{key}.num_virtual_tokens",
        )
    _check_layers(base_model, method, params)
    return params.model_dump()


def _check_layers(base_model: BaseModel, method: Method, params: Any) -> None:
    if "linear" not in base_model.shapes:
        return
    try:
        method.check(base_model.shapes, params)
    except Invalid as error:
        field = str(error.field)
        title = method.schema.model_fields[field].title
        reason = f"{method.label}: {title}: {error.message}"
        raise Invalid(reason, field=f"{method.key}.{field}") from None


def forecasts(
    db: Session, asked: Given, wanted: Sequence[Wanted], override: bool
) -> list[dict[str, Any]]:
    """Of each run. What fits nowhere is refused or, if so wanted, marked. Raises Invalid."""
    found = verdicts.places(db)
    for one in wanted:
        _check_optimizer(one, found)
    told = forecast.each(db, asked, wanted)
    if not override:
        verdicts.check(db, asked, wanted, told)
        return told
    for one, known in zip(wanted, told, strict=True):
        if verdicts.of(known, one.params, found).key == verdicts.TOO_LARGE:
            known["override"] = True
    return told


def _check_optimizer(one: Wanted, found: Sequence[verdicts.Place]) -> None:
    """Raises Invalid for an optimizer of 8 bits if the tuning workers alive have no GPU for it."""
    if capacity.needs_gpu(one.params) and found and not any(place.room.gpu for place in found):
        chosen = one.params["optimizer"]
        raise Invalid(
            f"{methods.get(one.method).label}: Optimizer: {chosen} needs a GPU with CUDA, and no tuning "
            "worker that is alive has one. Choose adamw.",
            field=f"{one.method}.optimizer",
        )


def enqueue(
    db: Session, experiment_id: str, wanted: Wanted, told: dict[str, Any], **more: Any
) -> Run:
    """Store the run behind all that wait; not committed here."""
    run = Run(experiment_id=experiment_id, position=runs.behind(db), **wanted._asdict(), **more)
    run.forecast = told
    db.add(run)
    db.flush()  # one by one: the queue keeps the order in which they were asked for
    return run
