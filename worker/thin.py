"""The first half of LoRA adapters in training, and its dropout: drawn, not kept, for each row of its own."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from worker import remade
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

    Dropout is drawn once for all of them.
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
        seed = int(torch.randint(2**62, (), generator=_chance.get())) if share else 0
        scaling = first.scaling["default"] / (1 - share)
        downs = [layer.lora_A["default"].weight for layer in self.layers]
        made: Tensor = _Thin.apply(values, seed, share, scaling, *self.dtypes, *downs)  # type: ignore[no-untyped-call]
        return list(torch.split(made, [len(down) for down in downs], dim=1))


def _dropped(size: int, seed: int, share: float) -> Tensor:
    """The places of so many values that chance drops; the same ones for the same seed.

    So many are drawn, each anew among all, that a value is dropped with the chance `share`: a third of
    the time that a draw for each value takes. They are drawn again on the way back, rather than kept.
    """
    places = torch.empty(round(-size * math.log1p(-share)), dtype=torch.int64)
    if share:
        places.random_(0, size, generator=torch.Generator().manual_seed(seed))
    return places


def _without(values: Tensor, dropped: Tensor) -> Tensor:
    """The values, less the dropped ones: themselves if none is, else a copy."""
    if not len(dropped):
        return values
    kept = values.clone(memory_format=torch.contiguous_format)
    kept.view(-1).index_fill_(0, dropped, 0)
    return kept


class _Thin(torch.autograd.Function):
    """scaling A (x where kept), of several A; what `remade.keep` keeps of the input, in the dtype `held`."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        seed: int,
        share: float,
        scaling: float,
        dtype: torch.dtype,
        held: torch.dtype,
        *downs: Tensor,
    ) -> Tensor:
        remade.keep(ctx, values, held, *downs)
        rows = values.reshape(-1, values.shape[-1]).to(dtype)
        ctx.scaling, ctx.given, ctx.dtype = scaling, (values.shape, values.dtype), dtype
        ctx.chance = seed, share
        seen = _without(rows, _dropped(rows.numel(), seed, share))
        return (seen @ torch.cat(downs).to(dtype).t()).mul_(scaling)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        shape, given = ctx.given
        values, downs = remade.kept(ctx)
        rows = values.reshape(-1, shape[-1]).to(ctx.dtype)
        back = gradient * ctx.scaling
        dropped = _dropped(rows.numel(), *ctx.chance)
        seen = _without(rows, dropped)
        each = torch.split((back.t() @ seen).float(), [len(down) for down in downs])
        into = None
        if ctx.needs_input_grad[0]:
            into = back @ torch.cat(downs).to(rows.dtype)
            into.view(-1).index_fill_(0, dropped, 0)
            into = into.view(shape).to(given)
        return into, None, None, None, None, None, *each
