"""A step's shared prefix goes through the model once: who lends it, who borrows it, and who fails meanwhile."""

from pathlib import Path
from typing import Any

import pytest
import torch

from app import grouping
from tests import tiny
from tests.engine import MACHINE, Setup, rows
from worker import evaluate, learn, lending, packing
from worker.backbones import inner, num_virtual

PAIRED = MACHINE._replace(threads=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model(tmp_path_factory.mktemp("lending"), initializer_range=0.15)


def parts(setup: Setup, budget: int, *, pairs: bool, count: int = 48) -> list[learn.Part]:
    virtual = num_virtual(setup.soft_prefix)
    packed = packing.pack(rows(count), budget, virtual, pairs=pairs, lend=True)
    return [learn.Part(row, 0.01, 1) for row in packed]


@pytest.mark.parametrize("pairs", [False, True])
def test_the_prefix_is_read_once_in_a_step_however_many_rows_it_has(
    folder: Path, pairs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouping, "LEAST_LENT", 1)
    setup = Setup(folder, "full", PAIRED)
    step = parts(setup, 200, pairs=pairs)
    assert len(step) > 2
    shared = rows(2)[0].prompt_ids[: packing.shared_prefix(rows(48))]
    assert step[0].row.input_ids[0].tolist() == list(shared)
    own = sum(len(one.prompt_ids) + len(one.answer_ids) - 1 - len(shared) for one in rows(48))
    read: list[int] = []
    words = inner(setup.model).get_input_embeddings()
    words.register_forward_hook(lambda _module, given, _made: read.append(given[0].numel()))
    learner = learn.Learner(setup.model, None, setup.state.trained, PAIRED)
    assert sum(count for _, count in learner.step(step, paired=pairs)) == len(step)
    assert sum(read) == len(shared) + own


def test_two_rows_share_a_prefix_that_lies_in_the_first() -> None:
    first, second = packing.pack(rows(40), 1024, virtual=3, pairs=True, lend=True)
    assert first.layout is not None
    assert second.layout is not None
    assert not first.layout.borrows
    assert second.layout.borrows
    assert first.position_ids[0, 0] == 0
    assert second.position_ids[0, 0] == first.layout.prefix == second.layout.prefix
    assert sorted({*first.examples.tolist(), *second.examples.tolist()}) == list(range(40))


@pytest.mark.parametrize("failing", [0, 1])
def test_a_row_that_fails_says_why_and_keeps_nobody_waiting(
    folder: Path, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(folder, "lora", PAIRED)
    step = parts(setup, 1024, pairs=True)
    assert len(step) == 2
    lost = evaluate.token_losses

    def broken(model: Any, soft_prefix: Any, row: Any, machine: Any) -> Any:
        if bool(row.layout.borrows) == bool(failing):
            raise MemoryError("no room")
        return lost(model, soft_prefix, row, machine)

    monkeypatch.setattr(evaluate, "token_losses", broken)
    learner = learn.Learner(setup.model, None, setup.state.trained, PAIRED)
    with pytest.raises(MemoryError):
        list(learner.step(step, paired=True))


def test_gradients_come_back_from_every_row(folder: Path) -> None:
    lender = lending.Lender(awaited=False)
    keys, values = (torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(2))
    going = lender.lend("layer", keys, values, 3)
    for times in (1.0, 2.0):
        borrowed = lender.borrow("layer")
        assert torch.equal(borrowed[0], keys[:, :, :3])
        (times * (borrowed[0].sum() + borrowed[1].sum())).backward()
    sum(part.sum() for part in going).backward()  # type: ignore[union-attr]
    for part in (keys, values):
        assert part.grad is not None
        assert part.grad[0, 0, :, 0].tolist() == [4.0, 4.0, 4.0, 1.0, 1.0]
