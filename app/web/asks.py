"""The playground's form and its answers: what can be prompted, and what was asked last."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pydantic
from sqlalchemy.orm import Session
from starlette.datastructures import FormData

from app import base_models, completions, experiments
from app.errors import Invalid, NotFound
from app.methods import METHODS
from app.tables import Completion, Experiment, Run
from app.web import drafts, streams

PLAIN = "{{input}}"


@dataclass
class Ask:
    """The playground's form: which models, what text, how answers are drawn."""

    base_model_id: str = ""
    models: list[str] = field(default_factory=list)  # run ids; "base": the base model itself
    input: str = ""
    template: str = PLAIN
    labels: str = ""
    applied: bool = True
    temperature: str = "0"
    max_tokens: str = "128"
    errors: dict[str, str] = field(default_factory=dict)


def begin(db: Session, base_model_id: str, experiment_id: str) -> Ask:
    """A form for this experiment's models, else for the newest tuned models there are."""
    choices = completions.choices(db)
    named = experiments.get(db, experiment_id) if experiment_id else None
    experiment = named or _newest(choices, base_model_id)
    base = experiment.base_model_id if experiment else base_model_id or next(iter(choices), "")
    ask = Ask(base_model_id=base, models=["base"])
    if experiment:
        mine = [run.id for run in choices.get(base, []) if run.experiment_id == experiment.id]
        ask.models += mine[: completions.MOST_MODELS - 1]
        ask.template, ask.labels = experiment.template, "\n".join(experiment.labels)
        ask.max_tokens = "32" if experiment.task == "classification" else "128"
    return ask


def _newest(choices: dict[str, list[Any]], base_model_id: str) -> Experiment | None:
    wanted = [base_model_id] if base_model_id else list(choices)
    every: list[Run] = [run for key in wanted for run in choices.get(key, [])]
    newest = max(every, key=lambda run: run.finished_at or 0, default=None)
    return newest.experiment if newest else None


def again(asked: Sequence[Completion]) -> Ask:
    """The form as it was when these were asked."""
    first = asked[0]
    return Ask(
        base_model_id=first.base_model_id,
        models=[one.run_id or "base" for one in asked],
        input=first.input,
        template=first.template,
        labels="\n".join(first.settings.get("labels", [])),
        applied=first.template != PLAIN,
        temperature=f"{first.settings.get('temperature', 0):g}",
        max_tokens=str(first.settings.get("max_tokens", 128)),
    )


def read(form: FormData) -> Ask:
    """The form as it was sent."""

    def text(name: str) -> str:
        value = form.get(name, "")
        return value.replace("\r\n", "\n") if isinstance(value, str) else ""

    return Ask(
        base_model_id=text("base_model_id"),
        models=[value for value in form.getlist("models") if isinstance(value, str)],
        input=text("input"),
        template=text("template"),
        labels=text("labels"),
        applied="applied" in form,
        temperature=text("temperature"),
        max_tokens=text("max_tokens"),
    )


def submit(db: Session, ask: Ask) -> str | None:
    """Put the question; the ask's id, or None with the reason in `errors`."""
    try:
        sampling = completions.Sampling.model_validate(
            {"temperature": ask.temperature, "max_tokens": ask.max_tokens}
        )
        return completions.ask(
            db,
            base_model_id=ask.base_model_id,
            run_ids=[None if key == "base" else key for key in ask.models],
            input=ask.input,
            template=ask.template if ask.applied else PLAIN,
            labels=drafts.lines(ask.labels),
            sampling=sampling,
        )
    except pydantic.ValidationError as problem:
        ranges = {"temperature": "0 to 2", "max_tokens": "1 to 2048"}
        for error in problem.errors():
            name = str(error["loc"][0])
            ask.errors[name] = f"Give a number, {ranges[name]}."
    except (Invalid, NotFound) as problem:
        ask.errors[problem.field or "models"] = problem.message
    db.rollback()
    return None


def page(db: Session, ask: Ask, asked: Sequence[Completion] = ()) -> dict[str, Any]:
    """All that the playground's template needs."""
    choices = completions.choices(db)
    bases = {one.id: one for one in base_models.ready(db)}
    return {
        "ask": ask,
        "bases": bases,
        "base_model": bases.get(ask.base_model_id),
        "groups": _groups(choices.get(ask.base_model_id, [])),
        "answers": [(one, streams.answer(one)) for one in asked],
        "asked": asked[0] if asked else None,
        "open": any(one.state in completions.OPEN for one in asked),
        "runs": {run.id: run for found in choices.values() for run in found},
        "recent": completions.recent(db, 12),
    }


def _groups(runs: Sequence[Run]) -> list[tuple[Experiment, list[Run]]]:
    """The tuned models by experiment, newest first."""
    groups: dict[str, tuple[Experiment, list[Run]]] = {}
    for run in runs:
        groups.setdefault(run.experiment_id, (run.experiment, []))[1].append(run)
    for _, found in groups.values():
        found.sort(key=lambda run: METHODS[run.method].order)
    return list(groups.values())
