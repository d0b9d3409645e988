"""The first half of LoRA adapters in training, and its dropout: drawn, not kept, for each row of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from worker.hardware import Hardware

_chance: ContextVar[torch.Generator | None] = ContextVar("chance", default=None)


@contextmanager
def drawing(chance: torch.Generator) -> Iterator[None]:
    """Have dropout drawn from this generator instead of the common one."""
    token = _chance.set(chance)
    try:
        yield
    finally:
        _chance.reset(token)


class Thin:
    """The first half of adapters that are given the same input: their thin products, made as one.

    Dropout is drawn once for all of them. A byte of chance decides on each value, so that its share
    is rounded to a 256th.
    """

    def __init__(self, machine: Hardware) -> None:
        self.layers: list[Any] = []
        self.dtypes = machine.computed, machine.precision
        self.last = threading.local()  # input and results: several rows may be worked on at a time

    def __call__(self, layer: Any, values: Tensor) -> Tensor:
        """(..., in) -> (rows, rank), scaled."""
        if getattr(self.last, "given", None) is not values:
            self.last.given, self.last.made = values, self._make(values)
        made: Tensor = self.last.made[self.layers.index(layer)]
        if layer is self.layers[-1]:
            self.last.given, self.last.made = None, []  # nothing of a step outlives it
        return made

    def _make(self, values: Tensor) -> list[Tensor]:
        first = self.layers[0]
        share = getattr(first.lora_dropout["default"], "p", 0.0) if first.training else 0.0
        dropped, seed = round(share * 256), 0
        if dropped:
            seed = int(torch.randint(2**62, (), generator=_chance.get()))
        scaling = first.scaling["default"] / (1 - dropped / 256)
        downs = [layer.lora_A["default"].weight for layer in self.layers]
        made: Tensor = _Thin.apply(values, seed, dropped, scaling, *self.dtypes, *downs)  # type: ignore[no-untyped-call]
        return list(torch.split(made, [len(down) for down in downs], dim=1))


def _drawn(values: Tensor, seed: int, dropped: int) -> Tensor | None:
    """A byte of chance, -128 to 127, for each value, in its dtype; None without dropout.

    Drawn again where it is needed again, from the same seed, rather than kept.
    """
    if not dropped:
        return None
    chance = torch.empty(-(-values.numel() // 8), dtype=torch.int64)
    chance.random_(-(2**63), None, generator=torch.Generator().manual_seed(seed))
    return chance.view(torch.int8)[: values.numel()].view(values.shape).to(values.dtype)


def _kept(values: Tensor, drawn: Tensor | None, dropped: int) -> Tensor:
    """The values whose byte is not one of the `dropped` lowest; else 0.

    The way back of a threshold does this in one pass; a product with booleans takes four times as long.
    """
    if drawn is None:
        return values
    made: Tensor = torch.ops.aten.threshold_backward(values, drawn, dropped - 129)
    return made


class _Thin(torch.autograd.Function):
    """scaling A (x where kept), of several A; the input is kept for the way back, in the dtype `held`."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        seed: int,
        dropped: int,
        scaling: float,
        dtype: torch.dtype,
        held: torch.dtype,
        *downs: Tensor,
    ) -> Tensor:
        rows = values.reshape(-1, values.shape[-1]).to(dtype)
        ctx.save_for_backward(rows.to(held), *downs)
        ctx.scaling, ctx.given, ctx.dtype = scaling, (values.shape, values.dtype), dtype
        ctx.chance = seed, dropped
        seen = _kept(rows, _drawn(rows, seed, dropped), dropped)
        return (seen @ torch.cat(downs).to(dtype).t()).mul_(scaling)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        rows, *downs = ctx.saved_tensors
        rows = rows.to(ctx.dtype)
        shape, given = ctx.given
        back = gradient * ctx.scaling
        drawn, dropped = _drawn(rows, *ctx.chance), ctx.chance[1]
        seen = _kept(rows, drawn, dropped)
        each = torch.split((back.t() @ seen).float(), [len(down) for down in downs])
        into = None
        if ctx.needs_input_grad[0]:
            into = back @ torch.cat(downs).to(rows.dtype)
            into = _kept(into, drawn, dropped).view(shape).to(given)
        return into, None, None, None, None, None, *each
