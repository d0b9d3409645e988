"""Linear layers of a model in training on a processor: weights stay narrow, products are fast.

A frozen weight is widened (or, held in 4 bits, dequantized) just before its product and again on the way
back: on a processor that costs a hundredth of the product. LoRA's thin products and its dropout are added
in the same step, and only the layer's input is kept for the way back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import bitsandbytes
import torch
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora.bnb import Linear4bit as AdaptedLinear4bit
from torch import Tensor
from torch.nn import functional

from worker.hardware import Hardware
from worker.thin import Thin

PIECE = 2**22  # values of a weight that are widened at a time
# Layers that are given the same input, wherever they lie side by side, in the order they are called.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def install(model: Any, machine: Hardware) -> None:
    """Have the model's frozen linear layers and their adapters computed here, in `machine.computed`.

    Everything else that is frozen and narrower is widened; embeddings as they are looked up, so that
    what flows through the model is added up in float32: in bf16 gradients are twice as far from true.
    """
    dtype = machine.computed
    adapted: set[Any] = set()
    for parent in list(model.modules()):
        groups: dict[Any, Thin] = {}
        for name, module in parent.named_children():
            if isinstance(module, (peft_layer.Linear, AdaptedLinear4bit)) and _is_plain(module):
                adapted.add(module.base_layer)
                together = next((names for names in TOGETHER if name in names), name)
                module.forward = Adapted(module, groups.setdefault(together, Thin(machine)))
    for module in model.modules():
        if _is_held(module):
            if module not in adapted:
                module.forward = Frozen(module, dtype)
        elif isinstance(module, torch.nn.Embedding) and not module.weight.requires_grad:
            module.register_forward_hook(lambda _module, _given, words: words.float())
        elif dtype is torch.float32:
            for value in module.parameters(recurse=False):
                if value.is_floating_point() and not isinstance(value, bitsandbytes.nn.Params4bit):
                    value.data = value.data.float()


def _is_held(module: Any) -> bool:
    """Whether this is a linear layer whose weight stays as it is."""
    return (
        isinstance(module, torch.nn.Linear)
        and not module.weight.requires_grad
        and (module.weight.is_floating_point() or module.weight.dtype is torch.uint8)
    )


def _is_plain(layer: Any) -> bool:
    """Whether this is a LoRA adapter beside a frozen linear layer, without variants."""
    return (
        _is_held(layer.base_layer)
        and list(layer.active_adapters) == ["default"]
        and "default" in layer.lora_A
        and not layer.lora_variant
        and layer.lora_B["default"].bias is None
    )


def _dequantized(weight: Any, dtype: torch.dtype) -> Tensor:
    state = copy.copy(weight.quant_state)
    state.dtype = dtype  # the one it is dequantized to
    wide: Tensor = bitsandbytes.functional.dequantize_4bit(weight.data, state)
    return wide


class Frozen:
    """The forward of a linear layer that is not trained."""

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        self.module = module
        self.dtype = dtype

    def __call__(self, values: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        made: Tensor = _Product.apply(values, self)  # type: ignore[no-untyped-call]
        return made

    def product(self, values: Tensor) -> Tensor:
        """Of the layer's own weight and bias, without a way back."""
        values = values.to(self.dtype)
        parts = [functional.linear(values, piece) for _, piece in self._pieces()]
        made = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        if self.module.bias is not None:
            made += self.module.bias.detach()
        return made

    def back(self, gradient: Tensor) -> Tensor:
        """The gradient of the layer's input."""
        into: Tensor | None = None
        for outputs, piece in self._pieces():
            share = gradient[..., outputs] @ piece
            into = share if into is None else into.add_(share)
        assert into is not None
        return into

    def _pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight as products take it: all at once, or, of a large head to be widened, in parts."""
        weight = self.module.weight
        if isinstance(weight, bitsandbytes.nn.Params4bit):
            yield slice(None), _dequantized(weight, self.dtype)
            return
        size = len(weight) if weight.dtype is self.dtype else max(1, PIECE // weight.shape[1])
        for first in range(0, len(weight), size):
            outputs = slice(first, first + size)
            yield outputs, weight.detach()[outputs].to(self.dtype)


class _Product(torch.autograd.Function):
    """A frozen layer's product: nothing is kept but the layer itself."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, frozen: Frozen) -> Tensor:
        ctx.frozen = frozen
        ctx.given = values.dtype
        return frozen.product(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.frozen.back(gradient).to(ctx.given), None


class Adapted(Frozen):
    """The forward of a linear layer with a LoRA adapter beside it."""

    def __init__(self, layer: Any, thin: Thin) -> None:
        super().__init__(layer.base_layer, thin.dtypes[0])
        self.layer = layer
        self.thin = thin
        thin.layers.append(layer)

    def __call__(self, values: Tensor, *_: Any, **__: Any) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.layer.disable_adapters or self.layer.merged:
            return super().__call__(values)
        up = self.layer.lora_B["default"].weight
        thin = self.thin(self.layer, values)
        made: Tensor = _AdaptedProduct.apply(values, thin, up, self)  # type: ignore[no-untyped-call]
        return made


class _AdaptedProduct(torch.autograd.Function):
    """W x + B thin: the input is not kept."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, thin: Tensor, up: Tensor, adapted: Adapted) -> Tensor:
        ctx.save_for_backward(thin, up)
        ctx.adapted, ctx.given = adapted, values.dtype
        made = adapted.product(values)
        made.view(-1, made.shape[-1]).addmm_(thin, up.to(adapted.dtype).t())
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        thin, up = ctx.saved_tensors
        into = ctx.adapted.back(gradient).to(ctx.given) if ctx.needs_input_grad[0] else None
        rows = gradient.reshape(-1, gradient.shape[-1])
        return into, rows @ up.to(rows.dtype), (rows.t() @ thin).float(), None
