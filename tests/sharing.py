"""Processes that share a training, for tests: `python -m tests.sharing FOLDER RANK SIZE`.

All train each case; the first process writes into FOLDER what came out.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file

from app.errors import StudioError
from app.points import Measured
from tests import engine
from tests.engine import MACHINE, NARROW, Setup, Tight
from worker import backbones, checkpoints, distributed

EXAMPLES = engine.rows(21)  # in steps of ten: in the last of an epoch, two processes share one
HALFWAY = 3
RESUMED = ("lora", "tied")  # go on from what one process saved


class Case(NamedTuple):
    """A method on a model of the folder `models`, with what differs from the usual."""

    key: str
    model: str = "llama"
    machine: backbones.Hardware = MACHINE
    changes: tuple[tuple[str, Any], ...] = ()

    def setup(self, folder: Path, group: distributed.Group = distributed.ALONE) -> Setup:
        """The model before the first step."""
        changes = {"num_epochs": 2, "batch_size": 5, "accumulate_steps": 2, "weight_decay": 0.1}
        if self.key in {"lora", "qlora"}:
            changes["dropout"] = 0.0  # what it drops depends on how examples lie in rows
        changes |= dict(self.changes)
        return Setup(folder / "models" / self.model, self.key, self.machine, group=group, **changes)


TIGHT = Tight(*MACHINE)
CASES = {
    **{key: Case(key, machine=TIGHT) for key in engine.QUICK},
    "tied": Case("full", "tied", changes=(("gradient_checkpointing", True),)),
    "plain rows": Case("full", "bloom", TIGHT),
    "narrow": Case("full", machine=NARROW),
}


def until(setup: Setup, step: int) -> list[Measured]:
    """The points of a training until that step is done."""
    points = []
    for item in setup.going(EXAMPLES):
        if isinstance(item, Measured):
            points.append(item)
            if item.kind == "train" and item.step == step:
                break
    return points


def train(name: str, folder: Path, group: distributed.Group) -> None:
    """Train a case to its end, from a checkpoint where there is one, leaving one halfway."""
    out = folder / "out" / name
    out.mkdir(parents=True, exist_ok=True)
    setup = CASES[name].setup(folder, group)
    checkpoints.load(folder / "in" / name, setup.state)
    group.align(setup.state.step, setup.state.trained.values())
    points = until(setup, HALFWAY + (name in RESUMED))
    if group.leads:
        checkpoints.save(out / "checkpoints", setup.state)
        backbones.save_tuned(
            setup.model,
            out / "tuned",
            base_name="tiny",
            base_folder=folder / "models" / CASES[name].model,
            machine=setup.machine,
        )
    else:
        setup.state.tensors()
        if group.spreads:
            distributed.whole_values(setup.model, setup.machine.precision)
    points += setup.points(examples=EXAMPLES)
    state = setup.state.tensors()
    if group.leads:
        save_file(state, out / "state.safetensors")
        (out / "points.json").write_text(json.dumps([point._asdict() for point in points]))


def give_up(name: str, folder: Path, group: distributed.Group) -> None:
    """Train where every loss is no number, and write what was said."""
    setup = CASES[name].setup(folder, group)
    next(iter(setup.state.trained.values())).data.fill_(float("inf"))
    try:
        setup.points(examples=EXAMPLES)
    except StudioError as error:
        (folder / "out" / f"{name} {group.rank}.txt").write_text(error.message)


def main() -> None:
    """Train all cases."""
    folder, rank, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    join = distributed.join(str(folder / "store"), rank, size, MACHINE, spreads=False)
    spread = distributed.Shards(rank, size)
    for name, case in CASES.items():
        train(name, folder, spread if case.key == "full" else join)
    give_up("full", folder, spread)
    give_up("lora", folder, join)


if __name__ == "__main__":
    main()
