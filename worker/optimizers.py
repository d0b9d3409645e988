"""The optimizers: torch's AdamW in float32, or bitsandbytes' with moments of 8 bits; and what a checkpoint keeps of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import bitsandbytes
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from app import capacity
from app.errors import StudioError
from app.methods import Params
from worker import distributed
from worker.hardware import Hardware

# Of a value's state, by either library. The codes of 8 bits (qmap1, qmap2) are always the same.
KEPT = ("step", "exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2")


def make(
    groups: Sequence[dict[str, Any]], params: Params, machine: Hardware
) -> torch.optim.Optimizer:
    """The optimizer that the parameters ask for; `groups` as torch's optimizers take them.

    Raises StudioError for one of 8 bits where there is no CUDA GPU, or over values that are spread.
    """
    if params.optimizer == capacity.PLAIN:
        return torch.optim.AdamW(groups, lr=params.learning_rate, fused=True)
    if machine.device != "cuda":
        raise StudioError(
            "Optimizers of 8 bits need a GPU with CUDA, and this machine has none. "
            "Choose the optimizer adamw."
        )
    if any(isinstance(value, DTensor) for group in groups for value in group["params"]):
        raise StudioError(
            "Optimizers of 8 bits cannot be spread over several devices. "
            "Choose the optimizer adamw, or one device."
        )
    return eight_bit(groups, params, paged=params.optimizer.startswith("paged"))


def eight_bit(
    groups: Sequence[dict[str, Any]], params: Params, *, paged: bool
) -> torch.optim.Optimizer:
    """AdamW with both moments in 8 bits, a scale for each 256 of them (Dettmers et al., 2022,
    https://arxiv.org/abs/2110.02861); `paged`: moved to RAM while the GPU has no room for them.

    Values of fewer than 4096 numbers keep moments of 32 bits.
    """
    made: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
        list(groups), lr=params.learning_rate, is_paged=paged
    )
    return made


def state(optimizer: torch.optim.Optimizer, value: Tensor) -> dict[str, Tensor]:
    """What a checkpoint keeps for this value; not copied. Empty before the first step."""
    found = optimizer.state.get(value, {})
    return {kind: torch.as_tensor(found[kind]) for kind in KEPT if kind in found}


def check(optimizer: torch.optim.Optimizer, kept: Mapping[str, Tensor]) -> None:
    """Raise ValueError if what `state` gave is another optimizer's."""
    first = "state1" if isinstance(optimizer, bitsandbytes.optim.AdamW8bit) else "exp_avg"
    if kept and first not in kept:
        raise ValueError("it was saved with another optimizer")


def restore(optimizer: torch.optim.Optimizer, value: Tensor, kept: Mapping[str, Tensor]) -> None:
    """Bring back what `state` gave of an optimizer of the same kind; see `check`."""
    if not kept:
        return
    if not isinstance(optimizer, bitsandbytes.optim.AdamW8bit):
        for kind, part in kept.items():
            optimizer.state[value][kind] = distributed.part(part, value)
        return
    for number, group in enumerate(optimizer.param_groups):
        for place, one in enumerate(group["params"]):
            if one is value:  # pages are made anew, where the GPU finds them
                optimizer.init_state(group, value, number, place)
    made = optimizer.state[value]
    for kind, part in kept.items():
        made[kind] = int(part) if kind == "step" else made[kind].copy_(part)
