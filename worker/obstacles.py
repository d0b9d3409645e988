"""Why a model cannot be given packed rows, if it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from worker import attention, evaluate, packing, thin
from worker.backbones import accepts, inner, num_virtual
from worker.hardware import Hardware
from worker.packing import Example


def find(
    model: Any, soft_prefix: Tensor | None, examples: Sequence[Example], machine: Hardware
) -> str:
    """Why this model cannot be given packed rows; empty where it can.

    Found out by trying two of the examples in one row. Another end of the first must not change
    what the second loses; and both must lose about what each loses alone, exactly so in float32.
    (bf16 alone moves the loss of a short answer by a tenth, packed or not.)
    """
    backbone = inner(model)
    kind = type(backbone).__name__
    instead = "Training uses plain padded rows, which give the same result, more slowly."
    if not (backbone._can_set_attn_implementation() and accepts(backbone, "position_ids")):
        return f"{kind} has an attention of its own that cannot be given packed rows. {instead}"
    first, second = _unlike(examples)

    def lost(members: Sequence[Example], plain: bool) -> Tensor:
        virtual = num_virtual(soft_prefix)
        (row,) = packing.pack(members, 10**9, virtual, plain=plain)
        row = row.to(machine.device)
        with attention.packed(backbone, row.layout):
            return evaluate.token_losses(model, soft_prefix, row, machine)

    with evaluate.evaluating(model):
        try:
            together = lost([first, second], plain=False)
            changed = lost([_changed(first), second], plain=False)
        except (NotImplementedError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            return f"{kind} cannot be given packed rows ({error}). {instead}"
        apart = torch.cat([lost([one], plain=True) for one in (first, second)])
    theirs = slice(len(first.answer_ids), None)
    if _differ(changed[theirs], together[theirs], 1e-3):
        return f"In {kind} the examples of a packed row would see each other. {instead}"
    if _differ(together, apart, 1e-3 if machine.precision is torch.float32 else 0.5):
        return f"{kind} computes something else in a packed row. {instead}"
    return ""


def draws_chance(
    model: Any, soft_prefix: Tensor | None, examples: Sequence[Example], machine: Hardware
) -> bool:
    """Whether training draws from the generator that all threads share, as for dropout of the model's own."""
    (row,) = packing.pack([_unlike(examples)[0]], 10**9, num_virtual(soft_prefix), plain=True)
    before = torch.get_rng_state()
    model.train()
    with torch.no_grad(), thin.drawing(torch.Generator()):
        evaluate.token_losses(model, soft_prefix, row.to(machine.device), machine)
    return not torch.equal(before, torch.get_rng_state())


def _differ(one: Tensor, other: Tensor, share: float) -> bool:
    return not bool((one - other).norm() <= share * other.norm())


def _changed(example: Example) -> packing.Row:
    """Other words from the prompt's last, which no shared prefix holds, to the answer's end."""
    *before, last = example.prompt_ids
    last, *answer = (3 if word != 3 else 4 for word in (last, *example.answer_ids))
    return packing.Row([*before, last], answer)


def _unlike(examples: Sequence[Example]) -> tuple[Example, Example]:
    """The shortest example and the shortest that asks something else, the shorter first."""
    by_length = sorted(examples, key=lambda one: len(one.prompt_ids) + len(one.answer_ids))
    first = by_length[0]
    second = (one for one in by_length if one.prompt_ids != first.prompt_ids)
    return first, next(second, first)
