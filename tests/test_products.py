"""Frozen layers and their adapters as the studio computes them, beside PEFT's own way; what is kept for later."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from app import methods
from tests import tiny
from tests.engine import MACHINE, QUICK, rows
from worker import (
    attention,
    backbones,
    block_attention,
    evaluate,
    hardware,
    packing,
    products,
    remade,
    thrift,
    trained,
)
from worker.backbones import inner, num_virtual

HELD_NARROW = MACHINE._replace(dtype="bfloat16", products="float32")
NATIVE = MACHINE._replace(dtype="bfloat16", products="bfloat16")
EXACT = 1e-5  # norm of the difference over the norm
NARROW = 2e-2  # what is kept for the way back has eight bits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model(tmp_path_factory.mktemp("products"), initializer_range=0.15)


def trainable(
    folder: Path, key: str, machine: hardware.Hardware, monkeypatch: Any = None, **params: Any
) -> tuple[Any, Tensor | None]:
    """The method's model; with a patch, as transformers and PEFT compute it."""
    if monkeypatch:
        monkeypatch.setattr(products, "install", lambda *_: None)
        monkeypatch.setattr(trained, "install", lambda *_: None)
        monkeypatch.setattr(thrift, "install", lambda *_: None)
    method = methods.get(key)
    given = method.schema(**QUICK.get(key, {}) | params)
    model, soft_prefix = backbones.load_trainable(method, given, folder, 3, machine)
    for name, value in model.named_parameters():
        if (
            value.requires_grad and "lora_B" in name
        ):  # they begin at zero, and A would learn nothing
            value.data.normal_(generator=torch.Generator().manual_seed(len(name)), std=0.1)
    return model.train(), soft_prefix


def learned(
    model: Any, soft_prefix: Tensor | None, machine: hardware.Hardware, *, even: bool = False
) -> dict[str, Tensor]:
    """The loss of some examples, and every gradient."""
    virtual = num_virtual(soft_prefix)
    (row,) = packing.pack(rows(8), 1024, virtual, even=even)
    torch.manual_seed(0)  # for models with a dropout of their own
    with attention.packed(inner(model), row.layout):
        loss = evaluate.token_losses(model, soft_prefix, row, machine).sum()
        loss.backward()  # type: ignore[no-untyped-call]
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return {"loss": loss.detach()} | found


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The greatest difference of a tensor, relative to its norm."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected
    )


