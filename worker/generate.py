"""A prompt -> tokens, one by one, of one model or of several side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from app.errors import Invalid
from worker.backbones import accepts, embed, inner, num_virtual


def read(
    model: Any,
    soft_prefix: Tensor | None,
    ids: Tensor,
    *,
    cache: Any = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """Logits after the last of `ids`, (rows, vocabulary), and the cache with what was read.

    `mask`, (rows, cached + virtual + tokens), is 0 at padding; positions count only what it shows.
    """
    backbone = inner(model)
    new = ids.shape[1] + num_virtual(soft_prefix)
    inputs: dict[str, Any] = {"use_cache": True, "past_key_values": cache}
    if mask is not None:
        inputs["attention_mask"] = mask
        if accepts(backbone, "position_ids"):
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -new:]
    if accepts(backbone, "logits_to_keep"):
        # A tensor, since the slice that a number gives is not contiguous: to multiply that, torch
        # copies the head's weights once for every row.
        inputs["logits_to_keep"] = torch.tensor([new - 1], device=ids.device)
    with torch.no_grad():
        if soft_prefix is None:
            inputs["input_ids"] = ids
        else:
            inputs["inputs_embeds"] = embed(backbone, soft_prefix, ids)
        out = backbone(**inputs)
    return out.logits[:, -1].float(), out.past_key_values


def room(model: Any, soft_prefix: Tensor | None, prompt: Sequence[int], wanted: int) -> int:
    """How many tokens may follow this prompt, at most `wanted`.

    Raises Invalid if the prompt alone is more than the model can read.
    """
    most: int | None = getattr(
        inner(model).config.get_text_config(), "max_position_embeddings", None
    )
    if most is None:
        return wanted
    used = len(prompt) + num_virtual(soft_prefix)
    if used >= most:
        raise Invalid(
            f"The prompt has {used} tokens; this model reads at most {most - 1}. Shorten the input."
        )
    return min(wanted, most - used)


def stream(
    model: Any,
    soft_prefix: Tensor | None,
    prompt_ids: Sequence[int],
    stop_ids: Set[int],
    *,
    temperature: float,
    max_tokens: int,
    seed: int,
) -> Iterator[int]:
    """The answer's tokens as they come, without the one that ends it.

    Temperature 0 takes the likeliest token each time; above, tokens are drawn, the same for the
    same seed. Raises Invalid if the prompt is too long for the model.
    """
    left = room(model, soft_prefix, prompt_ids, max_tokens)
    chance = torch.Generator().manual_seed(seed)
    device = inner(model).device
    logits, cache = read(model, soft_prefix, torch.tensor([list(prompt_ids)], device=device))
    while left:
        token = _choose(logits[0], temperature, chance)
        if token in stop_ids:
            return
        yield token
        left -= 1
        if left:
            logits, cache = read(model, None, torch.tensor([[token]], device=device), cache=cache)


def _choose(logits: Tensor, temperature: float, chance: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    shares = torch.softmax(logits.cpu() / temperature, dim=-1)
    return int(torch.multinomial(shares, 1, generator=chance))


def interleave(streams: Sequence[Iterator[int]]) -> Iterator[tuple[int, int]]:
    """Tokens of several streams in turn, each as (which stream, token), until all have ended."""
    running = dict(enumerate(streams))
    while running:
        for place, one in list(running.items()):
            token = next(one, None)
            if token is None:
                del running[place]
            else:
                yield place, token
