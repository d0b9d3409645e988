"""The state of a training, and its checkpoints: written whole or not at all, verified before they are used."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from app import storage
from app.storage import Path
from worker import distributed

KEPT = 2
VALUES, NUMBERS, MANIFEST = "values.safetensors", "state.json", "manifest.json"


@dataclass
class State:
    """All that is needed to go on exactly, as of the last complete step, whenever it is read.

    The order of examples and the dropout of a step follow from seed and step, so neither is here.
    """

    trained: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.AdamW
    obstacle: str  # why rows are plain instead of packed; empty where they are packed
    step: int = 0
    looked: int = -1  # the last step whose validation loss is known
    best_loss: float | None = None
    best_step: int = 0
    seconds: float = 0.0  # of training alone
    tokens: int = 0
    skipped: int = 0  # steps in a row that were not applied
    NUMBERS = ("step", "looked", "best_loss", "best_step", "seconds", "tokens", "skipped")

    def numbers(self) -> dict[str, Any]:
        """The position, fit for JSON."""
        return {name: getattr(self, name) for name in self.NUMBERS}

    def tensors(self) -> dict[str, Tensor]:
        """Trained values and the optimizer's moments, under names of their own; not copied.

        Where they are spread over several processes each must ask, and the first gets them.
        """
        found: dict[str, Tensor] = {}
        for name, value in self.trained.items():
            found[f"value.{name}"] = value.detach()
            for kind, moment in self.optimizer.state.get(value, {}).items():
                found[f"{kind}.{name}"] = moment
        return distributed.gathered(found)

    def restore(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go back to what `numbers` and `tensors` gave.

        Raises KeyError or ValueError, and changes nothing, if they do not fit this model.
        """
        for name, value in self.trained.items():
            if tensors[f"value.{name}"].shape != value.shape:
                raise ValueError(f"{name} has another shape")
        for name, value in self.trained.items():
            value.data.copy_(distributed.part(tensors[f"value.{name}"], value))
            for kind in ("step", "exp_avg", "exp_avg_sq"):
                if (moment := tensors.get(f"{kind}.{name}")) is not None:
                    self.optimizer.state[value][kind] = distributed.part(moment, value)
        for name in self.NUMBERS:
            setattr(self, name, numbers[name])


class Loaded(NamedTuple):
    """Which checkpoint was taken, if any, and a sentence on each newer one that was passed over."""

    path: Path | None
    damaged: list[str]


def save(folder: Path, state: State) -> Path:
    """Write `state` into a folder of its own in `folder` and remove all but the last two.

    Power may fail at any moment: the folder gets its name only after all in it is on the disk.
    """
    final = folder / f"{state.step:08d}"
    new = folder / f".{final.name}.new"
    for half in folder.glob(".*.new"):  # left by a writer that died
        storage.remove(half)
    new.mkdir(parents=True)
    save_file(state.tensors(), new / VALUES)
    (new / NUMBERS).write_text(json.dumps(state.numbers()))
    manifest = {name: _digest(new / name) for name in (VALUES, NUMBERS)}
    (new / MANIFEST).write_text(json.dumps(manifest))
    settle(new, final)  # one of the same step holds the same, if it is whole
    for old in _all(folder)[KEPT:]:
        storage.remove(old)
    return final


def load(folder: Path, state: State) -> Loaded:
    """Bring `state` to the newest checkpoint that is whole; without one it stays as it is."""
    damaged: list[str] = []
    for path in _all(folder):
        try:
            _verify(path)
            state.restore(json.loads((path / NUMBERS).read_text()), load_file(path / VALUES))
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip("'\"")
            damaged.append(f"The checkpoint of step {int(path.name)} is damaged: {reason}.")
            continue
        return Loaded(path, damaged)
    return Loaded(None, damaged)


def settle(new: Path, final: Path) -> None:
    """Give the folder `new` its name `final`, in place of what stood there, once it is on the disk."""
    for path in new.iterdir():
        _sync(path)
    _sync(new)
    storage.remove(final)
    new.rename(final)
    _sync(final.parent)


def _all(folder: Path) -> list[Path]:
    """The checkpoints, the newest first."""
    found = folder.iterdir() if folder.is_dir() else []
    return sorted((path for path in found if path.name.isdigit()), reverse=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _verify(path: Path) -> None:
    """Raise ValueError or OSError unless all files are as they were written."""
    for name, expected in json.loads((path / MANIFEST).read_text()).items():
        if _digest(path / name) != expected:
            raise ValueError(f"{name} is not what was written")
