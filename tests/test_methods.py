"""Each method does what its name says: what moves, what stays, what is saved and loaded again."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from app import methods, storage
from app.errors import Invalid
from tests import tiny
from tests.engine import MACHINE, NARROW, QUICK, Setup, rows, same
from worker import backbones, generate, hardware

NAME = "somebody/some-model"
PROMPT = list(rows()[1].prompt_ids)
ADAPTERS = ["prompt_tuning", "lora", "qlora"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers are far from even."""
    return tiny.model(tmp_path_factory.mktemp("methods"), initializer_range=0.15)


def base(folder: Path, key: str, machine: hardware.Hardware = MACHINE) -> Any:
    method = methods.get(key)
    return backbones.load_base(method, method.schema(**QUICK.get(key, {})), folder, machine)


def logits(model: Any, soft_prefix: Tensor | None) -> Tensor:
    """What the model says after the prompt, computed as it is for answers."""
    return generate.read(model, soft_prefix, torch.tensor([PROMPT]))[0]


def answer(model: Any, soft_prefix: Tensor | None) -> list[int]:
    stream = generate.stream(model, soft_prefix, PROMPT, {2}, temperature=0, max_tokens=10, seed=0)
    return list(stream)


def saved(setup: Setup, folder: Path, into: Path) -> tuple[Any, Tensor | None]:
    """What was tuned, saved and loaded anew."""
    backbones.save_tuned(
        setup.model, into, base_name=NAME, base_folder=folder, machine=setup.machine
    )
    return backbones.load_tuned(setup.method, setup.params, folder, into, setup.machine)


def test_there_are_four_methods_in_order_of_their_effort() -> None:
    assert list(methods.METHODS)[:4] == ["prompt_tuning", "lora", "qlora", "full"]  # others follow
    with pytest.raises(Invalid, match=r"There is no method 'fifth'\. Choose from: prompt_tuning"):
        methods.get("fifth")


@pytest.mark.parametrize("machine", [MACHINE, NARROW], ids=["float32", "bfloat16"])
def test_what_moves_and_what_stays(folder: Path, machine: hardware.Hardware) -> None:
    moving = {
        "prompt_tuning": ["prompt_encoder.default.embedding.weight"],
        "lora": ["lora_A", "lora_B"],
        "qlora": ["lora_A", "lora_B"],
        "full": [""],
    }
    for key, parts in moving.items():
        setup = Setup(folder, key, machine)
        before = setup.values()
        setup.points()
        after = setup.values()
        for name, value in before.items():
            moves = any(part in name for part in parts)
            assert torch.equal(value, after[name]) is not moves, (key, name)
            trained = setup.state.trained.get(name)
            assert (trained is not None) is moves
            assert trained is None or trained.dtype is torch.float32
        assert any("q_proj" in name for name in before)
    assert sum(value.numel() for value in setup.state.trained.values()) == sum(
        value.numel() for value in before.values()
    )


def test_only_the_chosen_modules_get_adapters(folder: Path) -> None:
    setup = Setup(folder, "lora", target_modules="q_proj, v_proj")
    kinds = {name.split(".")[-4] for name in setup.state.trained}
    assert kinds == {"q_proj", "v_proj"}
    everywhere = {name.split(".")[-4] for name in Setup(folder, "lora").state.trained}
    assert everywhere == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }


def test_a_module_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(Invalid) as told:
        Setup(folder, "lora", target_modules="q_proj, query_proj")
    assert told.value.field == "target_modules"
    assert told.value.message == (
        "This base model has no layers named query_proj. Choose from: down_proj, gate_proj, "
        "k_proj, o_proj, q_proj, up_proj, v_proj; or all-linear for all of them."
    )


def test_weights_of_qlora_take_half_a_byte(folder: Path) -> None:
    linear = [value for name, value in base(folder, "qlora").named_parameters() if "q_proj" in name]
    assert {value.dtype for value in linear} == {torch.uint8}
    assert linear[0].numel() == tiny.WIDTH * tiny.WIDTH / 2


def test_gradients_survive_a_look_at_the_validation_loss(folder: Path) -> None:
    # bitsandbytes repacks 4-bit weights in evaluation mode for a product without a gradient.
    setup = Setup(folder, "qlora", NARROW, validation_interval=1, dropout=0.0)
    points = [point for point in setup.points() if point.kind == "train"]
    plain = Setup(folder, "qlora", NARROW, validation_interval=100, dropout=0.0)
    plain.state.looked = -1
    others = [point for point in plain.points() if point.kind == "train"]
    assert [p.grad_norm for p in points] == [p.grad_norm for p in others]


