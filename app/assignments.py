"""What `--set` says on the command line: `rank=8` for every method that has a rank, `lora.rank=8` for one."""

from collections.abc import Mapping, Sequence
from typing import Any

from app import methods
from app.errors import Invalid


def assigned(
    texts: Sequence[str], chosen: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The methods with their parameters, and over these what was set, unchecked; what names its
    method counts more. Raises Invalid for what no method here has.
    """
    made = {key: dict(params) for key, params in chosen.items()}
    for text in sorted(texts, key=lambda text: "." in text.partition("=")[0]):
        left, _, value = text.partition("=")
        name = left.rpartition(".")[2]
        if not name or not value:
            raise Invalid(f"--set {text}: write parameter=value, such as rank=8 or lora.rank=8.")
        for key in _meant(text, left.rpartition(".")[0], name, list(made)):
            made[key][name] = value
    return made


def _meant(text: str, method: str, name: str, chosen: list[str]) -> list[str]:
    """The methods that the name is set for. Raises Invalid if there is none."""
    if method and method not in chosen:
        raise Invalid(f"--set {text}: {method} is not trained here; {', '.join(chosen)} would be.")
    fields = {key: methods.get(key).schema.model_fields for key in ([method] if method else chosen)}
    found = [key for key in fields if name in fields[key]]
    if not found:
        known = dict.fromkeys(one for names in fields.values() for one in names)
        raise Invalid(f"--set {text}: there is no parameter {name}. There are {', '.join(known)}.")
    return found
