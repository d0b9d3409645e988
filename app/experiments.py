"""Experiments: one question to a base model and a dataset, answered by several runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import pydantic
from sqlalchemy import select
from sqlalchemy.orm import Session, selectinload

from app import (
    base_models,
    datasets,
    forecast,
    methods,
    prompts,
    questions,
    queue,
    runs,
    verdicts,
)
from app.crashpoints import crashpoint
from app.errors import Conflict, InTrash, Invalid, NotFound
from app.forecast import Given
from app.tables import BaseModel, Dataset, Experiment, Run, new_id

# The runs know their experiment already: reading it again with each, split and all, takes longer
# than everything else together.
_RUNS = selectinload(Experiment.runs).lazyload(Run.experiment)


def get(db: Session, experiment_id: str) -> Experiment:
    """The experiment with its runs, read afresh. Raises NotFound."""
    query = select(Experiment).where(Experiment.id == experiment_id).options(_RUNS)
    found = db.scalar(query.execution_options(populate_existing=True))
    if found is None:
        raise NotFound("There is no such experiment. It may have been deleted.")
    if found.trashed_at:
        raise InTrash("experiment", found.id, found.name, found.trashed_at)
    return found


def all(db: Session, limit: int = 200) -> list[Experiment]:
    """The newest experiments first."""
    query = select(Experiment).where(Experiment.trashed_at.is_(None)).options(_RUNS)
    newest = query.order_by(Experiment.created_at.desc(), Experiment.id).limit(limit)
    return list(db.scalars(newest))


def on_dataset(db: Session, dataset_id: str) -> list[Experiment]:
    """The experiments that use the dataset, newest first."""
    query = select(Experiment).where(
        Experiment.dataset_id == dataset_id, Experiment.trashed_at.is_(None)
    )
    return list(db.scalars(query.order_by(Experiment.created_at.desc())))


def create(
    db: Session,
    *,
    name: str,
    base_model_id: str,
    dataset_id: str,
    task: str,
    template: str,
    labels: list[str],
    seed: int,
    methods: Mapping[str, Mapping[str, Any]],
    override: bool = False,
    watch: Sequence[str] = (),
) -> Experiment:
    """Store the experiment and queue one run for each method.

    Raises Invalid, with the field to blame (such as "name" or "lora.rank"), and stores nothing;
    also for runs that fit no worker alive, unless `override` says that they shall start anyway.
    """
    experiment, asked, chosen = _checked(
        db, name, base_model_id, dataset_id, task, template, labels, seed, methods, watch
    )
    told = _forecasts(db, asked, chosen, override)
    db.add(experiment)
    db.flush()
    for key, params in chosen.items():
        _queue(db, experiment, key, params, told[key])
    crashpoint("experiment.stored")
    db.commit()
    crashpoint("experiment.committed")
    queue.ring("tuner")
    return get(db, experiment.id)


def asked(db: Session, **wanted: Any) -> tuple[Given, dict[str, dict[str, Any]]]:
    """What `create` would be asked, checked the same way, for a forecast. Stores nothing."""
    wanted.pop("override", None)
    _, found, chosen = _checked(db, **wanted)
    return found, chosen


def _checked(
    db: Session,
    name: str,
    base_model_id: str,
    dataset_id: str,
    task: str,
    template: str,
    labels: list[str],
    seed: int,
    methods: Mapping[str, Mapping[str, Any]],
    watch: Sequence[str] = (),
) -> tuple[Experiment, Given, dict[str, dict[str, Any]]]:
    """The experiment, not stored; what its forecasts are about; and each method's parameters."""
    base_model, dataset = _needed(db, base_model_id, dataset_id)
    experiment = Experiment(
        id=new_id(),
        name=questions.name(name),
        base_model_id=base_model.id,
        dataset_id=dataset.id,
        task=questions.task(task),
        labels=questions.labels(dataset, task, labels),
        template=prompts.check_template(template),
        seed=questions.seed(seed),
        split=datasets.split(dataset.num_examples, seed),
        watch=questions.watch(watch),
    )
    chosen = checked_params(base_model, methods)
    return experiment, forecast.given(experiment, base_model, dataset), chosen


