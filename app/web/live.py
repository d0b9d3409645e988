"""All that the page of an experiment shows."""

from collections.abc import Callable
from typing import Any

from sqlalchemy.orm import Session

from app import methods, naming, order, prompts, queue, runs
from app.comparison import figures, spread
from app.tables import Experiment, Run
from app.web import columns, formats, frames, outlooks, panels, vectors

FIGURES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "train_rows": ("Train examples", formats.number),
    "cut_rows": ("Examples cut to the maximum length", formats.number),
    "trainable_parameters": ("Trained parameters", formats.number),
    "total_parameters": ("Parameters in all", formats.number),
    "num_virtual_tokens": ("Virtual tokens", formats.number),
    "size_bytes": ("Size saved, with the tokenizer", formats.size),
    "peak_memory_mb": ("Peak memory", formats.memory),
    "tokens_per_second": ("Tokens per second", formats.number),
    "device": ("Device", str),
    "precision": ("Precision of frozen weights", str),
    "products": ("Precision of computing", str),
    "threads": ("Threads", formats.number),
}


def page(db: Session, experiment: Experiment, answers_page: int) -> dict[str, Any]:
    """Runs with their panels, the base model's loss, the comparison."""
    shown = figures.ordered(experiment)
    base = figures.baseline(db, experiment)
    return {
        "shown": shown,
        "runs": list(zip(shown, panels.all_of(db, experiment), strict=True)),
        "actions": panels.ACTIONS,
        "held_since": order.held_since(db),
        "ended": all(run.state in runs.FINAL for run in shown),
        "tasks": prompts.TASKS,
        "broker": queue.is_up(),
        "base_loss": base.validation_loss if base else None,
        **comparison(db, experiment, answers_page),
    }


def comparison(db: Session, experiment: Experiment, answers_page: int) -> dict[str, Any]:
    """The table and a page of answers."""
    table = columns.table(db, experiment)
    return {
        "experiment": experiment,
        "table": table,
        "spreads": spread.of(experiment),
        **columns.side_by_side(db, experiment, answers_page),
    }


def run_page(db: Session, run: Run) -> dict[str, Any]:
    """A run by itself: parameters, what was measured, history."""
    schema, known = methods.get(run.method).schema, naming.settings(run)
    return {
        "run": run,
        "panel": panels.one_of(db, run),
        "actions": panels.ACTIONS,
        "params": [
            (field.title or name, _said(known[name])) for name, field in schema.model_fields.items()
        ],
        "measured": [
            (label, words(run.figures[key]))
            for key, (label, words) in FIGURES.items()
            if run.figures.get(key) is not None
        ],
        "compared": outlooks.side_by_side(run),
        "told_from": outlooks.sources(run.forecast) if "time_from" in run.forecast else {},
        "events": runs.history(db, run.id),
        **_copied(run),
        **frames.of_run(db, run),
        "vector": vectors.table(run),
    }


def _copied(run: Run) -> dict[str, Any]:
    """The run that it was copied from, if it was, and where their settings differ."""
    source = next((one for one in run.experiment.runs if one.id == run.copied_from), None)
    settings = (naming.settings(run), naming.settings(source)) if source else ({}, {})
    return {"copied": source, "differs": naming.differences(run.method, *settings)}


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value) or formats.NOTHING
