"""What a model in training need not keep for its way back, because it is quick to make again."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from worker import attention
from worker.hardware import Hardware

GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")


def install(model: Any, machine: Hardware) -> None:
    """Have norms and gated activations made again on the way back, from inputs held narrow.

    What a norm makes is narrowed here, once for all products that it goes into.
    """
    held, computed = machine.precision, machine.computed
    for module in list(model.modules()):
        if type(module).__name__.endswith("Norm"):
            module.forward = Again(
                _narrowed(module.forward, computed), list(module.parameters()), held
            )
        elif type(module).__name__.endswith("Attention"):
            setattr(module, attention.HELD, held)
        elif all(hasattr(module, name) for name in GATED):
            gated = _Gated(module, held)
            if _is_gated(module, gated):
                module.forward = gated


def _narrowed(norm: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda *given: norm(*given).to(dtype)


class Again:
    """A function of tensors that keeps its inputs alone, for the way back: in the dtype `held`."""

    def __init__(
        self, function: Callable[..., Tensor], parameters: list[Tensor], held: torch.dtype
    ) -> None:
        self.function = function
        self.parameters = parameters
        self.held = held

    def __call__(self, *given: Tensor) -> Tensor:
        made: Tensor = _Again.apply(self, len(given), *given, *self.parameters)  # type: ignore[no-untyped-call]
        return made


class _Again(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def forward(ctx: Any, again: Again, count: int, *values: Tensor) -> Tensor:
        given, parameters = values[:count], values[count:]
        ctx.again, ctx.dtypes = again, [value.dtype for value in given]
        ctx.save_for_backward(*(value.to(again.held) for value in given), *parameters)
        return again.function(*given)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        again, count = ctx.again, len(ctx.dtypes)
        values = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        given = [
            value.detach().to(dtype).requires_grad_(want)
            for value, dtype, want in zip(values[:count], ctx.dtypes, wanted, strict=False)
        ]
        with torch.enable_grad():
            made = again.function(*given)
        asked = [
            value for value, want in zip([*given, *values[count:]], wanted, strict=True) if want
        ]
        found = iter(torch.autograd.grad(made, asked, gradient))
        return None, None, *(next(found) if want else None for want in wanted)


class _Gated:
    """The forward of Llama's feed-forward block and its like."""

    def __init__(self, module: Any, held: torch.dtype) -> None:
        self.module = module
        self.gated = Again(lambda gate, up: module.act_fn(gate) * up, [], held)

    def __call__(self, values: Tensor) -> Tensor:
        module = self.module
        made: Tensor = module.down_proj(
            self.gated(module.gate_proj(values), module.up_proj(values))
        )
        return made


def _is_gated(module: Any, gated: _Gated) -> bool:
    """Whether the block does just what `_Gated` does: tried, since others have the same parts."""
    weight = module.gate_proj.weight
    width = module.gate_proj.in_features
    values = torch.linspace(-1, 1, 2 * width, device=weight.device).view(2, width)
    with torch.no_grad():
        return torch.equal(module(values), gated(values))
