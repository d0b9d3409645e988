"""Answers token by token: with a cache as without, repeatable, side by side."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.errors import Invalid
from tests import tiny
from tests.engine import Setup, rows
from worker import backbones, generate

PROMPT = list(rows()[0].prompt_ids)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers are far from even."""
    return tiny.model(tmp_path_factory.mktemp("generate"), initializer_range=0.15)


def uncached(model: Any, soft_prefix: Tensor | None, prompt: list[int], number: int) -> list[int]:
    """The likeliest tokens, each by reading everything anew."""
    backbone, ids = backbones.inner(model), list(prompt)
    for _ in range(number):
        embedded = backbone.get_input_embeddings()(torch.tensor([ids]))
        if soft_prefix is not None:
            embedded = torch.cat((soft_prefix[None], embedded), dim=1)
        with torch.no_grad():
            logits = backbone(inputs_embeds=embedded, use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def ask(model: Any, soft_prefix: Tensor | None, **changes: Any) -> list[int]:
    how: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12, "seed": 1} | changes
    stop = how.pop("stop", frozenset())
    return list(generate.stream(model, soft_prefix, PROMPT, stop, **how))


@pytest.mark.parametrize("key", ["lora", "qlora", "prompt_tuning"])
def test_with_a_cache_as_without(folder: Path, key: str) -> None:
    setup = Setup(folder, key)
    setup.points()
    model, soft = setup.model.eval(), setup.soft_prefix
    found = ask(model, soft)
    assert found == uncached(model, soft, PROMPT, 12)
    assert len(set(found)) > 1
    # PEFT's own way to generate, which puts the prompt vector before the text itself.
    ids = torch.tensor([PROMPT])
    theirs = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
    )
    assert theirs[0, len(PROMPT) :].tolist() == found


def test_ends_before_a_stop_token_or_at_the_limit(folder: Path) -> None:
    model = Setup(folder, "full").model.eval()
    whole = ask(model, None)
    assert len(whole) == 12
    stop = whole[5]
    assert ask(model, None, stop=frozenset({stop})) == whole[: whole.index(stop)]
    assert ask(model, None, max_tokens=1) == whole[:1]


def test_sampling_is_repeatable_and_follows_the_temperature(folder: Path) -> None:
    model = Setup(folder, "full").model.eval()
    assert ask(model, None, temperature=1.0) == ask(model, None, temperature=1.0)
    drawn = {tuple(ask(model, None, temperature=1.0, seed=seed)) for seed in range(5)}
    assert len(drawn) > 1
    assert ask(model, None, temperature=1e-4, seed=4) == ask(model, None)


def test_sampling_draws_by_the_models_shares(folder: Path) -> None:
    model = Setup(folder, "full").model.eval()
    logits, _ = generate.read(model, None, torch.tensor([PROMPT]))
    shares = torch.softmax(logits[0], -1)
    first = [ask(model, None, temperature=1.0, max_tokens=1, seed=seed)[0] for seed in range(400)]
    likeliest = int(shares.argmax())
    assert first.count(likeliest) / 400 == pytest.approx(float(shares[likeliest]), abs=0.08)


def test_models_answer_side_by_side(folder: Path) -> None:
    model = Setup(folder, "full").model.eval()
    streams = [
        generate.stream(model, None, PROMPT, set(), temperature=0, max_tokens=n, seed=0)
        for n in (3, 1, 2)
    ]
    found = list(generate.interleave(streams))
    assert [place for place, _ in found] == [0, 1, 2, 0, 2, 0]
    assert [token for place, token in found if place == 0] == ask(model, None, max_tokens=3)


def test_a_prompt_that_is_too_long_is_refused(folder: Path) -> None:
    model = Setup(folder, "full").model.eval()
    with pytest.raises(Invalid, match="The prompt has 512 tokens; this model reads at most 511"):
        next(generate.stream(model, None, [5] * 512, set(), temperature=0, max_tokens=5, seed=0))
    stream = generate.stream(model, None, [5] * 510, set(), temperature=0, max_tokens=5, seed=0)
    assert len(list(stream)) == 2