def _forecasts(
    db: Session, asked: Given, chosen: Mapping[str, dict[str, Any]], override: bool
) -> dict[str, dict[str, Any]]:
    """Of each method. What fits nowhere is refused or, if so wanted, marked. Raises Invalid."""
    told = {key: forecast.of(db, asked, key, params) for key, params in chosen.items()}
    if not override:
        verdicts.check(db, asked, chosen, told)
        return told
    found = verdicts.places(db)
    for key, params in chosen.items():
        if verdicts.of(told[key], params, found).key == verdicts.TOO_LARGE:
            told[key]["override"] = True
    return told


def _queue(
    db: Session, experiment: Experiment, method: str, params: dict[str, Any], told: dict[str, Any]
) -> None:
    run = Run(experiment_id=experiment.id, method=method, params=params, position=runs.behind(db))
    run.forecast = told
    db.add(run)
    db.flush()  # one by one: the queue keeps the order of the methods


def _needed(db: Session, base_model_id: str, dataset_id: str) -> tuple[BaseModel, Dataset]:
    """Both, locked until the experiment stands, so that nobody throws them away meanwhile."""
    for column, key in ((BaseModel.id, base_model_id), (Dataset.id, dataset_id)):
        db.execute(select(column).where(column == key).with_for_update(read=True))
    return base_models.get(db, base_model_id), datasets.get(db, dataset_id)


def checked_params(
    base_model: BaseModel, chosen: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The parameters of each method, complete and within range. Raises Invalid."""
    if base_model.state != "ready":
        raise Conflict(
            f"The base model {base_model.name} is not ready yet ({base_model.state}). "
            "Nothing was started; try again when it is."
        )
    if not chosen:
        raise Invalid("Choose at least one method.", field="methods")
    allowed = base_models.methods_for(base_model)
    for key in chosen:
        if key not in allowed:
            label = methods.get(key).label
            raise Invalid(f"{base_model.name} cannot be tuned by {label}.", field="methods")
    ordered = [key for key in methods.METHODS if key in chosen]
    return {key: _params(base_model, key, chosen[key]) for key in ordered}


def _params(base_model: BaseModel, key: str, given: Mapping[str, Any]) -> dict[str, Any]:
    method = methods.get(key)
    try:
        params = method.schema.model_validate(given)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else "initialization_text"
        known = method.schema.model_fields.get(field)
        title = (known.title if known else None) or field
        reason = first["msg"].removeprefix("Value error, ")
        raise Invalid(f"{method.label}: {title}: {reason}.", field=f"{key}.{field}") from None
    longest = base_model.shapes.get("max_positions")
    if longest and params.max_length > longest:
        raise Invalid(
            f"{method.label}: Maximum length: {base_model.name} reads at most {longest} tokens.",
            field=f"{key}.max_length",
        )
    if method.virtual_tokens(params) >= params.max_length - 8:
        raise Invalid(
            f"{method.label}: the virtual tokens leave no room for text in the maximum length.",
            field=f"{key}.num_virtual_tokens",
        )
    return params.model_dump()


def tune_example(db: Session, key: str) -> Experiment:
    """The first experiment of a newcomer: example data, default base model, all methods that fit."""
    example = datasets.EXAMPLES.get(key)
    if example is None:
        raise NotFound("There is no such example.")
    wanted: dict[str, Any] = {
        "name": example.title,
        "base_model_id": base_models.add_default(db).id,
        "dataset_id": datasets.add_example(db, key).id,
        "task": example.task,
        "template": example.template,
        "labels": list(example.labels),
        "seed": 1,
        "methods": {key: method.quick for key, method in methods.METHODS.items()},
    }
    wanted["methods"] = verdicts.fitting(db, *asked(db, **wanted))
    return create(db, **wanted)
