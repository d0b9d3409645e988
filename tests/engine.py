"""What the tests of the training engine share: a machine, examples, a model ready to be trained."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app import methods
from app.points import Measured
from tests.tiny import QUICK
from worker import backbones, checkpoints, hardware, train
from worker.distributed import ALONE, Group
from worker.packing import Row

# Models this small are slower with several threads, and much slower on a busy machine.
torch.set_num_threads(1)

MACHINE = hardware.Hardware("cpu", "float32", "test", 8000.0, 1)
NARROW = MACHINE._replace(dtype="bfloat16")
PREFIX = [1, 60, 61, 62, 63]


def rows(count: int = 24) -> list[Row]:
    """A task that can be learned: a shared beginning, some letters, and one of four answers."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for index in range(count):
        letters = torch.randint(40, 50, (2 + index % 5,), generator=draw).tolist()
        kind = 70 + letters[0] % 4
        made.append(Row([*PREFIX, *letters, 64], [kind, kind + 10, 2]))
    return made


class Tight(hardware.Hardware):
    """A machine with room for short rows only."""

    token_budget = 30  # type: ignore[assignment]


class Setup:
    """A method's model and state before the first step."""

    def __init__(
        self,
        folder: Path,
        key: str,
        machine: hardware.Hardware = MACHINE,
        seed: int = 3,
        group: Group = ALONE,
        **changes: Any,
    ) -> None:
        self.method = methods.get(key)
        self.params = self.method.schema(**QUICK.get(key, {}) | changes)
        self.machine, self.seed, self.group = machine, seed, group
        self.model, self.soft_prefix = backbones.load_trainable(
            self.method, self.params, folder, seed, machine, group
        )
        self.state: checkpoints.State = train.begin(
            self.model, self.soft_prefix, rows(), self.params, machine
        )

    def going(
        self, examples: list[Row] | None = None, **how: Any
    ) -> Iterable[Measured | train.Tick]:
        """Training that goes on as it is asked to."""
        examples = rows() if examples is None else examples
        return train.train(
            self.model,
            self.soft_prefix,
            examples,
            rows(9),
            self.params,
            self.seed,
            self.machine,
            self.state,
            usual_rates=self.method.usual_rates,
            **how,
            group=self.group,
        )

    def points(self, **how: Any) -> list[Measured]:
        """All points of a training to its end."""
        return [item for item in self.going(**how) if isinstance(item, Measured)]

    def values(self) -> dict[str, Tensor]:
        """Copies of every weight, trained or not."""
        return {name: value.detach().clone() for name, value in self.model.named_parameters()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether these are bit for bit the same."""
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )
