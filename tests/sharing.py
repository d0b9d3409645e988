"""Processes that share a training, for tests: `python -m tests.sharing FOLDER RANK SIZE DEVICE`.

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
from worker import backbones, checkpoints, distributed, hardware

EXAMPLES = engine.rows(21)  # in steps of ten: in the last of an epoch, two processes share one
HALFWAY = 3
RESUMED = ("lora", "tied")  # go on from what one process saved


class Case(NamedTuple):
    """A method on a model of the folder `models`, with what differs from the usual."""

    key: str
    model: str = "llama"
    machine: hardware.Hardware = MACHINE
    changes: tuple[tuple[str, Any], ...] = ()

    def setup(
        self, folder: Path, group: distributed.Group = distributed.ALONE, device: str = "cpu"
    ) -> Setup:
        """The model before the first step."""
        machine = self.machine._replace(device=device)
        changes = {"num_epochs": 2, "batch_size": 5, "accumulate_steps": 2, "weight_decay": 0.1}
        if self.key in {"lora", "qlora"}:
            changes["dropout"] = 0.0  # what it drops depends on how examples lie in rows
        changes |= dict(self.changes)
        return Setup(folder / "models" / self.model, self.key, machine, group=group, **changes)


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


def save(out: Path, setup: Setup, base: Path) -> None:
    """Leave a checkpoint and a tuned model, as a run does."""
    if not setup.group.leads:
        setup.state.tensors()
        if setup.group.spreads:
            distributed.whole_values(setup.model, setup.machine.precision)
        return
    made = checkpoints.write(out / "checkpoint", setup.state)
    (out / "digest.txt").write_text(made.digest)
    backbones.save_tuned(
        setup.model, out / "tuned", base_name="tiny", base_folder=base, machine=setup.machine
    )


def load(out: Path, setup: Setup) -> None:
    """Go on from what `save` left in that folder, if it did."""
    if (out / "digest.txt").exists():
        digest = (out / "digest.txt").read_text()
        loaded = checkpoints.load(
            [checkpoints.Found(HALFWAY, 1, out / "checkpoint", digest)], setup.state
        )
        assert loaded.taken, loaded.damaged


def train(name: str, folder: Path, group: distributed.Group, device: str) -> None:
    """Train a case to its end, from a checkpoint where there is one, leaving one halfway."""
    out = folder / "out" / name
    out.mkdir(parents=True, exist_ok=True)
    setup = CASES[name].setup(folder, group, device)
    load(folder / "in" / name, setup)
    group.align(setup.state.step, setup.state.trained.values())
    points = until(setup, HALFWAY + (name in RESUMED))
    save(out, setup, folder / "models" / CASES[name].model)
    points += setup.points(examples=EXAMPLES)
    state = setup.state.tensors()
    if group.leads:
        save_file(state, out / "state.safetensors")
        (out / "points.json").write_text(json.dumps([point._asdict() for point in points]))


def give_up(name: str, folder: Path, group: distributed.Group, device: str) -> None:
    """Train where every loss is no number, and write what was said."""
    setup = CASES[name].setup(folder, group, device)
    next(iter(setup.state.trained.values())).data.fill_(float("inf"))
    try:
        setup.points(examples=EXAMPLES)
    except StudioError as error:
        (folder / "out" / f"{name} {group.rank}.txt").write_text(error.message)


def main() -> None:
    """Train all cases."""
    folder, rank, size, device = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    machine = MACHINE._replace(device=device)
    join = distributed.join(str(folder / "store"), rank, size, machine, spreads=False)
    spread = distributed.Shards(rank, size)
    for name, case in CASES.items():
        train(name, folder, spread if case.key == "full" else join, device)
    give_up("full", folder, spread, device)
    give_up("lora", folder, join, device)
    join.leave()


if __name__ == "__main__":
    main()