@pytest.mark.parametrize("start", ["random", "text", "vocabulary"])
def test_where_a_prompt_vector_starts(folder: Path, start: str) -> None:
    setup = Setup(folder, "prompt_tuning", initialization=start, initialization_text="sort it")
    words = backbones.inner(setup.model).get_input_embeddings().weight
    assert setup.soft_prefix is not None
    vectors = setup.soft_prefix.detach()
    assert vectors.shape == (6, tiny.WIDTH)
    known = [bool((words == vector).all(1).any()) for vector in vectors]
    if start == "random":
        assert not any(known)
        assert float(vectors.std()) == pytest.approx(float(words.std()), rel=0.2)
        again = Setup(folder, "prompt_tuning", initialization=start, seed=4).soft_prefix
        assert not torch.equal(vectors, again)
    else:
        assert all(known)
    if start == "text":
        ids = AutoTokenizer.from_pretrained(folder)("sort it")["input_ids"]
        assert torch.equal(vectors, words[ids[:6]])


@pytest.mark.parametrize("machine", [MACHINE, NARROW], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("key", methods.METHODS)
def test_a_tuned_model_answers_differently_and_the_same_once_saved(
    folder: Path, tmp_path: Path, key: str, machine: hardware.Hardware
) -> None:
    setup = Setup(folder, key, machine, num_epochs=8)
    setup.points()
    model, soft = saved(setup, folder, tmp_path / "best")
    assert answer(model, soft) != answer(base(folder, key, machine), None)
    again, again_soft = saved_again(setup, folder, tmp_path / "best")
    assert torch.equal(logits(model, soft), logits(again, again_soft))
    if machine.dtype == "float32":
        live = logits(setup.model.eval(), setup.soft_prefix)
        # Products are made in another order, which some processors round in another way.
        torch.testing.assert_close(live, logits(model, soft), rtol=1e-5, atol=1e-5)
    if methods.METHODS[key].frozen_base:
        theirs = peft.PeftModel.from_pretrained(base(folder, key, machine), tmp_path / "best")
    else:
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "best", dtype="auto")
        assert theirs.dtype is machine.precision
    with torch.no_grad():
        found = theirs.eval()(input_ids=torch.tensor([PROMPT]), logits_to_keep=1).logits
    assert torch.equal(found[:, -1].float(), logits(model, soft))


def saved_again(setup: Setup, folder: Path, into: Path) -> tuple[Any, Tensor | None]:
    return backbones.load_tuned(setup.method, setup.params, folder, into, setup.machine)


@pytest.mark.parametrize("key", methods.METHODS)
def test_what_is_saved_names_the_base_in_public_and_no_place_on_this_machine(
    folder: Path, tmp_path: Path, key: str
) -> None:
    changes = {"initialization": "text", "initialization_text": "a"} if "prompt" in key else {}
    setup = Setup(folder, key, **changes)
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "old").write_text("from an earlier look")
    saved(setup, folder, tmp_path / "best")
    files = {path.name for path in (tmp_path / "best").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json"} < files
    assert "old" not in files
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    for path in (tmp_path / "best").iterdir():
        assert str(folder).encode() not in path.read_bytes(), path.name
    if methods.METHODS[key].frozen_base:
        config = json.loads((tmp_path / "best" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == NAME
        values = load_file(tmp_path / "best" / "adapter_model.safetensors")
        assert {value.dtype for value in values.values()} == {torch.float32}
        assert storage.size(tmp_path / "best" / "adapter_model.safetensors") < 300_000
    else:
        assert "model.safetensors" in files


def test_many_adapters_live_on_one_base(folder: Path, tmp_path: Path) -> None:
    for key in ADAPTERS:
        setups = [Setup(folder, key, seed=seed) for seed in (1, 2)]
        alone, places = [], []
        for number, setup in enumerate(setups):
            setup.points()
            places.append(tmp_path / f"{key}{number}")
            alone.append(logits(*saved(setup, folder, places[-1])))
        one = base(folder, key)
        plain = logits(one, None)
        weights = {value.data_ptr() for value in one.parameters()}
        together = [
            backbones.load_tuned(
                setup.method, setup.params, folder, place, MACHINE, base=backbones.share(one)
            )
            for setup, place in zip(setups, places, strict=True)
        ]
        for (model, soft), expected in zip(together, alone, strict=True):
            assert torch.equal(logits(model, soft), expected)
            assert weights <= {value.data_ptr() for value in model.parameters()}
        assert torch.equal(logits(one, None), plain)
        assert not torch.equal(alone[0], alone[1])


def test_the_same_seed_starts_the_same(folder: Path) -> None:
    for key in ADAPTERS:
        first, second, other = (Setup(folder, key, seed=seed) for seed in (1, 1, 2))
        assert same(first.values(), second.values())
        assert not same(first.values(), other.values())


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(folder: Path, share: float) -> None:
    setup = Setup(folder, "lora", dropout=share)
    layer = next(m for m in setup.model.modules() if hasattr(m, "lora_dropout"))
    dropout = layer.lora_dropout["default"]
    torch.manual_seed(0)
    ones = torch.ones(199, 333)
    found = dropout.train()(ones)
    assert float((found == 0).float().mean()) == pytest.approx(share, abs=0.01)
    assert float(found.mean()) == pytest.approx(1, abs=0.03)
    assert len(found.unique()) == 2
    assert not torch.equal(found, dropout(ones))
    assert torch.equal(dropout.eval()(ones), ones)
