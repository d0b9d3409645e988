"""What the packed rows of a step share goes through the model once: one row has it, the others borrow
its keys and values, and bring their gradients back to it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from worker import lanes
from worker.packing import Packed
from worker.pieces import Before


def between(rows: Sequence[Packed]) -> Lender | None:
    """What these rows lend and borrow through; None if each has its own beginning."""
    layouts = [row.layout for row in rows if row.layout is not None]
    if not any(layout.borrows for layout in layouts):
        return None
    return Lender(awaited=bool(layouts[0].blocks))


@contextmanager
def minding(lender: Lender | None) -> Iterator[None]:
    """Let nobody wait for a row that has failed in here."""
    try:
        yield
    except BaseException:
        if lender is not None:
            lender.fail()
        raise


class Lender:
    """Keys and values of a shared prefix, layer by layer, and the gradients that come back to them.

    `awaited`: one row borrows while the row that lends is worked on, so that each waits for the other,
    layer by layer. Else the prefix lies alone, and who borrows comes between its way there and back.
    """

    def __init__(self, *, awaited: bool) -> None:
        self.awaited = awaited
        self.lent: dict[Any, Before] = {}  # of each layer
        self.learned: set[Any] = set()  # the layers whose keys and values want a gradient
        self.returned: dict[Any, dict[int, list[Tensor]]] = {}  # and of each lane
        self.changed = threading.Condition()
        self.failed = False
        self.anchor = torch.zeros((), requires_grad=True)

    def fail(self) -> None:
        """Let nobody wait any longer."""
        with self.changed:
            self.failed = True
            self.changed.notify_all()

    def lend(self, layer: Any, key: Tensor, value: Tensor, prefix: int) -> Before:
        """Keys and values of a row that begins with its prefix, (1, heads, tokens, width), to go on with."""
        with self.changed:
            self.lent[layer] = _apart(key, prefix), _apart(value, prefix)
            if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
                self.learned.add(layer)
            self.changed.notify_all()
        if layer not in self.learned:
            return key, value
        made: Before = _Lend.apply(key, value, self, layer, prefix)  # type: ignore[no-untyped-call]
        return made

    def borrow(self, layer: Any) -> Before:
        """The prefix's keys and values, (1, heads, prefix, width). Raises Abandoned."""
        self.wait(lambda: layer in self.lent)
        if not torch.is_grad_enabled() or layer not in self.learned:
            return self.lent[layer]
        made: Before = _Borrow.apply(self.anchor, self, layer)  # type: ignore[no-untyped-call]
        return made

    def wait(self, ready: Callable[[], bool]) -> None:
        """Raises Abandoned when the other row fails before that."""
        with self.changed:
            self.changed.wait_for(lambda: self.failed or ready())
        if self.failed:
            raise lanes.Abandoned

    def give_back(self, layer: Any, gradients: Sequence[Tensor]) -> None:
        """Add to what comes back: in float32, apart for each lane, so that the sum has one order."""
        with self.changed:
            lane = self.returned.setdefault(layer, {})
            sums = lane.get(lanes.number())
            if sums is None:
                lane[lanes.number()] = [
                    one.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
                    for one in gradients
                ]
            else:
                for whole, one in zip(sums, gradients, strict=True):
                    whole += one
            self.changed.notify_all()

    def collect(self, layer: Any) -> list[list[Tensor]]:
        """What has come back, lane by lane. Raises Abandoned."""
        if self.awaited:
            self.wait(lambda: layer in self.returned)
        found = self.returned.pop(layer, {})
        return [found[number] for number in sorted(found)]


class _Lend(torch.autograd.Function):
    """Keys and values as they are; on the way back the gradients of all who borrowed are added."""

    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, lender: Lender, layer: Any, prefix: int
    ) -> tuple[Tensor, Tensor]:
        ctx.lender, ctx.layer, ctx.prefix = lender, layer, prefix
        return key.view_as(key), value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        sums = [gradient.clone() for gradient in gradients]
        for back in ctx.lender.collect(ctx.layer):
            for whole, one in zip(sums, back, strict=True):
                whole[:, :, : ctx.prefix] += one
        return *sums, None, None, None


class _Borrow(torch.autograd.Function):
    """Keys and values of another row's prefix; the gradients go there, none to the anchor."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, lender: Lender, layer: Any) -> tuple[Tensor, Tensor]:
        ctx.lender, ctx.layer = lender, layer
        key, value = lender.lent[layer]
        return key.view_as(key), value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.lender.give_back(ctx.layer, gradients)
        return None, None, None


def _apart(part: Tensor, prefix: int) -> Tensor:
    """The prefix's share, which does not keep all of the row in memory."""
    return part[:, :, :prefix].detach().clone()
