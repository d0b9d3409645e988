"""Experiments: one question to a base model and a dataset, answered by several runs."""

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict, Unpack

from sqlalchemy import select
from sqlalchemy.orm import Session, selectinload

from app import (
    admission,
    base_models,
    datasets,
    forecast,
    methods,
    prompts,
    questions,
    queue,
    verdicts,
)
from app.admission import Wanted
from app.crashpoints import crashpoint
from app.errors import InTrash, NotFound
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


class Question(TypedDict):
    """What a new experiment is asked; `methods`: each with its parameters, {} for the defaults."""

    name: str
    base_model_id: str
    dataset_id: str
    task: str
    template: str
    labels: list[str]
    seed: int
    methods: Mapping[str, Mapping[str, Any]]
    watch: NotRequired[Sequence[str]]
    override: NotRequired[bool]  # start what fits no worker alive, too


def create(db: Session, **question: Unpack[Question]) -> Experiment:
    """Store the experiment and queue one run for each method.

    Raises Invalid, with the field to blame (such as "name" or "lora.rank"), and stores nothing;
    also for runs that fit no worker alive, unless `override` says that they shall start anyway.
    """
    experiment, asked, chosen = _checked(db, question)
    wanted = [Wanted(*one) for one in chosen.items()]
    told = admission.forecasts(db, asked, wanted, question.get("override", False))
    db.add(experiment)
    db.flush()
    for one, known in zip(wanted, told, strict=True):
        admission.enqueue(db, experiment.id, one, known)
    crashpoint("experiment.stored")
    db.commit()
    crashpoint("experiment.committed")
    queue.ring("tuner")
    return get(db, experiment.id)


def asked(db: Session, **question: Unpack[Question]) -> tuple[Given, dict[str, dict[str, Any]]]:
    """What `create` would be asked, checked the same way, for a forecast. Stores nothing."""
    _, found, chosen = _checked(db, question)
    return found, chosen


def _checked(db: Session, asked: Question) -> tuple[Experiment, Given, dict[str, dict[str, Any]]]:
    """The experiment, not stored; what its forecasts are about; and each method's parameters."""
    base_model, dataset = _needed(db, asked["base_model_id"], asked["dataset_id"])
    experiment = Experiment(
        id=new_id(),
        name=questions.name(asked["name"]),
        base_model_id=base_model.id,
        dataset_id=dataset.id,
        task=questions.task(asked["task"]),
        labels=questions.labels(dataset, asked["task"], asked["labels"]),
        template=prompts.check_template(asked["template"]),
        seed=questions.seed(asked["seed"]),
        split=datasets.split(dataset.num_examples, asked["seed"]),
        watch=questions.watch(asked.get("watch", ())),
    )
    chosen = admission.checked_params(base_model, asked["methods"])
    return experiment, forecast.given(experiment, base_model, dataset), chosen


def _needed(db: Session, base_model_id: str, dataset_id: str) -> tuple[BaseModel, Dataset]:
    """Both, locked until the experiment stands, so that nobody throws them away meanwhile."""
    for column, key in ((BaseModel.id, base_model_id), (Dataset.id, dataset_id)):
        db.execute(select(column).where(column == key).with_for_update(read=True))
    return base_models.get(db, base_model_id), datasets.get(db, dataset_id)


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
