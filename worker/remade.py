"""Values that are made again on the way back, once, by whoever needs them first: what a norm or a gate made
goes into products that need it for their weights' gradients, and into its own way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_CALL = "studio_call"  # the attribute of a tensor with the call that made it


class Call:
    """One call of a function, and its inputs in the dtype `held`."""

    def __init__(
        self, function: Callable[..., Tensor], given: Sequence[Tensor], held: torch.dtype
    ) -> None:
        self.function = function
        self.held = [value.detach().to(held) for value in given]
        self.given = [(value.dtype, value.requires_grad) for value in given]
        self.narrowed = torch.is_autocast_enabled("cpu")
        self.found: tuple[list[Tensor], Tensor] | None = None

    def again(self) -> tuple[list[Tensor], Tensor]:
        """The inputs, and what the function makes of them, with its way back; kept for the next to ask."""
        if self.found is None:
            given = [
                value.to(dtype).requires_grad_(learns)
                for value, (dtype, learns) in zip(self.held, self.given, strict=True)
            ]
            with torch.enable_grad(), torch.autocast("cpu", enabled=self.narrowed):
                self.found = given, self.function(*given)
        return self.found


def known(made: Tensor, call: Call) -> Tensor:
    """The same tensor; `keep` finds how it was made."""
    setattr(made, _CALL, call)
    return made


def keep(ctx: Any, values: Tensor, held: torch.dtype, *others: Tensor) -> None:
    """Have a product's context keep its input, in the dtype `held` unless it can be made again, and others."""
    ctx.call = getattr(values, _CALL, None)
    ctx.save_for_backward(*others, *([] if ctx.call else [values.to(held)]))


def kept(ctx: Any) -> tuple[Tensor, list[Tensor]]:
    """The input that `keep` was given, and the others; for once."""
    call, saved = ctx.call, list(ctx.saved_tensors)
    del ctx.call
    return (call.again()[1].detach() if call else saved.pop()), saved
