"""The comparison in a terminal: whole at 80 columns."""

import io

from rich.console import Console
from sqlalchemy.orm import Session

from app import experiments, results
from app.comparison import figures
from tests import answered, factories
from tests.answered import Model


def _lines(db: Session, models: list[Model], width: int) -> list[str]:
    of = answered.experiment(db, models)
    factories.run(db, of, method="qlora", state="failed")
    found = experiments.get(db, of.id)
    text = io.StringIO()
    table = results.Result(found, figures.compare(db, found), []).table()
    Console(file=text, width=width).print(table)
    return text.getvalue().splitlines()


def test_the_table_fits_a_terminal_of_80_columns_with_nothing_cut(db: Session) -> None:
    changed = {"learning_rate": 0.00001, "rank": 64}
    models = [
        answered.BASE,
        Model("lora", 0.92, 1900, 3700),
        Model("lora", 0.9, params=changed),
        Model("full", 0.93, 18_000, 10_000, 540_000_000),
    ]
    lines = _lines(db, models, 80)
    assert not any("…" in line for line in lines)
    cells = [line.split() for line in lines]
    full = "Full fine tuning 93.0 % 0.4000 2 h 46 min 18.0 GB 135 M 540 MB"
    assert full.split() in cells  # each figure whole, in one line with its model
    below = cells[cells.index(full.split()) + 1]
    assert (len(below), below[1]) == (3, "to")  # the score's interval, in percent
    assert len(lines) < 22
    assert ["failed"] in cells
