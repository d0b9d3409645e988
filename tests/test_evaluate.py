"""Losses and answers in batches equal those of each example alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from app import grouping
from app.errors import Invalid
from tests import tiny
from tests.engine import MACHINE, PREFIX, Setup, Tight, rows
from worker import evaluate, generate, packing
from worker.backbones import inner, num_virtual

SHARP: dict[str, Any] = {"initializer_range": 0.15}
# Attention of every place, of a window shorter or longer than the texts, of places learned one by
# one, and layers that are no attention of the usual kind at all.
MODELS: dict[str, dict[str, Any]] = {
    "llama": SHARP,
    "mistral": SHARP | {"sliding_window": 12},
    "gemma3_text": SHARP
    | {
        "head_dim": 16,
        "sliding_window": 100,
        "tie_word_embeddings": False,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": SHARP,
    "bloom": SHARP | {"n_head": 4},
    "lfm2": SHARP | {"layer_types": ["conv", "full_attention"]},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model of each architecture."""
    top = tmp_path_factory.mktemp("evaluate")
    return {
        name: tiny.model(top / name, architecture=name, **changes)
        for name, changes in MODELS.items()
    }


def moved(folder: Path, key: str) -> Setup:
    """A model moved away from where it starts."""
    setup = Setup(folder, key)
    torch.manual_seed(2)
    for value in setup.state.trained.values():
        value.data.add_(0.05 * torch.randn_like(value))
    return setup


def reading(setup: Setup) -> list[int]:
    """How many places the model reads at a time, virtual tokens and padding among them, from now on."""
    read: list[int] = []
    first = inner(setup.model).model.layers[0]
    first.register_forward_pre_hook(
        lambda _layer, given: read.append(given[0].shape[:2].numel()),
    )
    return read


def lost(setup: Setup, **how: Any) -> list[evaluate.Loss]:
    found = evaluate.losses(setup.model, setup.soft_prefix, rows(20), MACHINE, **how)
    return sorted(loss for some in found for loss in some)


@pytest.mark.parametrize("key", ["full", "lora", "prompt_tuning"])
@pytest.mark.parametrize("plain", [False, True], ids=["packed", "plain"])
def test_losses_are_those_of_each_example_alone(
    folders: dict[str, Path], key: str, plain: bool
) -> None:
    setup = moved(folders["llama"], key)
    setup.model.train()
    found = lost(setup, plain=plain)
    assert setup.model.training
    assert [loss.example for loss in found] == list(range(20))
    for loss, row in zip(found, rows(20), strict=True):
        ids = torch.tensor([[*row.prompt_ids, *row.answer_ids]])
        logits, _ = setup.model.eval()(input_ids=ids).logits, setup.model.train()
        answer = logits[0, -len(row.answer_ids) - 1 : -1]
        alone = torch.nn.functional.cross_entropy(answer, ids[0, -3:], reduction="sum")
        assert loss.tokens == 3
        assert loss.total == pytest.approx(float(alone.detach()), rel=1e-5)


def test_losses_come_row_by_row(folders: dict[str, Path]) -> None:
    setup = moved(folders["llama"], "full")
    some = list(evaluate.losses(setup.model, None, rows(20), Tight(*MACHINE), plain=False))
    assert len(some) > 3
    assert sum(map(len, some)) == 20
    together = [loss for part in some for loss in part]
    assert evaluate.mean(together) == pytest.approx(evaluate.mean(lost(setup, plain=False)))
    assert evaluate.mean([evaluate.Loss(0, 4.0, 1), evaluate.Loss(1, 2.0, 2)]) == 2.0


@pytest.mark.parametrize("key", ["full", "lora", "prompt_tuning"])
@pytest.mark.parametrize(
    ("threads", "budget", "times"),
    [(1, 100, 5), (2, 200, 5), (2, 1024, 2)],
    ids=["one lane", "two lanes", "one row in each lane"],
)
def test_losses_read_what_all_examples_begin_with_once(
    folders: dict[str, Path],
    key: str,
    threads: int,
    budget: int,
    times: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grouping, "LEAST_LENT", 1)
    setup = moved(folders["llama"], key)
    machine = MACHINE._replace(threads=threads, budget=budget)
    read = reading(setup)
    some = list(evaluate.losses(setup.model, setup.soft_prefix, rows(48), machine, plain=False))
    shared = packing.shared_prefix(rows(48))
    assert shared == len(PREFIX)
    own = sum(len(one.prompt_ids) + len(one.answer_ids) - 1 - shared for one in rows(48))
    assert len(read) == times
    assert sum(read) == num_virtual(setup.soft_prefix) + shared + own
    assert sum(map(len, some)) == 48


