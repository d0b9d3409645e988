"""The loss of a large head on a GPU by Liger's fused kernel, where that is installed and the head is plain.

`pip install "tuning-studio[cuda]"` brings it. Without it worker/head.py makes the same in pieces.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from worker.backbones import compute

KERNEL = "liger_kernel.ops.fused_linear_cross_entropy"


@functools.cache
def is_installed() -> bool:
    """Whether Liger is there."""
    return importlib.util.find_spec("liger_kernel") is not None


def suits(head: Any) -> bool:
    """Whether the kernel can do this `head.Head`."""
    return head.machine.device == "cuda" and is_installed() and is_plain(head)


def is_plain(head: Any) -> bool:
    """Whether the head is one linear layer and nothing else: no cap, no scaling, no adapter; tried."""
    layer = head.backbone.get_output_embeddings()
    own = {id(value) for value in layer.parameters()}
    if type(layer) is not torch.nn.Linear or any(id(value) not in own for value in head.trained):
        return False
    weight = layer.weight
    hidden = torch.linspace(-1, 1, 2 * weight.shape[1], device=weight.device, dtype=weight.dtype)
    hidden = hidden.view(2, -1)
    with torch.no_grad(), compute(head.machine):
        return torch.equal(head(hidden), functional.linear(hidden, weight, layer.bias))


def pieces(
    head: Any, hidden: Tensor, targets: Tensor, *, learns: bool
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """Losses, (targets,), and the gradients of their sum: of the hidden states, (targets, width),
    and of what the head trains."""
    layer = head.backbone.get_output_embeddings()
    kernel = importlib.import_module(KERNEL).fused_linear_cross_entropy_forward
    with torch.no_grad(), compute(head.machine):
        losses, *_, back, of_weight, of_bias = kernel(
            hidden,
            layer.weight.detach(),
            targets,
            bias=None if layer.bias is None else layer.bias.detach(),
            reduction="none",
            accum_dtype=torch.float32,
            compute_gradients=learns,
            weight_requires_grad=layer.weight.requires_grad,
        )
    made = {id(layer.weight): of_weight, id(layer.bias): of_bias}
    return losses, back if learns else None, [made[id(value)] for value in head.trained]
