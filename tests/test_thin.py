"""LoRA's dropout on packed rows: one mask of the shared prefix for all its examples, right on average."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app import grouping
from tests import tiny
from tests.engine import MACHINE, Setup, rows
from worker import attention, evaluate, lending, packing, thin
from worker.backbones import inner
from worker.packing import Packed

DRAWS = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model(tmp_path_factory.mktemp("thin"), initializer_range=0.15)


def dropping(folder: Path) -> Setup:
    """A model whose adapters add something: they begin at zero."""
    setup = Setup(folder, "lora", dropout=0.25)
    for name, value in setup.state.trained.items():
        if "lora_B" in name:
            value.data.normal_(generator=torch.Generator().manual_seed(len(name)), std=0.1)
    setup.model.train()
    return setup


def lost(setup: Setup, packed: list[Packed]) -> dict[int, float]:
    """The loss of each example of a step's rows, one row after the other."""
    lender = lending.between(packed)
    found: dict[int, float] = {}
    for row in packed:
        with torch.no_grad(), attention.packed(inner(setup.model), row.layout, lender):
            losses = evaluate.token_losses(setup.model, None, row, MACHINE)
        for index in row.examples.unique().tolist():
            found[index] = float(losses[row.examples == index].sum())
    return found


def test_dropout_of_a_packed_row_is_right_on_average_in_the_prefix_and_behind_it(
    folder: Path,
) -> None:
    setup = dropping(folder)
    (row,) = packing.pack(rows(6), 1024)
    assert row.layout is not None
    assert 1 < row.layout.prefix < row.tokens
    made: list[Tensor] = []
    # The first adapted layers: what they are given is the same each time, and they are linear in it.
    first = inner(setup.model).model.layers[0].self_attn
    for layer in (first.q_proj, first.v_proj):
        layer.register_forward_hook(lambda _layer, _given, out: made.append(out[0].clone()))

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        lost(setup, [row])
        both = torch.cat(made, dim=-1)
        made.clear()
        return both

    draws = torch.stack([drawn(seed) for seed in range(DRAWS)])
    setup.model.eval()
    expected = drawn(0)
    assert len(expected) == row.tokens
    error = draws.std(0) / DRAWS**0.5
    assert bool((error > 0).all())  # dropped at every place, of the prefix and of the examples
    off = (draws.mean(0) - expected) / error
    for part in (off[: row.layout.prefix], off[row.layout.prefix :]):
        assert float(part.abs().max()) < 5
        assert float(part.square().mean()) < 2  # 1, where nothing but chance is in it


@pytest.mark.parametrize(
    ("how", "count"),
    [({"budget": 1024}, 1), ({"budget": 1024, "pairs": True}, 2), ({"budget": 40}, 3)],
    ids=["in their row", "in the row beside theirs", "in a row of its own"],
)
def test_one_mask_of_the_prefix_serves_all_its_examples(
    folder: Path, how: dict[str, Any], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouping, "LEAST_LENT", 1)
    monkeypatch.setattr(grouping, "LEAST_PAIR", 1)
    setup = dropping(folder)
    packed = packing.pack(rows(1) * 24, lend=True, **how)
    assert len(packed) == count
    dropped = thin._dropped

    def of_prefix(size: int, seed: int, share: float) -> Tensor:
        """What is dropped of the prefix; the examples, alike else, draw masks of their own."""
        layout = attention._row.get()
        assert layout is not None
        places = dropped(size, seed, share)
        return places[places < size // layout.tokens * layout.first]

    monkeypatch.setattr(thin, "_dropped", of_prefix)
    torch.manual_seed(0)
    draws = [list(lost(setup, packed).values()) for _ in range(6)]
    for losses in draws:
        assert losses == pytest.approx([losses[0]] * 24, rel=1e-5)
    different = [losses[0] for losses in draws]
    assert max(different) > 1.01 * min(different)
