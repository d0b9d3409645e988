"""Which label a model would choose if it may answer with one of them only: the likeliest answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from worker import evaluate
from worker.hardware import Hardware
from worker.packing import Example, Row

MOST_LABELS = 40
MOST_TOKENS = {"cpu": 40_000, "cuda": 4_000_000}  # to read for all test examples together


def obstacle(
    rows: Sequence[Example], labels: Sequence[Sequence[int]], machine: Hardware, *, plain: bool
) -> str:
    """Why this is left out, if it is; `labels` in tokens."""
    if len(labels) > MOST_LABELS:
        return f"there are {len(labels)} labels, and it is measured for up to {MOST_LABELS}"
    answers = sum(map(len, labels))
    times = len(labels) if plain else 1  # the prompt is shared where rows can be packed
    tokens = sum(len(row.prompt_ids) * times + answers for row in rows)
    most = MOST_TOKENS[machine.device]
    if tokens > most:
        return f"it would take {tokens:,} tokens to read, and at most {most:,} are read for it here"
    return ""


def find(
    model: Any,
    soft_prefix: torch.Tensor | None,
    rows: Sequence[Example],
    labels: Sequence[Sequence[int]],
    machine: Hardware,
    *,
    plain: bool,
) -> Iterator[int]:
    """For each row the place of the label that is the likeliest answer, its end of turn included.

    All answers of a row share its prompt, so that each costs only its own few tokens.
    """
    for row in rows:
        options = [Row(row.prompt_ids, label) for label in labels]
        found = [
            loss
            for some in evaluate.losses(model, soft_prefix, options, machine, plain=plain)
            for loss in some
        ]
        yield min(found, key=lambda loss: (loss.total, loss.example)).example
