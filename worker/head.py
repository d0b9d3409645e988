"""From a model's last hidden states to the loss of each target: all logits at once, or a piece at a time.

Pieces keep the logits of a long row from ever being there together. Each is put through the model's own
forward with its layers left out, so that caps, scaling, biases and adapters of the head are what they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional

from app.arithmetic import most_logits
from worker import fused, lanes
from worker.backbones import accepts, compute
from worker.hardware import Hardware
from worker.packing import Packed


def losses(backbone: Any, inputs: dict[str, Any], row: Packed, machine: Hardware) -> Tensor:
    """The loss of each target of a row, (targets,), float32, with its gradient.

    `inputs`: what the transformers model `backbone` is given, less which logits are wanted.
    """
    sliced = accepts(backbone, "logits_to_keep")
    places = len(row.attention_mask) * (row.keep.numel() if sliced else row.attention_mask.shape[1])
    if sliced and _are_many(places, backbone, machine):
        reached = _reach(backbone, inputs, machine)
        if reached is not None:
            hidden = reached.last_hidden_state[row.rows, row.keep[row.columns]]
            return _by_pieces(Head(backbone, reached, machine), hidden, row.targets)
    if sliced:
        inputs = inputs | {"logits_to_keep": row.keep}
    with compute(machine):
        logits = backbone(**inputs).logits
    if sliced and row.layout is not None:
        wanted = logits[0, : len(row.targets)]  # one row, of which just these were asked for
    else:
        wanted = logits[row.rows, row.columns if sliced else row.keep[row.columns]]
    made: Tensor = _Losses.apply(wanted, row.targets)  # type: ignore[no-untyped-call]
    return made


class Head:
    """What a model does with its last hidden states, by its own forward."""

    def __init__(self, backbone: Any, outputs: Any, machine: Hardware) -> None:
        self.backbone, self.outputs, self.machine = backbone, outputs, machine
        own = {id(value) for value in backbone.get_output_embeddings().parameters()}
        layers = {id(value) for value in getattr(backbone, _name(backbone)).parameters()}
        self.trained = [
            value
            for value in backbone.parameters()
            if value.requires_grad and (id(value) in own or id(value) not in layers)
        ]

    @property
    def words(self) -> int:
        """How many logits each place has."""
        return _words(self.backbone)

    def __call__(self, hidden: Tensor) -> Tensor:
        """(places, width) -> logits, (places, words)."""
        given = dataclasses.replace(self.outputs, last_hidden_state=hidden[None])
        model = _with_layers(self.backbone, lambda *_, **__: given)
        with compute(self.machine):
            made: Tensor = type(model).forward(model, use_cache=False).logits[0]
        return made

    def pieces(self, places: int) -> Iterator[slice]:
        """The places, some at a time, about as many each time."""
        most = max(1, _most(self.backbone, self.machine) // self.words)
        size = max(1, -(-places // -(-places // most))) if places else 1
        yield from (slice(first, first + size) for first in range(0, places, size))


def _words(backbone: Any) -> int:
    """How many logits a place has; 0 if it cannot be told."""
    head = backbone.get_output_embeddings()
    return int(getattr(head, "out_features", 0) or getattr(head, "num_embeddings", 0))


def _most(backbone: Any, machine: Hardware) -> int:
    """How many logits may be there at once."""
    weight = getattr(backbone.get_output_embeddings(), "weight", None)
    return most_logits(machine.device == "cuda", bool(weight is not None and weight.requires_grad))


def _are_many(places: int, backbone: Any, machine: Hardware) -> bool:
    """Whether logits of so many places are too many, and the head is one that can be taken apart."""
    if places * _words(backbone) <= _most(backbone, machine) or not _name(backbone):
        return False
    # Shared weights are whole only inside the model's own forward.
    return not isinstance(backbone.get_output_embeddings().weight, DTensor)


def _name(backbone: Any) -> str:
    """Of the part of a model that makes the last hidden states; empty if there is none."""
    name: str = backbone.base_model_prefix
    return name if name in backbone._modules else ""


class _Reached(Exception):
    """The layers have been gone through."""

    def __init__(self, outputs: Any) -> None:
        self.outputs = outputs


def _reach(backbone: Any, inputs: dict[str, Any], machine: Hardware) -> Any:
    """What the model's layers make of the inputs, or None if that cannot be had without the head."""
    layers = getattr(backbone, _name(backbone))

    def stop(*given: Any, **named: Any) -> None:
        raise _Reached(layers(*given, **named))

    model = _with_layers(backbone, stop)
    try:
        with compute(machine):
            type(model).forward(model, **inputs)
    except _Reached as reached:
        return reached.outputs if dataclasses.is_dataclass(reached.outputs) else None
    except AttributeError:  # it asks for a part of its layers: nothing was computed yet
        return None
    return None