def one_by_one(
    setup: Setup, prompts: list[list[int]], stop: set[int], most: int
) -> list[list[int]]:
    return [
        list(
            generate.stream(
                setup.model.eval(),
                setup.soft_prefix,
                prompt,
                stop,
                temperature=0,
                max_tokens=most,
                seed=0,
            )
        )
        for prompt in prompts
    ]


@pytest.mark.parametrize("common", [True, False], ids=["shared beginning", "nothing shared"])
@pytest.mark.parametrize(
    ("architecture", "key"),
    [
        *((name, "full") for name in MODELS),
        ("llama", "prompt_tuning"),
        ("mistral", "prompt_tuning"),
        ("llama", "lora"),
    ],
)
def test_answers_in_batches_are_those_of_each_prompt_alone(
    folders: dict[str, Path], architecture: str, key: str, common: bool
) -> None:
    setup = moved(folders[architecture], key)
    prompts = [list(row.prompt_ids)[0 if common else 5 :] for row in rows(21)]
    free = one_by_one(setup, prompts, set(), 8)
    stop = {free[0][3], free[5][2], free[7][6]}  # so that answers end at different places
    expected = one_by_one(setup, prompts, stop, 8)
    assert len({len(answer) for answer in expected}) > 2
    steps = list(evaluate.answers(setup.model, setup.soft_prefix, prompts, stop, 8, MACHINE))
    found = {answer.prompt: answer.ids for ended in steps for answer in ended}
    assert [found[index] for index in range(21)] == expected
    assert sum(map(len, steps)) == 21
    assert len(steps) > 8  # a sign of life after every token


@pytest.mark.parametrize("key", ["full", "lora", "prompt_tuning"])
def test_answers_read_what_all_prompts_begin_with_once(folders: dict[str, Path], key: str) -> None:
    setup = moved(folders["llama"], key)
    # Of one length, since padding is read too; one more than are answered at a time.
    count = MACHINE.prompts_at_once + 1
    prompts = [[*PREFIX, 40 + index, 64] for index in range(count)]
    read = reading(setup)
    steps = evaluate.answers(setup.model, setup.soft_prefix, prompts, set(), 3, MACHINE)
    assert sum(len(answer.ids) for ended in steps for answer in ended) == 3 * count
    common = num_virtual(setup.soft_prefix) + len(PREFIX)
    # Each prompt's own two tokens, which give the answer's first, and then all but its last.
    assert sum(read) == common + count * (2 + 3 - 1)


def test_whether_prompts_share_their_beginning_is_told_beforehand(
    folders: dict[str, Path],
) -> None:
    prompts = [list(row.prompt_ids) for row in rows(3)]

    def sharing(most: int) -> list[str]:
        setups = {name: Setup(folder, "full") for name, folder in folders.items()}
        return [
            name
            for name, setup in setups.items()
            if evaluate.shares(setup.model, None, prompts, most)
        ]

    assert sharing(8) == ["llama", "gemma3_text", "gpt2", "bloom"]
    assert sharing(100) == ["llama", "gpt2", "bloom"]  # longer than the window
    setup = Setup(folders["llama"], "full")
    setup.model.train()
    assert evaluate.shares(setup.model, None, prompts, 8)
    assert setup.model.training


def test_answers_keep_to_what_the_model_can_read(folders: dict[str, Path]) -> None:
    setup = moved(folders["llama"], "full")
    prompts = [[1, *range(5, 250), *range(5, 250), *range(5, 22)], [1, 5]]
    ended = evaluate.answers(setup.model, None, prompts, set(), 10, MACHINE)
    found = {answer.prompt: answer.ids for some in ended for answer in some}
    assert [len(found[0]), len(found[1])] == [4, 10]
    with pytest.raises(Invalid, match="at most 511"):
        next(evaluate.answers(setup.model, None, [[5] * 600], set(), 10, MACHINE))


@pytest.mark.parametrize("key", ["full", "prompt_tuning"])
def test_what_cannot_be_packed_is_found_out(
    folders: dict[str, Path], tmp_path: Path, key: str
) -> None:
    setups = {name: Setup(folder, key) for name, folder in folders.items()}
    reasons = {name: setup.state.obstacle for name, setup in setups.items()}
    assert [name for name, reason in reasons.items() if reason] == ["bloom", "lfm2"]
    assert "attention of its own" in reasons["bloom"]
    assert "would see each other" in reasons["lfm2"]
    sinks = tiny.model(tmp_path, architecture="gpt_oss", head_dim=16, num_local_experts=2)
    assert "(attention with s_aux)" in Setup(sinks, "full").state.obstacle
