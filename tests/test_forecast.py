"""Forecasts: arithmetic on shapes, against what real runs took, and stored with each new run."""

import time
from typing import Any

import pytest
from sqlalchemy.orm import Session

from app import experiments, forecast, methods, points, runs
from app.forecast import Machine, Texts
from app.tables import BaseModel, Run
from tests import factories
from worker import recorder

SMOLLM2 = {
    "parameters": 134515008,
    "layers": 30,
    "hidden": 576,
    "intermediate": 1536,
    "heads": 9,
    "kv_heads": 3,
    "head_dim": 64,
    "vocabulary": 49152,
    "tied": True,
    "max_positions": 8192,
    "linear": {
        "q_proj": [576, 576, 30],
        "k_proj": [576, 192, 30],
        "v_proj": [576, 192, 30],
        "o_proj": [576, 576, 30],
        "gate_proj": [576, 1536, 30],
        "up_proj": [576, 1536, 30],
        "down_proj": [1536, 576, 30],
    },
    "dtype_bytes": 2,
}
CPU = Machine()
TICKETS = Texts(rows=189, shared=53.0, prompt=90.2, answer=2.7, longest=141.0)


def _memory(
    key: str, texts: Texts = TICKETS, machine: Machine = CPU, **params: Any
) -> forecast.Memory:
    method = methods.get(key)
    base_model = BaseModel(shapes=SMOLLM2, quantization=None)
    return forecast.memory(base_model, method, method.schema(**params), texts, machine)


def _total(key: str, **how: Any) -> float:
    return _memory(key, **how).total


def test_each_part_is_a_figure_of_its_own() -> None:
    full, lora, qlora, prompt = (_memory(key) for key in ("full", "lora", "qlora", "prompt_tuning"))
    mb = 2**20
    assert full.optimizer == 8 * 134515008 / mb
    assert full.gradients == 4 * 134515008 / mb
    assert full.adapters == 0
    assert lora.weights == 2 * 134515008 / mb
    assert lora.adapters * mb / 4 == 4884480  # as counted of the real adapters
    assert prompt.adapters * mb / 4 == 20 * 576
    assert qlora.weights < 0.45 * lora.weights  # its large vocabulary is not quantized
    assert full.total == sum(full)


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"batch_size": 4}, {"batch_size": 8}),
        ({"gradient_checkpointing": True}, {}),
        ({"rank": 4}, {"rank": 64}),
        ({"target_modules": "q_proj, v_proj"}, {}),
        ({"dropout": 0.0}, {"dropout": 0.1}),
        ({"machine": Machine(width=2)}, {"machine": Machine(width=4)}),
        ({"texts": TICKETS._replace(answer=2)}, {"texts": TICKETS._replace(answer=40)}),
    ],
)
def test_what_takes_less_memory(less: dict[str, Any], more: dict[str, Any]) -> None:
    assert _total("lora", **less) < _total("lora", **more)


def test_a_row_holds_no_more_than_the_budget() -> None:
    small = _total("lora", batch_size=16, accumulate_steps=4)
    assert _total("lora", batch_size=16, accumulate_steps=64) == small
    assert _total("lora", texts=TICKETS._replace(longest=4000.0), batch_size=16) > small


def test_full_tuning_is_spread_over_devices() -> None:
    method = methods.get("full")
    params = method.schema().model_copy(update={"devices": 4})
    base_model = BaseModel(shapes=SMOLLM2, quantization=None)
    found = forecast.memory(base_model, method, params, TICKETS, Machine(gpu=True))
    assert found.optimizer == 2 * 134515008 / 2**20


def test_as_many_checkpoints_as_are_kept_and_one_more() -> None:
    assert forecast.CHECKPOINTS == recorder.KEPT + 1


def _base(db: Session) -> BaseModel:
    return factories.base_model(db, shapes=SMOLLM2)


def _create(db: Session, base: BaseModel, **chosen: dict[str, Any]) -> list[Run]:
    made = experiments.create(
        db,
        name="One",
        base_model_id=base.id,
        dataset_id=factories.dataset(db).id,
        task="generation",
        template="Say it:\n{{input}}",
        labels=[],
        seed=1,
        methods=chosen or {"lora": {}},
    )
    return made.runs


def test_a_new_run_has_its_forecast(any_db: Session) -> None:
    (run,) = _create(any_db, _base(any_db), lora={"num_epochs": 2})
    found = run.forecast
    assert found["memory_mb"] == pytest.approx(sum(found["parts"].values()), abs=1)
    assert found["gpu_memory_mb"] == pytest.approx(sum(found["gpu_parts"].values()), abs=1)
    assert found["bytes"] > forecast.CHECKPOINTS * 12 * 4884480
    assert not found["measured"]
    (longer,) = _create(any_db, run.experiment.base_model, lora={"num_epochs": 20})
    assert longer.forecast["seconds"] > 2 * found["seconds"]
    assert longer.forecast["memory_mb"] == found["memory_mb"]


def test_time_is_told_from_runs_that_ended(any_db: Session) -> None:
    base = _base(any_db)
    (first,) = _create(any_db, base)
    before = first.forecast["seconds"]
    first.state, first.attempt, first.lease_until = "running", 1, 1.0
    any_db.commit()
    points.record(any_db, first.id, 1, [factories.measured(6, seconds=2000.0, tokens=2000)])
    runs.finish(any_db, first.id, 1, started_at=time.time() - 2100)
    (second,) = _create(any_db, base)
    assert second.forecast["measured"]
    assert second.forecast["seconds"] > 3 * before
    (other,) = _create(any_db, base, prompt_tuning={})
    assert not other.forecast["measured"]


def test_one_that_is_tried_again_is_forecast_again(db: Session) -> None:
    (run,) = _create(db, _base(db))
    run.forecast, run.state = {}, "failed"
    db.commit()
    assert runs.retry(db, run.id).forecast["memory_mb"] > 500


def test_without_shapes_there_is_none(db: Session) -> None:
    assert _create(db, factories.base_model(db))[0].forecast == {}


def test_a_machine_without_bf16_is_known_by_what_ran_on_it(db: Session) -> None:
    (run,) = _create(db, _base(db))
    run.figures, run.started_at = {"precision": "float32"}, time.time()
    db.commit()
    (later,) = _create(db, run.experiment.base_model)
    assert later.forecast["parts"]["weights"] == pytest.approx(
        2 * run.forecast["parts"]["weights"], abs=1
    )
    assert later.forecast["gpu_parts"]["weights"] == run.forecast["gpu_parts"]["weights"]
