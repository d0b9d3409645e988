"""Two rows side by side: the same numbers as one after the other, whatever happens in a lane."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from app import methods, processes
from tests import tiny
from tests.engine import MACHINE, Setup, rows
from worker import evaluate, lanes, learn, packing, train

PAIRED = MACHINE._replace(threads=2)
METHODS = list(methods.METHODS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model(tmp_path_factory.mktemp("lanes"), initializer_range=0.15)


def trained(folder: Path, key: str, machine: object = PAIRED, **changes: object) -> Setup:
    setup = Setup(folder, key, machine, num_epochs=2, **changes)  # type: ignore[arg-type]
    setup.losses = [  # type: ignore[attr-defined]
        point.loss
        for point in setup.going(rows(48))
        if isinstance(point, train.Measured) and point.kind == "train"
    ]
    return setup


@pytest.mark.parametrize("slow", [0, 1])
@pytest.mark.parametrize("key", METHODS)
def test_the_result_is_the_same_bit_for_bit_whichever_lane_is_slower(
    folder: Path, key: str, slow: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"dropout": 0.2} if "lora" in key else {}
    changes |= (
        {"batch_size": 16, "accumulate_steps": 3, "num_virtual_tokens": 5}
        if key == "prompt_tuning"
        else {"batch_size": 16, "accumulate_steps": 3}
    )
    together = trained(folder, key, **changes)
    assert together.state.paired
    there = learn.Learner._there

    def late(*given: Any) -> Any:
        if lanes.number() == slow:
            time.sleep(0.02)
        made = there(*given)
        if lanes.number() == slow:
            time.sleep(0.02)
        return made

    monkeypatch.setattr(learn.Learner, "_there", late)
    apart = trained(folder, key, **changes)
    assert together.losses == apart.losses  # type: ignore[attr-defined]
    for name, value in together.state.trained.items():
        assert torch.equal(value, apart.state.trained[name]), name


def test_gradients_are_added_in_the_order_of_the_lanes() -> None:
    value = torch.nn.Parameter(torch.zeros(1))
    second_is_there = threading.Event()
    order: list[int] = []
    # Before the other lane is let go: what a thread does after that may come late.
    value.register_post_accumulate_grad_hook(lambda _: order.append(lanes._lane.get()))
    with lanes.in_order([value]) as ended:

        def work(number: int) -> None:
            if number == lanes.FIRST:
                second_is_there.wait(5)
            else:
                second_is_there.set()
            try:
                (value * (number + 1)).sum().backward()  # type: ignore[no-untyped-call]
            finally:
                ended()

        lanes.side_by_side(work, [0, 1], PAIRED)
    assert order == [1, 0]
    assert float(value.grad) == 3.0  # type: ignore[arg-type]


def test_a_lane_that_fails_keeps_nobody_waiting() -> None:
    value = torch.nn.Parameter(torch.zeros(1))
    with lanes.in_order([value]) as ended:

        def work(number: int) -> None:
            try:
                if number == lanes.FIRST:
                    raise MemoryError
                value.sum().backward()  # type: ignore[no-untyped-call]
            finally:
                ended()

        with pytest.raises(MemoryError):
            lanes.side_by_side(work, [0, 1], PAIRED)
    assert value.grad is not None
    value.grad = None
    value.sum().backward()  # type: ignore[no-untyped-call]  # no hook is left that waits


def test_dropout_of_the_models_own_is_left_alone(folder: Path) -> None:
    setup = Setup(folder, "full", PAIRED)
    assert setup.state.paired
    for module in setup.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    state = train.begin(setup.model, None, rows(), setup.params, PAIRED)
    assert not state.paired


def test_activation_checkpointing_is_done_row_by_row(folder: Path) -> None:
    assert not Setup(folder, "lora", PAIRED, gradient_checkpointing=True).state.paired
    assert not Setup(folder, "lora", MACHINE._replace(threads=1)).state.paired


def test_losses_are_the_same_side_by_side(folder: Path) -> None:
    setup = Setup(folder, "lora", PAIRED)
    many = rows(60)

    def measured(machine: object) -> list[evaluate.Loss]:
        some = evaluate.losses(setup.model, None, many, machine, plain=False)  # type: ignore[arg-type]
        return sorted(loss for losses in some for loss in losses)

    found, expected = measured(PAIRED), measured(MACHINE._replace(threads=1))
    assert [loss.example for loss in found] == list(range(60))
    for one, other in zip(found, expected, strict=True):
        assert one.total == pytest.approx(other.total, rel=1e-5)
    assert not setup.model.training or torch.is_grad_enabled()


class TestPairs:
    def test_rows_come_in_pairs_of_about_as_many_tokens(self) -> None:
        examples = rows(61)
        packed = packing.pack(examples, 1024, virtual=4, pairs=True)
        assert len(packed) == 2
        first, second = (row.tokens for row in packed)
        assert abs(first - second) < 12
        owners = torch.cat([row.examples for row in packed])
        assert sorted(set(owners.tolist())) == list(range(61))

    def test_both_share_the_budget(self) -> None:
        packed = packing.pack(rows(61), 200, pairs=True)
        assert len(packed) % 2 == 0
        assert len(packed) > 2
        assert max(row.tokens for row in packed) <= 100

    def test_too_little_or_too_long_a_beginning_stays_one_row(self) -> None:
        assert len(packing.pack(rows(4), 1024, pairs=True)) == 1
        assert len(packing.pack(rows(24), 1024, virtual=200, pairs=True)) == 1

    def test_a_text_longer_than_half_the_budget_goes_alone(self) -> None:
        long = packing.Row([*rows()[0].prompt_ids, *range(150)], [3])
        packed = packing.pack([*rows(30), long], 200, pairs=True)
        assert max(row.tokens for row in packed) <= 200


def test_what_is_started_has_the_better_allocator_where_there_is_one() -> None:
    import ctypes.util
    import subprocess

    child = processes.start("tests.mapped", stdout=subprocess.PIPE)
    said, _ = child.communicate(timeout=60)
    there = ctypes.util.find_library("jemalloc") is not None
    assert said.split()[0] == str(there)
    brief = processes.start("tests.mapped", environment=processes.brief(), stdout=subprocess.PIPE)
    told, _ = brief.communicate(timeout=60)
    assert ("dirty_decay_ms:-1" in told) == ("dirty_decay_ms:30000" in said) == there
