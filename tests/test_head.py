"""Logits in pieces: the same losses and gradients as all at once, and never all logits together."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app import methods
from app.methods import lora
from tests import tiny
from tests.engine import MACHINE, Setup, rows
from tests.test_attention import ARCHITECTURES, SHARP, check, examples, together, tuned
from worker import attention, backbones, evaluate, fused, head, learn, packing

EXTRA: dict[str, dict[str, Any]] = {
    "gemma2": ARCHITECTURES["gemma2"] | {"final_logit_softcapping": 1.5},
    "tied": SHARP | {"tie_word_embeddings": True},
    "opt": SHARP | {"ffn_dim": 64, "word_embed_proj_dim": tiny.WIDTH, "dropout": 0.0},
    "qwen3_moe": SHARP
    | {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("heads")
    return {
        name: tiny.model(top / name, architecture="llama" if name == "tied" else name, **changes)
        for name, changes in (ARCHITECTURES | EXTRA).items()
    }


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of the pieces that are made from now on: each has room for three targets."""
    monkeypatch.setattr(head, "most_logits", lambda *_: 3 * 259)
    seen: list[int] = []
    whole = head.Head.__call__

    def note(self: head.Head, hidden: Tensor) -> Tensor:
        made = whole(self, hidden)
        seen.append(len(made))
        return made

    monkeypatch.setattr(head.Head, "__call__", note)
    return seen


@pytest.mark.parametrize("key", methods.METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES | EXTRA)
def test_pieces_are_exact_for_every_head(
    folders: dict[str, Path], architecture: str, key: str, request: pytest.FixtureRequest
) -> None:
    model, soft = tuned(folders[architecture], key)
    plain = architecture == "opt"
    some = examples(12)
    true = together(model, soft, some, 1000, plain=plain)
    widths = request.getfixturevalue("widths")
    check(together(model, soft, some, 1000, plain=plain), true)
    check(together(model, soft, some, 60, plain=plain), true)
    if architecture == "opt":  # its layers cannot be taken from its head: whole as before
        assert not widths
    else:
        assert max(widths) <= 3


@pytest.mark.parametrize("narrow", [False, True], ids=["wide", "narrow"])
def test_a_head_with_an_adapter_is_exact_too(
    folders: dict[str, Path],
    narrow: bool,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.setattr(lora, "_check", lambda *_: None)
    machine = MACHINE._replace(dtype="bfloat16", products="float32") if narrow else MACHINE
    monkeypatch.setattr("tests.test_attention.MACHINE", machine)
    model, soft = tuned(folders["granite"], "lora", target_modules="q_proj, lm_head")
    true = together(model, soft, examples(12), 1000)
    assert sum("lm_head" in name for name in true[1]) == 2
    widths = request.getfixturevalue("widths")
    check(together(model, soft, examples(12), 1000), true)
    assert max(widths) == 3


def test_held_out_losses_are_the_same(tiny_model: Path, request: pytest.FixtureRequest) -> None:
    setup = Setup(tiny_model, "full")

    def found(plain: bool) -> list[evaluate.Loss]:
        some = evaluate.losses(setup.model, None, rows(20), MACHINE, plain=plain)
        return sorted(loss for losses in some for loss in losses)

    true = found(plain=False)
    widths = request.getfixturevalue("widths")
    for plain in (False, True):
        assert [one.total for one in found(plain)] == pytest.approx([one.total for one in true])
    assert max(widths) == 3


def test_losses_that_count_differently_move_no_head_that_is_trained(
    tiny_model: Path, widths: list[int]
) -> None:
    weights = torch.arange(1.0, 22.0)
    (row,) = packing.pack(rows(7), 1000, 6)
    frozen = Setup(tiny_model, "prompt_tuning")
    with attention.packed(backbones.inner(frozen.model), row.layout):
        lost = evaluate.token_losses(frozen.model, frozen.soft_prefix, row, MACHINE)
        (lost * weights).sum().backward()
    assert frozen.soft_prefix is not None
    assert frozen.soft_prefix.grad is not None
    (row,) = packing.pack(rows(7), 1000)
    trained = Setup(tiny_model, "full")
    with attention.packed(trained.model, row.layout):
        lost = evaluate.token_losses(trained.model, None, row, MACHINE)
        with pytest.raises(NotImplementedError, match="count the same"):
            (lost * weights).sum().backward()


def test_no_lane_waits_for_the_other_on_its_way_to_the_loss(
    tiny_model: Path, widths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(tiny_model, "full")
    parts = [learn.Part(row, 1.0, 1) for row in packing.pack(rows(16), 60)[:2]]
    both = threading.Barrier(2, timeout=20)
    lost = evaluate.token_losses

    def meet(*given: Any) -> Tensor:
        made = lost(*given)
        both.wait()  # neither has begun its way back
        return made

    monkeypatch.setattr(evaluate, "token_losses", meet)
    machine = MACHINE._replace(threads=2)
    learner = learn.Learner(setup.model, None, setup.state.trained, machine)
    assert [count for _, count in learner.step(parts, paired=True)] == [2]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite", "gpt2", "tied"])
def test_only_a_head_that_is_one_product_is_left_to_a_fused_kernel(
    folders: dict[str, Path], architecture: str
) -> None:
    model, _ = tuned(folders[architecture], "full")
    outputs = model.base_model(torch.tensor([[5, 6]]))
    plain = architecture not in ("gemma2", "granite")
    made = head.Head(model, outputs, MACHINE)
    assert fused.is_plain(made) is plain
    assert not fused.suits(made)  # no GPU


@pytest.mark.gpu
@pytest.mark.skipif(
    not (torch.cuda.is_available() and fused.is_installed()), reason="not run: no GPU, or no Liger"
)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_the_fused_kernel_gives_what_pieces_give(folders: dict[str, Path], trained: bool) -> None:
    by_kernel(folders["llama"], "cuda", trained)


def by_kernel(folder: Path, device: str, trained: bool) -> None:
    """Compare the kernel with our own pieces."""
    machine = MACHINE._replace(device=device)
    model, _ = tuned(folder, "full")
    model = model.to(device).requires_grad_(trained)
    made = head.Head(model, model.base_model(torch.tensor([[5, 6]], device=device)), machine)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, tiny.WIDTH, generator=draw).to(device)
    targets = torch.randint(0, 259, (40,), generator=draw).to(device)
    theirs = fused.pieces(made, hidden, targets, learns=True)
    ours = head._pieces(made, hidden, targets, learns=True)
    assert torch.allclose(theirs[0], ours[0], rtol=1e-4)
    assert (theirs[1] - ours[1]).norm() < 1e-3 * ours[1].norm()  # type: ignore[operator, union-attr]
    assert len(theirs[2]) == len(ours[2]) == int(trained)
    for one, other in zip(theirs[2], ours[2], strict=True):
        assert (one - other).norm() < 1e-3 * other.norm()  # type: ignore[operator, union-attr]
    assert torch.allclose(fused.pieces(made, hidden, targets, learns=False)[0], ours[0], rtol=1e-4)
