"""The page on which answers are explored: its filter as the address has it, a page of examples, and files."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any
from urllib.parse import urlencode

from sqlalchemy.orm import Session

from app import database, experiments
from app.comparison import explorer
from app.comparison.explorer import Asked, Example, Model
from app.tables import Experiment
from app.web import formats, wordmarks
from app.web.wordmarks import Piece

PAGE = 20
CHUNK = 500  # examples read at once for a file
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


@dataclass(frozen=True)
class Said:
    """A model's answer as the page shows it. Verdict: right, part or wrong."""

    model: Model
    verdict: str
    words: str
    pieces: list[Piece]
    loss: str


def asked(experiment: Experiment, found: Sequence[Model], sent: Mapping[str, str]) -> Asked:
    """The filter that an address has; what cannot be read counts as not said."""
    keys = [one.key for one in found]
    tuned = [key for key in keys if key != "base"] or ["", ""]
    x = sent.get("x", "")
    x = x if x in keys else tuned[0]
    y = sent.get("y", "")
    y = y if y in keys else next((key for key in [*tuned, *keys] if key != x), "")
    show, sort = sent.get("show", ""), sent.get("sort", "")
    return Asked(
        show=show if show in explorer.SHOWN else "all",
        x=x,
        y=y,
        threshold=_share(sent.get("least", ""), explorer.threshold(experiment.task)),
        text=sent.get("q", "").strip()[:200],
        sort=sort if sort in explorer.ORDERS else "row",
    )


def _share(text: str, usual: float) -> float:
    try:
        value = float(text)
    except ValueError:
        return usual
    return value if 0 <= value <= 1 else usual


def address(wanted: Asked, page: int = 1) -> str:
    """The filter as an address has it."""
    said = {
        "show": wanted.show,
        "x": wanted.x,
        "y": wanted.y,
        "least": f"{wanted.threshold:g}",
        "q": wanted.text,
        "sort": wanted.sort,
        "page": str(page) if page > 1 else "",
    }
    return urlencode({name: value for name, value in said.items() if value})


def page(
    db: Session, experiment: Experiment, sent: Mapping[str, str], number: int
) -> dict[str, Any]:
    """All that the template needs."""
    found = explorer.models(db, experiment)
    wanted = asked(experiment, found, sent)
    start = (number - 1) * PAGE
    rows, total = explorer.find(db, experiment, found, wanted, start=start, limit=PAGE)
    pages = max(1, -(-total // PAGE))
    if number > pages:
        number = pages
        start = (number - 1) * PAGE
        rows, total = explorer.find(db, experiment, found, wanted, start=start, limit=PAGE)
    examples = explorer.read(db, experiment, found, rows)
    return {
        "experiment": experiment,
        "models": found,
        "asked": wanted,
        "shown": explorer.SHOWN,
        "orders": explorer.ORDERS,
        "examples": [(one, _said(one, found, wanted.threshold)) for one in examples],
        "total": total,
        "page": number,
        "pages": pages,
        "first": start + 1,
        "query": address(wanted),
        "earlier": address(wanted, number - 1),
        "later": address(wanted, number + 1),
    }


def _said(one: Example, found: Sequence[Model], least: float) -> list[Said]:
    said = []
    for model, given in zip(found, one.answers, strict=True):
        if given is None:
            continue
        right = explorer.is_right(given.score, least)
        exact = given.score <= 0.0005 or given.score >= 0.9995
        said.append(
            Said(
                model,
                "right" if right else "wrong" if exact else "part",
                ("right" if right else "wrong") if exact else f"{given.score * 100:.0f} %",
                wordmarks.marked(one.expected, given.text),
                formats.figure(given.loss),
            )
        )
    return said


def as_csv(experiment_id: str, sent: Mapping[str, str]) -> Iterator[str]:
    """The examples of the filter as a file, line by line; no cell can be taken for a formula."""
    line = io.StringIO()
    writer = csv.writer(line, lineterminator="\r\n")
    heads: list[Model] | None = None
    for found, one in _every(experiment_id, sent):
        if heads is None:
            heads = found
            names = [(m.label, f"{m.label}: score", f"{m.label}: loss") for m in found]
            writer.writerow(map(_safe, ("row", "input", "expected", *chain(*names))))
        if one is not None:
            cells = [(a.text, a.score, a.loss) if a else ("", "", "") for a in one.answers]
            writer.writerow(map(_safe, (one.row + 1, one.input, one.expected, *chain(*cells))))
        yield line.getvalue()
        line.seek(0)
        line.truncate()


def _safe(value: Any) -> Any:
    """With an apostrophe before what a spreadsheet would compute."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def as_jsonl(experiment_id: str, sent: Mapping[str, str]) -> Iterator[str]:
    """The same as one JSON object a line."""
    for found, one in _every(experiment_id, sent):
        if one is None:
            continue
        answers = [
            {"model": model.key, "name": model.label, **given._asdict()}
            for model, given in zip(found, one.answers, strict=True)
            if given
        ]
        told = {"row": one.row + 1, "input": one.input, "expected": one.expected}
        yield json.dumps(told | {"answers": answers}, ensure_ascii=False) + "\n"


def _every(
    experiment_id: str, sent: Mapping[str, str]
) -> Iterator[tuple[list[Model], Example | None]]:
    """First the models alone, then every example of the filter, read some at a time."""
    with database.reading() as db:
        experiment = experiments.get(db, experiment_id)
        found = explorer.models(db, experiment)
        yield found, None
        rows, _ = explorer.find(db, experiment, found, asked(experiment, found, sent))
        for start in range(0, len(rows), CHUNK):
            for one in explorer.read(db, experiment, found, rows[start : start + CHUNK]):
                yield found, one
