"""How long a person waits for a model's answer: its first token, and the pace of the others."""

import time
from collections.abc import Sequence, Set
from statistics import median
from typing import Any

import torch

from worker import generate

PROMPTS = 5
MOST_TOKENS = 32


def measure(
    model: Any,
    soft_prefix: torch.Tensor | None,
    prompts: Sequence[Sequence[int]],
    stop_ids: Set[int],
    most: int,
) -> dict[str, float]:
    """Of the first few prompts, one after another, as the playground answers them.

    The first one is answered twice: what is set up then is no part of an answer.
    """
    firsts, after, seconds = [], 0, 0.0
    with torch.no_grad():
        for place, prompt in enumerate([*prompts[:1], *prompts[:PROMPTS]]):
            times = [time.perf_counter()]
            stream = generate.stream(
                model,
                soft_prefix,
                prompt,
                stop_ids,
                temperature=0,
                max_tokens=min(most, MOST_TOKENS),
                seed=0,
            )
            times += [time.perf_counter() for _ in stream]
            if place and len(times) > 1:
                firsts.append(times[1] - times[0])
                after += len(times) - 2
                seconds += times[-1] - times[1]
    found = {"first_token_seconds": median(firsts)} if firsts else {}
    return found | ({"answer_tokens_per_second": after / seconds} if after and seconds else {})
