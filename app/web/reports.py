"""The comparison as one file to hand on: its style inside, no script, nothing to fetch."""

import re
import time
from functools import cache
from typing import Any

from markupsafe import Markup
from sqlalchemy.orm import Session

from app import methods, naming, prompts, storage
from app.comparison import figures
from app.tables import Experiment, Run
from app.web import colours, columns, confusions, drawings

_FONTS = re.compile(r"@font-face\s*{[^}]*}\s*")


def page(db: Session, experiment: Experiment) -> dict[str, Any]:
    """All that the report says."""
    shown = figures.ordered(experiment)
    named = naming.names(shown)
    is_classes = experiment.task == "classification"
    return {
        "experiment": experiment,
        "task": prompts.TASKS[experiment.task].label,
        "table": columns.table(db, experiment),
        "curves": drawings.losses(db, shown, named),
        "params": [(run, named[run.id], _params(run)) for run in shown],
        "classes": confusions.page(db, experiment, "", "normalised") if is_classes else None,
        "written": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "sheet": _sheet(),
    }


def name(experiment: Experiment) -> str:
    """Of the file: what of the experiment's name is safe everywhere."""
    plain = re.sub(r"[^a-z0-9]+", "-", experiment.name.lower()).strip("-")
    return f"comparison-{plain[:60] or experiment.id}.html"


@cache
def _sheet() -> Markup:
    """The studio's own style; fonts are those of the reader's system."""
    style = (storage.static_folder() / "studio.css").read_text()
    # Ours, both of them, so that they may stand in the page as they are.
    return Markup(f"<style>{_FONTS.sub('', style)}{colours.SHEET}</style>")


def _params(run: Run) -> list[tuple[str, str]]:
    fields = methods.get(run.method).schema.model_fields
    return [
        ((fields[key].title if key in fields else None) or key, naming.written(value))
        for key, value in naming.settings(run).items()
    ]
