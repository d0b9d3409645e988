"""Form fields drawn from a pydantic schema, and the values read back from what was sent."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pydantic

from app.errors import own_words


@dataclass(frozen=True)
class Field:
    """One field as a template draws it. `kind`: number, choice, text or checkbox."""

    name: str
    kind: str
    label: str
    help: str
    value: str
    default: str
    range: str  # in words: "from 1 to 16"; empty: none
    minimum: str
    maximum: str
    step: str
    choices: tuple[str, ...]
    error: str
    advanced: bool

    @property
    def id(self) -> str:
        """The element's id: the name without dots, so that a selector can name it."""
        return self.name.replace(".", "-")


def fields(
    schema: type[pydantic.BaseModel],
    prefix: str,
    sent: Mapping[str, str] | None = None,
    errors: Mapping[str, str] | None = None,
) -> list[Field]:
    """The schema's fields as `prefix.name`, with what was sent (None: the defaults) and what is wrong."""
    drawn = []
    for key, property in schema.model_json_schema()["properties"].items():
        name = f"{prefix}.{key}"
        # What may be left empty is described as one of two, the other of which is nothing.
        described = property | property.get("anyOf", [{}])[0]
        default = _text(described.get("default", ""))
        value = default if sent is None else sent.get(name, "")
        drawn.append(_field(name, described, value, default, (errors or {}).get(name, "")))
    return drawn


def sent(
    schema: type[pydantic.BaseModel], prefix: str, values: pydantic.BaseModel
) -> dict[str, str]:
    """What a form with these values would send."""
    texts = {f"{prefix}.{key}": _text(getattr(values, key)) for key in schema.model_fields}
    ticks = {one.name for one in fields(schema, prefix) if one.kind == "checkbox"}
    return {name: text for name, text in texts.items() if text or name not in ticks}


def _field(name: str, described: dict[str, Any], value: str, default: str, error: str) -> Field:
    low = described.get("minimum", described.get("exclusiveMinimum"))
    high = described.get("maximum")
    return Field(
        name=name,
        kind=_kind(described),
        label=described.get("title", name),
        help=described.get("description", ""),
        value=value,
        default=default,
        range=_range(described),
        minimum="" if low is None or "exclusiveMinimum" in described else _text(low),
        maximum="" if high is None else _text(high),
        step="1" if described.get("type") == "integer" else "any",
        choices=tuple(described.get("enum", ())),
        error=error,
        advanced=bool(described.get("advanced")),
    )


def _kind(described: dict[str, Any]) -> str:
    if "enum" in described:
        return "choice"
    kinds = {"integer": "number", "number": "number", "boolean": "checkbox"}
    return kinds.get(described.get("type", ""), "text")


def _range(described: dict[str, Any]) -> str:
    low, high = described.get("minimum"), described.get("maximum")
    if "exclusiveMinimum" in described:
        return f"above {_text(described['exclusiveMinimum'])}, at most {_text(high)}"
    return "" if low is None or high is None else f"from {_text(low)} to {_text(high)}"


def _text(value: Any) -> str:
    """As a person types it: 0.00005, not 5e-05; a ticked box is "on"; nothing is empty."""
    if value is None or isinstance(value, bool):
        return "on" if value else ""
    if isinstance(value, float):
        return f"{value:.10f}".rstrip("0").rstrip(".")
    return str(value)


def read(
    schema: type[pydantic.BaseModel], prefix: str, sent: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The values sent under the prefix, ready for the schema, and every error by field name.

    A box that is not ticked sends nothing and means no; an empty field means its default.
    """
    values: dict[str, Any] = {}
    drawn = {field.name: field for field in fields(schema, prefix)}
    for name, field in drawn.items():
        key = name.removeprefix(f"{prefix}.")
        if field.kind == "checkbox":
            values[key] = name in sent
        elif text := sent.get(name, "").strip():
            values[key] = text
    try:
        schema.model_validate(values)
    except pydantic.ValidationError as problem:
        return values, _errors(problem, prefix, drawn)
    return values, {}


def _errors(
    problem: pydantic.ValidationError, prefix: str, drawn: Mapping[str, Field]
) -> dict[str, str]:
    found: dict[str, str] = {}
    for error in problem.errors():
        name = ".".join([prefix, *map(str, error["loc"][:1])])
        if name in drawn:
            found.setdefault(name, _sentence(error, drawn[name]))
        else:  # of the whole schema: said at the method
            found.setdefault(prefix, own_words(error))
    return found


def _sentence(error: Any, field: Field) -> str:
    if error["type"] == "value_error":
        return own_words(error)
    if field.kind == "choice":
        return f"{field.label}: choose one of {', '.join(field.choices)}."
    if field.kind == "number":
        whole = "a whole number" if field.step == "1" else "a number"
        return f"{field.label}: give {whole}" + (f" {field.range}." if field.range else ".")
    limit = error.get("ctx", {}).get("max_length")
    return f"{field.label}: " + (
        f"at most {limit} characters." if limit else "this text is not accepted."
    )
