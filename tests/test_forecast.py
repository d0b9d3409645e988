"""Forecasts: arithmetic on shapes, against what real runs took, and stored with each new run."""

import random
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session

from app import (
    arithmetic,
    datasets,
    draws,
    experiments,
    lengths,
    methods,
    points,
    prompts,
    runs,
    storage,
)
from app.arithmetic import Machine
from app.lengths import Lengths
from app.tables import BaseModel, Run
from tests import factories, tiny
from worker import packing, recorder

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
TICKETS = Lengths(((90, 3),) * 60 + ((138, 3),) * 2, ((138, 3),), 53)


def _memory(
    key: str, texts: Lengths = TICKETS, machine: Machine = CPU, **params: Any
) -> arithmetic.Memory:
    method = methods.get(key)
    base_model = BaseModel(shapes=SMOLLM2, quantization=None)
    checked = method.schema(**params)
    steps, _ = draws.drawn(method, checked, texts, 189, machine.token_budget)
    return arithmetic.memory(base_model, method, checked, steps, machine)


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
        (
            {"dropout": 0.0, "machine": Machine(gpu=True)},
            {"dropout": 0.1, "machine": Machine(gpu=True)},
        ),
        ({"machine": Machine(width=2)}, {"machine": Machine(width=4)}),
        ({"texts": TICKETS}, {"texts": TICKETS._replace(rows=((90, 40),) * 62)}),
    ],
)
def test_what_takes_less_memory(less: dict[str, Any], more: dict[str, Any]) -> None:
    assert _total("lora", **less) < _total("lora", **more)


def test_a_row_holds_no_more_than_the_budget() -> None:
    same = Lengths(((90, 3),) * 300, (), 53)
    # Three updates each: with more of them memory creeps up.
    small = _total("lora", texts=same, batch_size=16, accumulate_steps=6, num_epochs=1)
    assert _total("lora", texts=same, batch_size=16, accumulate_steps=18, num_epochs=3) == small
    longer = Lengths(((4000, 3),) * 300, (), 53)
    assert _total("lora", texts=longer, batch_size=16, max_length=4096) > small


@pytest.mark.parametrize("gpu", [False, True])
def test_a_prefix_in_a_row_of_its_own_is_part_of_the_forecast(gpu: bool) -> None:
    long = Lengths(((900, 60),) * 99, (), 300)
    (step, *_), _ = draws.drawn(
        methods.get("lora"), methods.get("lora").schema(max_length=1024), long, 189, 2048
    )
    assert step[0] == draws.Row(300, (), 0)
    machine = Machine(gpu=gpu, token_budget=2048)
    unshared = _total("lora", texts=long._replace(shared=0), machine=machine, max_length=1024)
    shared = _total("lora", texts=long, machine=machine, max_length=1024)
    assert 0.8 * unshared < shared < 1.2 * unshared  # full rows, either way


def test_writing_takes_longer_than_reading_and_longer_still_from_4_bits() -> None:
    def seconds(key: str, answer: int, looks: int = 10, **how: Any) -> float:
        base_model, method = BaseModel(shapes=SMOLLM2, quantization=None), methods.get(key)
        texts = Lengths(((100 - answer, answer),) * 9, (), 5)
        params = method.schema(**how)
        return arithmetic.other_seconds(base_model, method, params, texts, (10, 10), looks, CPU)

    short, long = (seconds("lora", answer) for answer in (5, 50))
    assert seconds("qlora", 50) - seconds("qlora", 5) > 1.5 * (long - short) > 0
    assert seconds("lora", 5, looks=2) < short
    assert seconds("lora", 5, keep_by="score") > 1.5 * short  # each look answers them, too


def test_logits_of_a_long_row_are_there_in_pieces() -> None:
    def more(key: str, answer: int, **how: Any) -> float:
        """What a row of long answers takes beyond one of as many tokens with short ones."""
        long, short = (Lengths(((800 - size, size),) * 99, (), 5) for size in (answer, 3))
        how |= {"batch_size": 1, "max_length": 1024}
        return _memory(key, texts=long, **how).activations - _total_activations(key, short, how)

    piece = 8 * 2 * arithmetic.LOGITS[False] / 2**20
    assert more("lora", 700) == more("lora", 780) == pytest.approx(piece, rel=0.02)
    assert more("lora", 100) < 0.7 * piece
    assert more("full", 780, devices=2) > 1.1 * piece  # spread over devices, and never taken apart


def _total_activations(key: str, texts: Lengths, how: dict[str, Any]) -> float:
    return _memory(key, texts=texts, **how).activations


def test_full_tuning_is_spread_over_devices() -> None:
    one, four = (_memory("full", devices=count) for count in (1, 4))
    assert four.optimizer == one.optimizer / 4 == 2 * 134515008 / 2**20


@pytest.mark.parametrize(
    ("budget", "virtual"), [(1024, 0), (150, 0), (150, 20), (150, 90), (10, 3)]
)
def test_rows_are_packed_as_the_worker_packs_them(budget: int, virtual: int) -> None:
    drawing = random.Random(budget)
    texts = [
        packing.Row([1, 2, 3, *drawing.choices(range(5, 60), k=size)], [*range(1, 2 + size % 4)])
        for size in drawing.choices(range(2, 60), k=24)
    ]
    shared = packing.shared_prefix(texts)
    pairs = [(len(one.prompt_ids), len(one.answer_ids)) for one in texts]
    mine = draws.packed(pairs, shared, virtual, budget)
    theirs = packing.pack(texts, budget, virtual, lend=True)
    assert [row.places for row in mine] == [row.tokens for row in theirs]
    assert [row.targets for row in mine] == [len(row.targets) for row in theirs]
    assert [len(row.lengths) for row in mine] == [
        sum(block.examples for block in row.layout.blocks) for row in theirs
    ]  # type: ignore[union-attr]
    assert [max(row.lengths, default=0) for row in mine] == [row.layout.longest for row in theirs]  # type: ignore[union-attr]


def test_lengths_are_counted_as_the_model_reads(db: Session, tiny_model: Path) -> None:
    base, data = factories.base_model(db), factories.dataset(db)
    estimated = lengths.of(base, data, factories.TEMPLATE, factories.LABELS)
    assert not estimated.counted  # its tokenizer is not here
    tiny.tokenizer(storage.base_model_folder(base.id))
    prompts.formatter.cache_clear()
    found = lengths.of(base, data, factories.TEMPLATE, factories.LABELS)
    formatter = prompts.formatter(storage.base_model_folder(base.id))
    rows = [
        formatter.row(factories.TEMPLATE, factories.LABELS, row, 8192)
        for row in datasets.rows(data)
    ]
    assert list(found.rows) == [(len(row.prompt_ids), len(row.answer_ids)) for row in rows]
    assert found.shared == packing.shared_prefix(rows)
    assert sum(found.longest[0]) == max(found.totals())


def test_as_many_checkpoints_as_are_kept_and_one_more() -> None:
    assert arithmetic.CHECKPOINTS == recorder.KEPT + 1


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
    assert found["bytes"] > arithmetic.CHECKPOINTS * 12 * 4884480
    assert not found["measured"]
    (longer,) = _create(any_db, run.experiment.base_model, lora={"num_epochs": 20})
    short, long = (
        told["train_seconds"] - arithmetic.BEGIN_SECONDS for told in (found, longer.forecast)
    )
    assert long == pytest.approx(10 * short, rel=0.05)
    assert longer.forecast["seconds"] > found["seconds"]
    assert longer.forecast["gpu_memory_mb"] == found["gpu_memory_mb"]
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
