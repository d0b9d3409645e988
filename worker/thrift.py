"""What a model in training need not keep for its way back, because it is quick to make again."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from worker import attention, remade
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
        if not torch.is_grad_enabled():
            return self.function(*given)
        call = remade.Call(self.function, given, self.held)
        made: Tensor = _Again.apply(call, *given, *self.parameters)  # type: ignore[no-untyped-call]
        return remade.known(made, call)


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: remade.Call, *values: Tensor) -> Tensor:
        count = len(call.held)
        ctx.call = call
        ctx.save_for_backward(*values[count:])
        return call.function(*values[:count])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        given, made = ctx.call.again()
        del ctx.call
        wanted = ctx.needs_input_grad[1:]
        asked = [
            value for value, want in zip([*given, *ctx.saved_tensors], wanted, strict=True) if want
        ]
        found = iter(torch.autograd.grad(made, asked, gradient))
        return None, *(next(found) if want else None for want in wanted)


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
