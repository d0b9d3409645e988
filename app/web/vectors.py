"""What a prompt vector says, as a table on the run's page."""

from typing import NamedTuple

from app.tables import Run

SHOWN = 20  # virtual tokens; more are folded away


class Line(NamedTuple):
    """A virtual token: the nearest tokens with their cosine, what it began as, how far it moved."""

    number: int
    near: list[tuple[str, str]]
    began: str
    moved: str


def table(run: Run) -> list[list[Line]]:
    """The lines that are shown, then those that are folded away; nothing without a prompt vector."""
    found = run.figures.get("prompt_vector") or []
    lines = [
        Line(
            number,
            [(quoted(text), f"{cosine:.2f}") for text, cosine in one["near"]],
            "no token" if one["began"] is None else quoted(one["began"]),
            f"{one['moved'] * 100:,.0f} %",
        )
        for number, one in enumerate(found, 1)
    ]
    return [part for part in (lines[:SHOWN], lines[SHOWN:]) if part]


def quoted(text: str) -> str:
    """A token with its spaces and line breaks to be seen."""
    if not text:
        return "(no text)"
    shown = "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)
    return f"“{shown}”"
