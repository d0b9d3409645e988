"""Linear layers that are trained themselves, in training on a processor: no narrow copy of them is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from worker import remade
from worker.hardware import Hardware


def install(model: Any, machine: Hardware) -> None:
    """Have the linear layers of a model that is trained whole computed here; worker/head.py has the last."""
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers: list[Any] = [one for one in model.modules() if type(one) is torch.nn.Linear]
    for layer in layers:
        if layer is not head:
            layer.forward = Trained(layer, machine)
    if type(words) is torch.nn.Embedding and words.weight is getattr(head, "weight", None):
        # A row for each token, added to the head's gradient, in place of a second one of all words.
        words.sparse = True


class Trained:
    """The forward of a linear layer that is trained itself: its narrow copy lasts for one product."""

    def __init__(self, module: Any, machine: Hardware) -> None:
        self.module = module
        self.dtype = machine.computed

    def __call__(self, values: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        layer = self.module
        made: Tensor = _TrainedProduct.apply(values, layer.weight, layer.bias, self.dtype)  # type: ignore[no-untyped-call]
        return made


class _TrainedProduct(torch.autograd.Function):
    """W x + b."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        remade.keep(ctx, values, dtype, weight)
        ctx.dtype, ctx.given = dtype, (values.shape, values.dtype)
        made = functional.linear(values.to(dtype), weight.to(dtype))
        if bias is not None:
            made += bias
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        (shape, given), wanted = ctx.given, ctx.needs_input_grad
        values, (weight,) = remade.kept(ctx)
        rows = gradient.reshape(-1, gradient.shape[-1])
        into = (rows @ weight.to(ctx.dtype)).view(shape).to(given) if wanted[0] else None
        of_weight = (rows.t() @ values.reshape(-1, shape[-1]).to(ctx.dtype)).float()
        of_bias = rows.sum(0, dtype=torch.float32) if wanted[2] else None
        return into, of_weight, of_bias, None
