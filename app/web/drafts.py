"""What a person has entered for a new experiment so far, and what follows from it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pydantic
from sqlalchemy.orm import Session
from starlette.datastructures import FormData

from app import base_models, datasets, experiments, prompts
from app.comparison import measured
from app.errors import Invalid, StudioError
from app.methods import METHODS, Method
from app.tables import BaseModel, Dataset, Experiment
from app.web import forms


@dataclass
class Draft:
    """The form as sent, and by field name what is wrong with it. `chosen`: None: not asked yet."""

    sent: dict[str, str]
    chosen: list[str] | None = None
    errors: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Card:
    """A method as the form shows it."""

    method: Method
    checked: bool
    blocked: str  # why it is not possible; empty: it is
    fields: list[forms.Field]
    error: str
    pace: str
    measured: measured.Measured | None  # of earlier runs on the same base model

    @property
    def is_open(self) -> bool:
        """Unfolded when a parameter in it is wrong."""
        return any(one.error for one in self.fields)


def begin(db: Session, dataset_id: str, base_model_id: str) -> Draft:
    """An empty form for this dataset and base model; the newest ready ones if none is named."""
    found, ready = datasets.all(db), base_models.ready(db)
    draft = Draft(
        {
            "dataset_id": dataset_id or (found[0].id if found else ""),
            "base_model_id": base_model_id or (ready[0].id if ready else ""),
            "seed": "1",
        }
    )
    return completed(db, draft)


def read(form: FormData) -> Draft:
    """The form as it was sent; files and unknown methods are left out."""
    sent = {name: value for name, value in form.items() if isinstance(value, str)}
    return Draft(sent, [key for key in METHODS if key in form.getlist("methods")])


def completed(db: Session, draft: Draft) -> Draft:
    """Fill what follows from dataset and task, unless the person has written something else."""
    sent = draft.sent
    dataset = _dataset(db, sent)
    if dataset and sent.get("filled_for") != dataset.id:
        before = _dataset(db, {"dataset_id": sent.get("filled_for", "")})
        if sent.get("task", "") in {"", before and datasets.task(before)}:
            sent["task"] = datasets.task(dataset)
        sent |= {"labels": "\n".join(datasets.labels(dataset)), "filled_for": dataset.id}
        sent["name"] = sent.get("name") or dataset.name
    asked = sent.get("task", "")
    task = asked if asked in prompts.TASKS else next(iter(prompts.TASKS))
    usual = {one.template for one in prompts.TASKS.values()}
    usual |= {one.template for one in datasets.EXAMPLES.values()}
    if _unix(sent.get("template", "")) in usual | {""}:
        of_task = prompts.TASKS[task].template
        sent["template"] = datasets.template(dataset, task) if dataset else of_task
    sent["task"] = task
    return draft


def submit(db: Session, draft: Draft) -> Experiment | None:
    """Create the experiment; None if something is wrong, which the draft's errors then say."""
    chosen = _read_methods(draft)
    _check(db, draft)
    if draft.errors:
        return None
    sent = draft.sent
    try:
        return experiments.create(
            db,
            name=sent["name"],
            base_model_id=sent["base_model_id"],
            dataset_id=sent["dataset_id"],
            task=sent.get("task", ""),
            template=_unix(sent["template"]),
            labels=lines(sent.get("labels", "")),
            seed=int(sent["seed"]),
            methods=chosen,
            override="override" in sent,
            watch=lines(sent.get("watch", "")),
        )
    except StudioError as problem:
        db.rollback()
        draft.errors[problem.field or "methods"] = problem.message
        return None


def _read_methods(draft: Draft) -> dict[str, dict[str, Any]]:
    chosen = {}
    for key in draft.chosen or ():
        chosen[key], errors = forms.read(METHODS[key].schema, key, draft.sent)
        draft.errors |= errors
    return chosen


