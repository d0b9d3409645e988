"""The gradients of packed rows: there and back, one row at a time or two side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from worker import attention, evaluate, lanes, lending, thin
from worker.backbones import inner
from worker.hardware import Hardware
from worker.lending import Lender
from worker.packing import Packed


class Part(NamedTuple):
    """A packed row of a step, what its summed loss counts, and the seed of its dropout."""

    row: Packed
    weight: float
    seed: int


class Learner(NamedTuple):
    """What learns: a model or its prompt vector, whose `trained` values get gradients."""

    model: Any
    soft_prefix: Tensor | None
    trained: Mapping[str, Tensor]
    machine: Hardware

    def step(self, parts: Sequence[Part], *, paired: bool) -> Iterator[tuple[float, int]]:
        """Add the gradients of a step's rows; after one or two of them their part of the step's loss,
        and how many they were. A prefix that lies alone gets its own when all have borrowed it."""
        lender = lending.between([part.row for part in parts])
        if lender is None or lender.awaited:
            for some in lanes.groups(parts, paired=paired):
                yield self._learn(some, lender), len(some)
            return
        prefix = parts[0]
        torch.manual_seed(prefix.seed)
        reached = self._there(prefix, lender)
        yield 0.0, 1
        for some in lanes.groups(parts[1:], paired=paired):
            yield self._learn(some, lender), len(some)
        self._back(prefix, reached, lender)

    def _learn(self, parts: Sequence[Part], lender: Lender | None) -> float:
        """The gradients of one row, or of two at the same time."""
        if len(parts) == 1:
            torch.manual_seed(parts[0].seed)
            return self._there_and_back(parts[0], lender)
        # Once around both: the one that ends first must not take its attention from the other.
        around = attention.packed(inner(self.model), parts[0].row.layout)
        with around, lanes.in_order(self.trained.values()) as ended:

            def in_lane(part: Part) -> float:
                try:
                    with (
                        lending.minding(lender),
                        thin.drawing(torch.Generator().manual_seed(part.seed)),
                    ):
                        return self._there_and_back(part, lender)
                finally:
                    ended()

            return sum(lanes.side_by_side(in_lane, parts, self.machine))

    def _there_and_back(self, part: Part, lender: Lender | None) -> float:
        loss = self._there(part, lender)
        self._back(part, loss, lender)
        return float(loss.detach())

    def _there(self, part: Part, lender: Lender | None) -> Tensor:
        row = part.row.to(self.machine.device)
        with attention.packed(inner(self.model), row.layout, lender):
            losses = evaluate.token_losses(self.model, self.soft_prefix, row, self.machine)
            return losses.sum() * part.weight

    def _back(self, part: Part, loss: Tensor, lender: Lender | None) -> None:
        # What is made again on the way back, with activation checkpointing, attends, too.
        with attention.packed(inner(self.model), part.row.layout, lender):
            loss.backward()  # type: ignore[no-untyped-call]
