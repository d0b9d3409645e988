"""Training on packed rows is exact: losses and gradients equal those of each example alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app import grouping, methods
from tests import tiny
from tests.engine import MACHINE
from worker import (
    attention,
    backbones,
    learn,
    obstacles,
    packing,
    products,
    thrift,
    trained,
)
from worker.packing import Row

CLOSE = 1e-5
NOISE = 1e-6  # of the whole gradient's norm: a smaller one is zero but for rounding

# Attention far from even, so that who sees whom matters; windows shorter than a row.
SHARP = {"initializer_range": 0.2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": SHARP,
    "gpt2": SHARP | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "qwen3": SHARP | {"head_dim": 16},
    "phi3": SHARP | {"resid_pdrop": 0.0},
    "mistral": SHARP | {"sliding_window": 9},
    "gemma2": SHARP | {"head_dim": 16, "sliding_window": 9, "attn_logit_softcapping": 2.0},
    "gemma3_text": SHARP
    | {"head_dim": 16, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": SHARP
    | {
        "embedding_multiplier": 3.0,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
}
PREFIXES = {"none": 0, "one token": 1, "short": 4, "long": 23}


@pytest.fixture(autouse=True)
def all_lend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefixes this short would not be worth a row of their own."""
    monkeypatch.setattr(grouping, "LEAST_LENT", 1)
    monkeypatch.setattr(grouping, "LEAST_PAIR", 1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower with several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model of each architecture."""
    top = tmp_path_factory.mktemp("architectures")
    return {
        name: tiny.model(top / name, architecture=name, **changes)
        for name, changes in ARCHITECTURES.items()
    }


def examples(prefix: int, count: int = 7) -> list[Row]:
    """Examples that share just `prefix` tokens, of many lengths."""
    draw = torch.Generator().manual_seed(prefix)

    def tokens(number: int) -> list[int]:
        return torch.randint(3, 250, (number,), generator=draw).tolist()

    common = tokens(prefix)
    return [
        Row([*common, 3 + index, *tokens(index * 2 % 5)], [*tokens(1 + index % 3), 2])
        for index in range(count)
    ]


def tuned(
    folder: Path, key: str, theirs: pytest.MonkeyPatch | None = None, **changes: Any
) -> tuple[Any, Tensor | None]:
    """The model ready to be trained by that method, moved away from where it starts.

    `theirs`: as transformers and PEFT compute it, with nothing of the studio in it.
    """
    if theirs:
        for module in (products, trained, thrift):
            theirs.setattr(module, "install", lambda *_: None)
    method = methods.get(key)
    if key in ("lora", "qlora"):
        changes["dropout"] = 0.0
    params = method.schema(**changes)
    model, soft_prefix = backbones.load_trainable(method, params, folder, 3, MACHINE)
    if key != "full":
        torch.manual_seed(5)  # adapters start at zero, where half of the gradients are none
        for value in model.parameters():
            if value.requires_grad:
                value.data.add_(0.05 * torch.randn_like(value))
    return model.train(), soft_prefix


def alone(
    model: Any, soft_prefix: Tensor | None, rows: list[Row]
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients the plain way: one example at a time, the model's own attention."""
    backbone = backbones.inner(model)
    before = backbone.config._attn_implementation
    backbone.set_attn_implementation("eager")
    model.zero_grad()
    targets = sum(len(row.answer_ids) for row in rows)
    total = 0.0
    for row in rows:
        ids = torch.tensor([[*row.prompt_ids, *row.answer_ids]])
        embedded = backbone.get_input_embeddings()(ids)
        if soft_prefix is not None:
            embedded = torch.cat((soft_prefix[None], embedded), dim=1)
        logits = backbone(inputs_embeds=embedded, use_cache=False).logits
        count = len(row.answer_ids)
        loss = torch.nn.functional.cross_entropy(
            logits[0, -count - 1 : -1], ids[0, -count:], reduction="sum"
        )
        (loss / targets).backward()
        total += float(loss.detach()) / targets
    backbone.set_attn_implementation(before)
    return total, gradients(model)


def together(
    model: Any,
    soft_prefix: Tensor | None,
    rows: list[Row],
    budget: int,
    *,
    plain: bool = False,
    lend: bool = True,
    pairs: bool = False,
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the packed rows, as training takes them."""
    model.zero_grad()
    targets = sum(len(row.answer_ids) for row in rows)
    virtual = backbones.num_virtual(soft_prefix)
    packed = packing.pack(rows, budget, virtual, plain=plain, lend=lend, pairs=pairs)
    assert len(packed) > 1 or not pairs  # else no lane would be beside another
    parts = [learn.Part(row, 1 / targets, 1) for row in packed]
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    learner = learn.Learner(model, soft_prefix, trained, MACHINE._replace(threads=2))
    total = sum(loss for loss, _ in learner.step(parts, paired=pairs))
    return total, gradients(model)


def gradients(model: Any) -> dict[str, Tensor]:
    return {
        name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad
    }


def check(found: tuple[float, dict[str, Tensor]], true: tuple[float, dict[str, Tensor]]) -> None:
    assert abs(found[0] - true[0]) <= CLOSE * true[0]
    assert found[1].keys() == true[1].keys()
    whole = torch.stack([gradient.norm() for gradient in true[1].values()]).norm()
    for name, gradient in true[1].items():
        # Each by its own norm; one that is nothing but rounding, as of a bias of keys, by the whole's.
        scale = gradient.norm() if gradient.norm() > NOISE * whole else whole
        assert (found[1][name] - gradient).norm() <= CLOSE * scale, name


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES.keys())
@pytest.mark.parametrize("key", methods.METHODS)
def test_packed_rows_are_exact_for_every_method(
    folders: dict[str, Path],
    key: str,
    prefix: int,
    checkpointing: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, soft = tuned(folders["llama"], key, gradient_checkpointing=checkpointing)
    rows = examples(prefix, 12)
    true = alone(*tuned(folders["llama"], key, monkeypatch), rows)
    check(together(model, soft, rows, budget=1000), true)  # all in one row
    check(together(model, soft, rows, budget=prefix + 35), true)  # gathered from several
    check(together(model, soft, rows, budget=prefix + 35, lend=False), true)
    if not checkpointing:
        check(together(model, soft, rows, budget=1000, pairs=True), true)  # two at the same time
        check(together(model, soft, rows, budget=50, pairs=True), true)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("key", methods.METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_learns_by_every_method_what_it_would_learn_elsewhere(
    folders: dict[str, Path],
    architecture: str,
    key: str,
    checkpointing: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = folders[architecture]
    model, soft = tuned(folder, key, gradient_checkpointing=checkpointing)
    plain, its_soft = tuned(folder, key, monkeypatch)
    assert obstacles.find(model, soft, examples(12), MACHINE) == ""
    for prefix in (0, 12):
        rows = examples(prefix)
        true = alone(plain, its_soft, rows)
        check(together(model, soft, rows, budget=1000), true)  # all in one row
        check(together(model, soft, rows, budget=60), true)  # gathered from several
        if not checkpointing:
            check(together(model, soft, rows, budget=1000, pairs=True), true)  # two at a time
            check(together(model, soft, rows, budget=50, pairs=True), true)


@pytest.mark.parametrize("key", ["full", "prompt_tuning"])
def test_plain_rows_are_exact_too(
    folders: dict[str, Path], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, soft = tuned(folders["mistral"], key)
    rows = examples(12)
    true = alone(*tuned(folders["mistral"], key, monkeypatch), rows)
    check(together(model, soft, rows, budget=1000, plain=True), true)
    check(together(model, soft, rows, budget=100, plain=True), true)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_long_examples_are_exact_too(
    folders: dict[str, Path], architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Longer than what is weighed in plain products: the fused kernel has a mask of its own.
    draw = torch.Generator().manual_seed(1)
    common = list(range(10, 30))
    rows = [
        Row([*common, *torch.randint(30, 250, (length,), generator=draw).tolist()], [7, 2])
        for length in (attention.SHORT + 20, 40, attention.SHORT + 3)
    ]
    model, _ = tuned(folders[architecture], "full")
    plain, _ = tuned(folders[architecture], "full", monkeypatch)
    check(together(model, None, rows, budget=1000), alone(plain, None, rows))
