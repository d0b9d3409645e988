"""Why a model cannot be given packed rows, if it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from worker import attention, evaluate, packing
from worker.backbones import Hardware, accepts, inner
from worker.packing import Example


def find(
    model: Any, soft_prefix: Tensor | None, examples: Sequence[Example], machine: Hardware
) -> str:
    """Why this model cannot be given packed rows; empty where it can.

    Found out by trying: two of the examples in one row must lose what each loses alone, but for
    rounding. How much that is shows in plain padded rows, which differ from lone ones by it alone;
    and the examples are real, since on senseless text bf16 rounds a tenth of the loss away.
    """
    backbone = inner(model)
    kind = type(backbone).__name__
    instead = "Training uses plain padded rows, which give the same result, more slowly."
    if not (backbone._can_set_attn_implementation() and accepts(backbone, "position_ids")):
        return f"{kind} has an attention of its own that cannot be given packed rows. {instead}"
    pair = _unlike(examples)
    virtual = 0 if soft_prefix is None else len(soft_prefix)

    def lost(members: Sequence[Example], plain: bool) -> Tensor:
        (row,) = packing.pack(members, 10**9, virtual, plain=plain)
        row = row.to(machine.device)
        with attention.packed(backbone, row.layout):
            return evaluate.token_losses(model, soft_prefix, row, machine)

    with evaluate.evaluating(model):
        try:
            together = lost(pair, plain=False)
        except (NotImplementedError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            return f"{kind} cannot be given packed rows ({error}). {instead}"
        apart = torch.cat([lost([member], plain=True) for member in pair])
        rounding = (lost(pair, plain=True) - apart).norm()
    allowed = (1e-3 if machine.precision is torch.float32 else 5e-2) * apart.norm()
    if not (together - apart).norm() <= torch.maximum(allowed, 4 * rounding):
        return f"In {kind} the examples of a packed row would see each other. {instead}"
    return ""


def _unlike(examples: Sequence[Example]) -> list[Example]:
    """The shortest example and the shortest that asks something else, the shorter first."""
    by_length = sorted(examples, key=lambda one: len(one.prompt_ids) + len(one.answer_ids))
    first = by_length[0]
    return [first, *[one for one in by_length if one.prompt_ids != first.prompt_ids][:1]]