def _with_layers(backbone: Any, layers: Callable[..., Any]) -> Any:
    """The same model with that function for its layers; the model itself is not changed."""
    model = object.__new__(type(backbone))
    model.__dict__.update(backbone.__dict__)
    model.__dict__["_modules"] = {**backbone._modules, _name(backbone): layers}
    return model


def _by_pieces(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    made: Tensor = _Pieces.apply(hidden, targets, head, *head.trained)  # type: ignore[no-untyped-call]
    return made


class _Pieces(torch.autograd.Function):
    """Cross-entropy in float32: (targets, width), (targets,) -> (targets,).

    Gradients are made with the losses, while a piece's logits are there, as if each loss counted
    once; on the way back they are multiplied by what it counts.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, *trained: Tensor) -> Tensor:
        learns = any(ctx.needs_input_grad)
        losses, back, sums = (fused.pieces if fused.suits(head) else _pieces)(
            head, hidden.detach(), targets, learns=learns
        )
        if learns:
            ctx.back, ctx.sums = back, sums
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        back, sums = ctx.back, ctx.sums
        del ctx.back, ctx.sums
        if sums and not bool((gradient == gradient[0]).all()):
            raise NotImplementedError("A head that is trained needs losses that count the same.")
        into = back.mul_(gradient[:, None])
        return into, None, None, *(one if one is None else one.mul_(gradient[0]) for one in sums)


Made = tuple[Tensor, Tensor | None, list[Tensor | None]]


def _pieces(head: Head, hidden: Tensor, targets: Tensor, *, learns: bool) -> Made:
    """Losses, and the gradients of their sum: of the hidden states, and of what the head trains."""
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    back = torch.empty_like(hidden) if learns else None
    sums: list[Tensor | None] = [None] * len(head.trained)
    with lanes.at_once():
        for piece in head.pieces(len(hidden)):
            with torch.set_grad_enabled(learns):
                given = hidden[piece].requires_grad_(learns)
                made = _Losses.apply(head(given), targets[piece])  # type: ignore[no-untyped-call]
            losses[piece] = made.detach()
            if back is None:
                continue
            back[piece], *found = torch.autograd.grad(
                made, [given, *head.trained], torch.ones_like(made), allow_unused=True
            )
            for place, part in enumerate(found):
                if part is not None:
                    before = sums[place]
                    sums[place] = part if before is None else before.add_(part)
    return losses, back, sums


class _Losses(torch.autograd.Function):
    """Cross-entropy in float32: (targets, words), (targets,) -> (targets,).

    On the way back what was kept becomes the gradient itself, in place.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        logs = functional.log_softmax(logits, -1, dtype=torch.float32)
        losses = -logs.gather(1, targets[:, None])[:, 0]
        if ctx.needs_input_grad[0]:
            ctx.logs, ctx.targets, ctx.given = logs, targets, logits.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        into = ctx.logs.exp_()
        del ctx.logs
        into.scatter_add_(1, ctx.targets[:, None], into.new_full((len(into), 1), -1.0))
        return into.mul_(gradient[:, None]).to(ctx.given), None
