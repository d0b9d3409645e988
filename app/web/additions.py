"""What a person has entered to add runs to an experiment, and what would start."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.orm import Session
from starlette.datastructures import FormData

from app import calibration, forecast, methods, more_runs, naming, verdicts
from app.errors import StudioError
from app.forecast import Given
from app.tables import Experiment, Run
from app.web import formats, forms, outlooks


@dataclass
class Addition:
    """The form as sent. `sent` has the method's parameters as `method.name`."""

    method: str
    copied_from: str
    sent: dict[str, str]
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def vary(self) -> str:
        """The parameter that is varied; empty: none, it is one run."""
        return self.sent.get("vary", "")

    @property
    def values(self) -> list[str]:
        """What it is varied over."""
        return [text for part in self.sent.get("values", "").split(",") if (text := part.strip())]


@dataclass(frozen=True)
class Line:
    """A run that would start. `known`: what it is called if the experiment has it already."""

    differs: list[tuple[str, str, str]]  # from what was copied: title, its value, the copied one's
    known: str
    verdict: tuple[str, str]  # in words, and the badge
    memory: str
    time: str


def begin(experiment: Experiment, copied_from: str, method: str, vary: str) -> Addition:
    """A form filled with the settings of the run to copy, or with a method's defaults."""
    if copied_from:
        run = more_runs.copied(experiment, copied_from)
        schema = methods.get(run.method).schema
        params = schema.model_validate(run.params)
        addition = Addition(run.method, copied_from, forms.sent(schema, run.method, params))
    else:
        schema = methods.get(method).schema
        addition = Addition(method, "", forms.sent(schema, method, schema()))
    addition.sent["vary"] = vary
    return suggest(experiment, addition)


def read(experiment: Experiment, form: FormData) -> Addition:
    """The form as it was sent. Raises NotFound for an unknown method or run."""
    sent = {name: value for name, value in form.items() if isinstance(value, str)}
    copied_from, method = sent.get("copied_from", ""), sent.get("method", "")
    if copied_from:
        method = more_runs.copied(experiment, copied_from).method
    return suggest(experiment, Addition(methods.get(method).key, copied_from, sent))


def suggest(experiment: Experiment, addition: Addition) -> Addition:
    """Values to begin with, once another parameter is to be varied."""
    sent, vary = addition.sent, addition.vary
    if vary not in more_runs.varied(addition.method):
        sent["vary"] = sent["values"] = ""
    elif sent.get("values_of") != vary:
        params, errors = _params(addition)
        if not errors:
            checked = methods.get(addition.method).schema.model_validate(params)
            value = getattr(checked, vary)
            found = more_runs.suggested(experiment, addition.method, vary, value)
            sent["values"] = ", ".join(naming.written(one) for one in found)
    sent["values_of"] = sent["vary"]
    return addition


def submit(db: Session, experiment: Experiment, addition: Addition) -> list[Run]:
    """Start the runs; none if something is wrong, which `errors` then says."""
    params, addition.errors = _params(addition)
    if addition.errors:
        return []
    try:
        return more_runs.add(
            db,
            experiment.id,
            addition.method,
            params,
            vary=addition.vary,
            values=addition.values,
            copied_from=addition.copied_from or None,
            override="override" in addition.sent,
        )
    except StudioError as problem:
        db.rollback()
        addition.errors[problem.field or "method"] = problem.message
        return []


def page(db: Session, experiment: Experiment, addition: Addition) -> dict[str, Any]:
    """All that the form's template needs."""
    method = methods.get(addition.method)
    lines, problem = _lines(db, experiment, addition)
    source = addition.copied_from and more_runs.copied(experiment, addition.copied_from)
    titles = {key: one.title or key for key, one in method.schema.model_fields.items()}
    return {
        "experiment": experiment,
        "addition": addition,
        "method": method,
        "source": source or None,
        "fields": forms.fields(method.schema, method.key, addition.sent, addition.errors),
        "varied": [(key, titles[key]) for key in more_runs.varied(method.key)],
        "usual": [key for key in more_runs.varied(method.key) if key in more_runs.FIRST],
        "lines": lines,
        "starting": sum(not line.known for line in lines),
        "misfits": any(not line.known and line.verdict[1] == "failed" for line in lines),
        "problem": problem,
        "others": [one for one in methods.METHODS.values() if one.key != method.key],
        "ids": {name: name.replace(".", "-") for name in addition.errors},
    }


def _params(addition: Addition) -> tuple[dict[str, Any], dict[str, str]]:
    schema = methods.get(addition.method).schema
    return forms.read(schema, addition.method, addition.sent)


def _lines(db: Session, experiment: Experiment, addition: Addition) -> tuple[list[Line], str]:
    """What would start, or why nothing would."""
    params, errors = _params(addition)
    if errors:
        return [], "Told again once the parameters are right."
    try:
        found = more_runs.plan(experiment, addition.method, params, addition.vary, addition.values)
    except StudioError as problem:
        return [], problem.message
    asked, places = forecast.given(experiment), verdicts.places(db)
    like = _compared(experiment, addition)
    return [_line(db, asked, experiment, one, like, places) for one in found], ""


def _compared(experiment: Experiment, addition: Addition) -> dict[str, Any]:
    """The settings of the copied run, or the method's defaults."""
    if addition.copied_from:
        return naming.settings(more_runs.copied(experiment, addition.copied_from))
    return naming.settled(addition.method, {}, experiment.seed)


def _line(
    db: Session,
    asked: Given,
    experiment: Experiment,
    one: more_runs.Planned,
    like: dict[str, Any],
    places: Sequence[verdicts.Place],
) -> Line:
    method, params = one.wanted
    told = forecast.of(db, asked, method, params)
    mine = naming.settled(method, params, experiment.seed)
    need = None
    if told:
        need = told["gpu_memory_mb" if told["device_kind"] == calibration.GPU else "memory_mb"]
    return Line(
        differs=naming.differences(method, mine, like),
        known=naming.name(one.known) if one.known else "",
        verdict=outlooks.VERDICTS[verdicts.of(told, params, places).key],
        memory=formats.memory(need),
        time=formats.span(told["seconds_low"], told["seconds_high"]) if told else formats.NOTHING,
    )


def said(made: Sequence[Run]) -> str:
    """What was started, in a sentence."""
    return f"{len(made)} runs were added." if len(made) > 1 else "The run was added."