@pytest.mark.parametrize("key", ["prompt_tuning", "lora", "qlora", "full"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gpt2"])
def test_gradients_are_those_of_transformers_and_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, architecture: str
) -> None:
    folder = tiny.model(tmp_path / "model", architecture=architecture, initializer_range=0.15)
    no_chance = {"dropout": 0.0} if "lora" in key else {}
    found = learned(*trainable(folder, key, MACHINE, **no_chance), MACHINE)
    plain = learned(*trainable(folder, key, MACHINE, monkeypatch, **no_chance), MACHINE)
    assert apart(found, plain) < EXACT


@pytest.mark.parametrize("key", ["prompt_tuning", "lora", "full"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])  # by hand, and by autograd
def test_a_row_that_is_filled_up_teaches_the_same(
    tmp_path: Path, key: str, architecture: str
) -> None:
    folder = tiny.model(tmp_path / "model", architecture=architecture, initializer_range=0.15)
    no_chance = {"dropout": 0.0} if "lora" in key else {}
    full = learned(*trainable(folder, key, MACHINE, **no_chance), MACHINE, even=True)
    usual = learned(*trainable(folder, key, MACHINE, **no_chance), MACHINE)
    assert apart(full, usual) < EXACT


@pytest.mark.parametrize("key", ["prompt_tuning", "lora", "qlora"])
def test_narrow_weights_are_multiplied_wide(
    folder: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    no_chance = {"dropout": 0.0} if "lora" in key else {}
    model, soft_prefix = trainable(folder, key, HELD_NARROW, **no_chance)
    frozen = [value for value in model.parameters() if not value.requires_grad and value.ndim == 2]
    assert {value.dtype for value in frozen} <= {torch.bfloat16, torch.uint8}
    found = learned(model, soft_prefix, HELD_NARROW)
    assert found["loss"].dtype is torch.float32
    if key == "qlora":
        return  # other weights are quantized: those that bfloat16 has rounded
    plain, its_prefix = trainable(folder, key, MACHINE, monkeypatch, **no_chance)
    begun = dict(model.named_parameters())
    for name, value in plain.named_parameters():
        trained = value.requires_grad
        value.data = begun[name].data.clone() if trained else value.data.bfloat16().float()
    expected = learned(plain, its_prefix, MACHINE)
    assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=EXACT)
    assert EXACT < apart(found, expected) < NARROW


def test_dropout_is_right_on_average(folder: Path) -> None:
    model, _ = trainable(folder, "lora", MACHINE, dropout=0.25)
    query = next(m for name, m in model.named_modules() if name.endswith("0.self_attn.q_proj"))
    values = torch.randn(64, query.in_features, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    draws = torch.stack([query(values.clone()) for _ in range(800)])
    model.eval()
    expected = query(values)
    model.train()
    adapter = expected - query.base_layer(values)
    assert float((draws.mean(0) - expected).detach().norm() / adapter.norm()) < 0.05
    assert float(draws.std(0).mean()) > 0


def test_layers_with_the_same_input_share_their_dropout_and_each_step_draws_anew(
    folder: Path,
) -> None:
    model, _ = trainable(folder, "lora", MACHINE, dropout=0.5)
    layers = dict(model.named_modules())
    path = next(name for name in layers if name.endswith("0.self_attn"))
    query, key, value = (layers[f"{path}.{name}_proj"] for name in "qkv")
    for layer in (query, key, value):
        layer.lora_A["default"].weight.data = torch.ones_like(layer.lora_A["default"].weight)
    values = torch.ones(4, query.in_features)
    thin = query.forward.thin
    seen = [thin(layer, values)[:, :1] for layer in (query, key, value)]
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    assert thin.last.given is None
    assert not torch.equal(thin(query, values)[:, :1], seen[0])


def test_a_large_head_is_widened_in_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = learned(*trainable(folder, "lora", MACHINE, dropout=0.0), MACHINE)
    monkeypatch.setattr(products, "PIECE", 1000)
    pieces = learned(*trainable(folder, "lora", MACHINE, dropout=0.0), MACHINE)
    assert apart(pieces, whole) < EXACT


@pytest.mark.parametrize("key", ["full", "lora", "prompt_tuning"])
def test_products_in_bf16_are_as_near_as_those_of_autocast(
    folder: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_chance = {"dropout": 0.0} if "lora" in key else {}
    ours = learned(*trainable(folder, key, NATIVE, **no_chance), NATIVE)
    monkeypatch.setattr(block_attention, "suits", lambda *_: False)
    usual = learned(*trainable(folder, key, NATIVE, monkeypatch, **no_chance), NATIVE)
    exact = learned(*trainable(folder, key, MACHINE, monkeypatch, **no_chance), MACHINE)
    far, as_usual = (
        sum(apart({name: found[name]}, {name: exact[name]}) for name in exact)
        for found in (ours, usual)
    )
    assert 0 < far < 1.5 * as_usual  # which of the two is nearer is luck


@pytest.mark.parametrize("narrow", [HELD_NARROW, NATIVE])
def test_little_is_kept_for_the_way_back(
    folder: Path, narrow: hardware.Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept(model: Any, soft_prefix: Tensor | None) -> int:
        sizes: dict[int, int] = {}
        weights = {value.untyped_storage().data_ptr() for value in model.parameters()}

        def note(value: Tensor) -> Tensor:
            storage = value.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(value)
            return value

        alive: list[Tensor] = []
        before = remade.Call.__init__

        def begin(call: remade.Call, *given: Any) -> None:
            before(call, *given)
            for value in call.held:
                note(value)

        with (
            pytest.MonkeyPatch.context() as patch,
            torch.autograd.graph.saved_tensors_hooks(note, lambda value: value),
        ):
            patch.setattr(remade.Call, "__init__", begin)
            learned(model, soft_prefix, narrow)
        return sum(sizes.values())

    thrifty = kept(*trainable(folder, "lora", narrow, dropout=0.1))
    usual = MACHINE if narrow is HELD_NARROW else NATIVE
    plain = kept(*trainable(folder, "lora", usual, monkeypatch, dropout=0.1))
    assert thrifty < 0.6 * plain


def test_what_can_be_made_again_is_not_kept() -> None:
    values = torch.randn(3, 8, requires_grad=True)
    layers: list[Any] = [torch.nn.Linear(8, 5) for _ in range(2)]
    times: list[int] = []

    def square(given: Tensor) -> Tensor:
        times.append(1)
        return given * given

    through = thrift.Again(square, [], torch.float32)(values)
    made = [trained.Trained(layer, MACHINE)(through) for layer in layers]
    seen = weakref.ref(through.untyped_storage())
    del through
    assert seen() is None
    sum(one.sum() for one in made).backward()  # type: ignore[union-attr]
    assert len(times) == 2  # on the way there, and once on the way back
    found = values.grad, *(layer.weight.grad for layer in layers)
    values.grad = None
    for layer in layers:
        layer.weight.grad = None
    sum(layer(values * values).sum() for layer in layers).backward()
    for one, other in zip(
        found, (values.grad, *(layer.weight.grad for layer in layers)), strict=True
    ):
        assert torch.allclose(one, other)


@pytest.mark.parametrize("tied", [True, False])
def test_words_that_the_head_shares_have_one_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    folder = tiny.model(tmp_path, tie_word_embeddings=tied, initializer_range=0.15)
    model, _ = trainable(folder, "full", MACHINE)
    words = model.get_input_embeddings()
    assert words.sparse is tied
    found = learned(model, None, MACHINE)
    assert not words.weight.grad.is_sparse  # the optimizer takes no other
    assert apart(found, learned(*trainable(folder, "full", MACHINE, monkeypatch), MACHINE)) < EXACT


def test_only_blocks_that_do_the_same_are_replaced(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    first, second = (layer.mlp for layer in model.model.layers[:2])

    class Other(type(first)):  # type: ignore[misc]
        def forward(self, values: Tensor) -> Tensor:
            made: Tensor = super().forward(values) * 2
            return made

    second.__class__ = Other
    thrift.install(model, MACHINE)
    assert isinstance(first.forward, thrift._Gated)
    assert not isinstance(second.forward, thrift._Gated)