def _check(db: Session, draft: Draft) -> None:
    sent, errors = draft.sent, draft.errors
    if not sent.get("name", "").strip():
        errors["name"] = "Give the experiment a name."
    if _base_model(db, sent) is None:
        errors["base_model_id"] = "Choose a base model."
    if _dataset(db, sent) is None:
        errors["dataset_id"] = "Choose a dataset."
    seed = sent.get("seed", "").strip()
    if not (seed.isascii() and seed.isdecimal() and int(seed) < 2**31):
        errors["seed"] = "The seed must be a whole number from 0 to 2147483647."
    try:
        prompts.check_template(_unix(sent.get("template", "")))
    except Invalid as problem:
        errors["template"] = problem.message


def lines(text: str) -> list[str]:
    """One label, or one input, a line."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def _unix(text: str) -> str:
    # Browsers send CRLF; the model shall read what the person sees.
    return text.replace("\r\n", "\n")


def _dataset(db: Session, sent: Mapping[str, str]) -> Dataset | None:
    return next((one for one in datasets.all(db) if one.id == sent.get("dataset_id")), None)


def _base_model(db: Session, sent: Mapping[str, str]) -> BaseModel | None:
    return next((one for one in base_models.ready(db) if one.id == sent.get("base_model_id")), None)


def page(db: Session, draft: Draft) -> dict[str, Any]:
    """All that the form's template needs."""
    sent = draft.sent
    dataset, base_model = _dataset(db, sent), _base_model(db, sent)
    sizes = split_sizes(dataset, sent)
    return {
        "sent": sent,
        "errors": draft.errors,
        "base_models": base_models.ready(db),
        "preparing": [one for one in base_models.all(db) if one.state in ("waiting", "preparing")],
        "datasets": datasets.all(db),
        "dataset": dataset,
        "base_model": base_model,
        "tasks": prompts.TASKS,
        "sizes": sizes,
        "cards": cards(db, draft, base_model, sizes.get("train", 0)),
        "ids": {name: name.replace(".", "-") for name in draft.errors},
    }


def split_sizes(dataset: Dataset | None, sent: Mapping[str, str]) -> dict[str, int]:
    """Rows for training, validation and test; empty without a dataset."""
    if dataset is None:
        return {}
    return {part: len(rows) for part, rows in datasets.split(dataset.num_examples, 1).items()}


def cards(db: Session, draft: Draft, base_model: BaseModel | None, train_rows: int) -> list[Card]:
    """The methods with their fields."""
    known = measured.by_method(db, base_model.id) if base_model else {}
    allowed = base_models.methods_for(base_model) if base_model else list(METHODS)
    first = draft.chosen is None
    made = []
    for key, method in METHODS.items():
        blocked = "" if key in allowed or base_model is None else _reason(base_model, method)
        sent = draft.sent if _was_sent(draft.sent, key) else None
        made.append(
            Card(
                method=method,
                checked=not blocked and (first or key in (draft.chosen or ())),
                blocked=blocked,
                fields=forms.fields(method.schema, key, sent, draft.errors),
                error=draft.errors.get(key, ""),
                pace=pace(key, draft.sent, train_rows),
                measured=known.get(key),
            )
        )
    return made


def _was_sent(sent: Mapping[str, str], key: str) -> bool:
    return any(name.startswith(f"{key}.") for name in sent)


def _reason(base_model: BaseModel, method: Method) -> str:
    if base_model.quantization:
        return (
            f"{base_model.name} is quantized already ({base_model.quantization}), and "
            f"{method.label} needs its full weights."
        )
    return f"{base_model.name} cannot be tuned by {method.label}."


def pace(key: str, sent: Mapping[str, str], train_rows: int) -> str:
    """Effective batch and number of updates; empty while they cannot be told."""
    try:
        params = METHODS[key].schema.model_validate(params_of(key, sent))
    except pydantic.ValidationError:
        return ""
    if not train_rows:
        return ""
    batch = params.batch_size * params.accumulate_steps
    updates = math.ceil(train_rows / batch) * params.num_epochs
    return f"{batch:,} examples an update, {updates:,} updates in all"


def params_of(key: str, sent: Mapping[str, str]) -> dict[str, Any]:
    """A method's parameters as sent, unchecked; none sent: none, which means the defaults."""
    return forms.read(METHODS[key].schema, key, sent)[0] if _was_sent(sent, key) else {}
