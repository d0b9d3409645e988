"""The gradients of packed rows: there and back, one row at a time or two side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from worker import attention, evaluate, lanes, thin
from worker.backbones import inner
from worker.hardware import Hardware
from worker.packing import Packed


class Part(NamedTuple):
    """A packed row of a step, what its summed loss counts, and the seed of its dropout."""

    row: Packed
    weight: float
    seed: int


def learn(
    model: Any,
    soft_prefix: Tensor | None,
    parts: Sequence[Part],
    trained: Mapping[str, Tensor],
    machine: Hardware,
) -> float:
    """Add the gradients of one row, or of two at the same time; their part of the step's loss."""

    def there_and_back(part: Part) -> float:
        row = part.row.to(machine.device)
        with attention.packed(inner(model), row.layout):
            losses = evaluate.token_losses(model, soft_prefix, row, machine)
            loss = losses.sum() * part.weight
            loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    if len(parts) == 1:
        torch.manual_seed(parts[0].seed)
        return there_and_back(parts[0])
    # Once around both: the one that ends first must not take its attention from the other.
    around = attention.packed(inner(model), parts[0].row.layout)
    with around, lanes.in_order(trained.values()) as ended:

        def in_lane(part: Part) -> float:
            try:
                with thin.drawing(torch.Generator().manual_seed(part.seed)):
                    return there_and_back(part)
            finally:
                ended()

        return sum(lanes.side_by_side(in_lane, parts, machine))
