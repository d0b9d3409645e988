"""Which columns of a file hold an example's input and output: known by their names, or as a person says."""

from collections.abc import Iterable
from typing import NamedTuple

from app.errors import Invalid

# Tried in this order. An `input` beside an `instruction` is what that is to be done with.
PAIRS = (
    ("instruction", "output"),
    ("input", "output"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("document", "summary"),
    ("text", "label"),
    ("messages", "messages"),
)
MOST_SHOWN = 50


class Columns(NamedTuple):
    """Their names. One name for both: a conversation; `more`: goes behind the input where it is given."""

    input: str
    output: str
    more: str = ""


def recognized(names: Iterable[str]) -> Columns | None:
    """The columns that are called as is usual, whatever their case; None: none are."""
    every = list(names)
    known = {name.strip().casefold(): name for name in every} | {name: name for name in every}
    for first, second in PAIRS:
        if first in known and second in known:
            more = known.get("input", "") if first == "instruction" else ""
            return Columns(known[first], known[second], more)
    return None


def named(input: str, output: str) -> Columns | None:
    """The columns that a person names; None if none. Raises Invalid for half a choice."""
    if not input and not output:
        return None
    if not input or not output or input == output:
        raise Invalid(
            "Name two columns: one for the input and another one for the output.", field="columns"
        )
    return Columns(input, output)


def choosable(names: Iterable[str]) -> list[str]:
    """Those that can be shown for a choice."""
    tidy = (name.strip() for name in names)
    return [name for name in dict.fromkeys(tidy) if name.isprintable() and 0 < len(name) <= 100][
        :MOST_SHOWN
    ]
