"""The processes that share a run, one for each device: who takes which examples, and what is added up."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from app import grouping
from app.errors import StudioError
from worker import packing
from worker.hardware import BFLOAT16, FLOAT32, Hardware
from worker.packing import Example, Packed

PATIENCE = datetime.timedelta(hours=1)  # for one process that saves while the others wait
Rows = list[tuple[Packed, float]]


class Group:
    """One process has the run to itself: the null form of what several do together.

    Where there are several, each calls the same methods in the same order.
    """

    rank = 0
    size = 1
    spreads = False  # whether each process holds only a part of every weight

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes to the database and the disk."""
        return self.rank == 0

    def spread(self, model: Any, machine: Hardware) -> None:
        """Leave only this process's part of the weights here, where they are spread."""

    def align(self, step: int, trained: Iterable[Tensor]) -> None:
        """See to it that all begin at the same step with the same values."""

    def rows(self, examples: Sequence[Example], budget: int, virtual: int, **how: bool) -> Rows:
        """This process's packed rows of the examples, each with the weight that its loss has;
        `how` as for `packing.pack`."""
        return [(row, 1.0) for row in packing.pack(examples, budget, virtual, **how)]

    def sum_gradients(self, trained: Mapping[str, Tensor]) -> None:
        """Bring the gradients of all processes together."""

    def sums(self, *values: float) -> tuple[float, ...]:
        """Each value added up over all processes."""
        return values

    def told(self, number: int) -> int:
        """The number that the first process gives."""
        return number

    def agreed(self, machine: Hardware) -> Hardware:
        """The machine, making products as the first process has found best."""
        fast = self.told(int(machine.computed is torch.float32))
        return machine._replace(products=FLOAT32 if fast else BFLOAT16)

    def leave(self) -> None:
        """Say good-bye: from here on each is on its own."""


ALONE = Group()


class Copies(Group):
    """Each process holds the whole model and trains on its share of a step's examples."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def align(self, step: int, trained: Iterable[Tensor]) -> None:
        """Take the first process's values; raises StudioError if it is at another step."""
        if self.told(step) != step:
            raise StudioError(
                "The processes that share this run do not read the same checkpoint, so it cannot "
                "go on from there. What was saved is kept. See that they work on one home folder."
            )
        for value in trained:
            if not isinstance(value, DTensor):
                dist.broadcast(value.detach(), src=0)

    def rows(self, examples: Sequence[Example], budget: int, virtual: int, **how: bool) -> Rows:
        """The rows of the examples dealt to this process; none where there are too few for all."""
        lengths = [_tokens(example) for example in examples]
        dealt = grouping.deal(range(len(examples)), lengths, self.size)[self.rank]
        mine = [examples[index] for index in dealt]
        return super().rows(mine, budget, virtual, **how) if mine else []

    def sum_gradients(self, trained: Mapping[str, Tensor]) -> None:
        """One sum over all processes; none of them an average, since losses are parts of one sum."""
        values = list(trained.values())
        flat = torch.cat(
            [(torch.zeros_like(v) if v.grad is None else v.grad).flatten() for v in values]
        )
        dist.all_reduce(flat)
        parts = torch.split(flat, [value.numel() for value in values])
        for value, gradient in zip(values, parts, strict=True):
            value.grad = gradient.view_as(value)

    def sums(self, *values: float) -> tuple[float, ...]:
        """Each value added up over all processes."""
        gathered = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(gathered)
        return tuple(gathered.tolist())

    def told(self, number: int) -> int:
        """The number that the first process gives."""
        told = torch.tensor(number)
        dist.broadcast(told, src=0)
        return int(told)

    def leave(self) -> None:
        """Say good-bye: from here on each is on its own."""
        if dist.is_initialized():
            dist.destroy_process_group()


class Shards(Copies):
    """Each process holds a part of every weight, gradient and moment (FSDP2)."""

    spreads = True

    def spread(self, model: Any, machine: Hardware) -> None:
        """Shard each block of the model and then what is left of it, tied embeddings as one.

        Weights are kept in float32 and gathered, block by block, in the dtype computed in.
        """
        mesh = init_device_mesh(machine.device, (self.size,))
        mixed = MixedPrecisionPolicy()
        if machine.computed is not torch.float32:
            mixed = MixedPrecisionPolicy(machine.computed, reduce_dtype=torch.float32)
        blocks = set(getattr(model, "_no_split_modules", None) or ())
        kind = type(model)
        for module in reversed(list(model.modules())):
            if module is model or type(module).__name__ in blocks:
                fully_shard(module, mesh=mesh, mp_policy=mixed, reshard_after_forward=True)
                module.set_gradient_divide_factor(1.0)  # a sum, not an average
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
        # transformers looks a model's abilities up by the name and module of its class.
        type(model).__name__, type(model).__module__ = kind.__name__, kind.__module__

    def rows(self, examples: Sequence[Example], budget: int, virtual: int, **how: bool) -> Rows:
        """As many rows in every process, since each needs all the others' parts of the weights."""
        mine = super().rows(examples, budget, virtual, **how)
        most = torch.tensor(len(mine))
        dist.all_reduce(most, dist.ReduceOp.MAX)
        if len(mine) == most:
            return mine
        (spare,) = packing.pack([min(examples, key=_tokens)], budget, virtual, **how)
        return mine + [(spare, 0.0)] * (int(most) - len(mine))

    def sum_gradients(self, trained: Mapping[str, Tensor]) -> None:
        """They were summed row by row, on the way back."""


def join(store: str, rank: int, size: int, machine: Hardware, *, spreads: bool) -> Group:
    """Meet the other processes of a run through the file `store`; returns when all are there."""
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if machine.device == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=PATIENCE,
    )
    return (Shards if spreads else Copies)(rank, size)


def _tokens(example: Example) -> int:
    return len(example.prompt_ids) + len(example.answer_ids)


def whole(value: Tensor) -> Tensor:
    """All of a value of which this process may hold a part; then every process must ask at once."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, and those that are spread, whole and in the first process's RAM alone.

    Every process must call it, with the same names in the same order.
    """
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        full = whole(value)
        if full is value:
            found[name] = value
        elif dist.get_rank() == 0:
            found[name] = full.cpu()
    return found


def whole_values(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """All values of a model in that dtype, tied ones as one tensor.

    Where they are spread over several processes each must ask, and the first gets them.
    """
    parts = model.state_dict(keep_vars=True)
    made: dict[int, Tensor] = {}
    for part in parts.values():
        if id(part) not in made:
            narrow = part.is_floating_point()
            made[id(part)] = part.detach().to(dtype if narrow else part.dtype)
    whole = gathered({str(key): value for key, value in made.items()})
    return {name: whole[str(id(part))] for name, part in parts.items() if str(id(part)) in whole}


def part(full: Tensor, like: Tensor) -> Tensor:
    """What this process holds of a whole value that is to be spread as `like` is."""
    full = full.to(like.device)
    if not isinstance(like, DTensor) or full.shape != like.shape:
        return full
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def is_loss_of_others(error: BaseException) -> bool:
    """Whether this says that another process of the group has ended, rather than what went wrong."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)
