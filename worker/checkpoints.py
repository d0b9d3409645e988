"""The state of a training, and its checkpoints: written whole or not at all, verified before they are used."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from app import fingerprints, storage
from app.crashpoints import crashpoint
from app.registry import MANIFEST, Made
from app.storage import Path
from worker import distributed, optimizers

VALUES, NUMBERS = "values.safetensors", "state.json"
LATER = {"stale": 0, "best_score": None}  # what the first checkpoints did not have


@dataclass
class State:
    """All that is needed to go on exactly, as of the last complete step, whenever it is read.

    The order of examples and the dropout of a step follow from seed and step, so neither is here.
    """

    trained: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    obstacle: str  # why rows are plain instead of packed; empty where they are packed
    paired: bool = False  # whether two rows are worked on at a time
    step: int = 0
    looked: int = -1  # the last step whose validation loss is known
    best_loss: float | None = None  # of the best state
    best_score: float | None = None  # likewise, where answers are scored
    best_step: int = 0
    seconds: float = 0.0  # of training alone
    tokens: int = 0
    skipped: int = 0  # steps in a row that were not applied
    stale: int = 0  # looks in a row that were not better
    NUMBERS = (
        *("step", "looked", "best_loss", "best_score", "best_step"),
        *("seconds", "tokens", "skipped", "stale"),
    )

    def numbers(self) -> dict[str, Any]:
        """The position, fit for JSON."""
        return {name: getattr(self, name) for name in self.NUMBERS}

    def tensors(self) -> dict[str, Tensor]:
        """Trained values and the optimizer's moments, under names of their own; not copied.

        Where they are spread over several processes each must ask, and the first gets them.
        """
        return distributed.gathered(self.parts())

    def parts(self) -> dict[str, Tensor]:
        """The same, each as it is in this process."""
        found: dict[str, Tensor] = {}
        for name, value in self.trained.items():
            found[f"value.{name}"] = value.detach()
            for kind, moment in optimizers.state(self.optimizer, value).items():
                found[f"{kind}.{name}"] = moment
        return found

    def restore(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go back to what `numbers` and `tensors` gave.

        Raises KeyError or ValueError, and changes nothing, if they do not fit this model.
        """
        kinds, moments = optimizers.KEPT, {}
        for name, value in self.trained.items():
            if tensors[f"value.{name}"].shape != value.shape:
                raise ValueError(f"{name} has another shape")
            found = {kind: tensors.get(f"{kind}.{name}") for kind in kinds}
            moments[name] = {kind: part for kind, part in found.items() if part is not None}
            optimizers.check(self.optimizer, moments[name])
        for name, value in self.trained.items():
            value.data.copy_(distributed.part(tensors[f"value.{name}"], value))
            optimizers.restore(self.optimizer, value, moments[name])
        for name in self.NUMBERS:
            setattr(self, name, {**LATER, **numbers}[name])


class Found(NamedTuple):
    """A checkpoint that its row says is whole."""

    step: int
    attempt: int
    path: Path
    digest: str  # of its manifest


class Loaded(NamedTuple):
    """Which checkpoint was taken, if any, and a sentence on each newer one that was passed over."""

    taken: Found | None
    damaged: list[str]


def num_bytes(state: State) -> int:
    """What saving the state takes on the disk."""
    return sum(part.nbytes for part in state.parts().values()) + 2**16


def write(new: Path, state: State) -> Made:
    """Write `state` into the folder `new`, and have all of it on the disk before this returns."""
    started = time.monotonic()
    storage.remove(new)  # left by a try that failed
    new.mkdir(parents=True)
    crashpoint("checkpoint.begun")
    save_file(state.tensors(), new / VALUES)
    crashpoint("checkpoint.values")
    (new / NUMBERS).write_text(json.dumps(state.numbers()))
    crashpoint("checkpoint.numbers")
    manifest = json.dumps({name: _digest(new / name) for name in (VALUES, NUMBERS)})
    (new / MANIFEST).write_text(manifest)
    crashpoint("checkpoint.manifest")
    sync(new)
    crashpoint("checkpoint.synced")
    digest = hashlib.sha256(manifest.encode()).hexdigest()
    return Made(state.step, digest, storage.size(new), time.monotonic() - started)


def load(found: Iterable[Found], state: State) -> Loaded:
    """Bring `state` to the first of these that is whole; without one it stays as it is."""
    damaged: list[str] = []
    for one in found:
        try:
            _verify(one)
            numbers = json.loads((one.path / NUMBERS).read_text())
            state.restore(numbers, load_file(one.path / VALUES))
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip("'\"")
            damaged.append(f"The checkpoint of step {one.step} is damaged: {reason}.")
            continue
        return Loaded(one, damaged)
    return Loaded(None, damaged)


def settle(new: Path, final: Path) -> None:
    """Give the folder `new` its name `final`, in place of what stood there, once it is on the disk."""
    sync(new)
    place(new, final)


def sync(folder: Path) -> None:
    """Have all files of the folder on the disk before this returns."""
    for path in folder.iterdir():
        storage.sync(path)
    storage.sync(folder)


def place(new: Path, final: Path) -> None:
    """Give `new` its name `final`; what stood there goes only after that. See `mend`."""
    if not new.exists():
        return  # an earlier try got this far
    aside = _aside(final)
    storage.remove(aside)
    if final.exists():
        final.rename(aside)
        crashpoint("files.set_aside")
    new.rename(final)
    storage.sync(final.parent)
    crashpoint("files.placed")
    storage.remove(aside)


def mend(final: Path) -> None:
    """Bring back what `place` had set aside when it was killed before the new one had its name."""
    if not final.exists() and _aside(final).exists():
        _aside(final).rename(final)


def _aside(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


def _digest(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": fingerprints.of_file(path)}


def _verify(found: Found) -> None:
    """Raise ValueError or OSError unless all files are as they were written."""
    manifest = (found.path / MANIFEST).read_bytes()
    if hashlib.sha256(manifest).hexdigest() != found.digest:
        raise ValueError(f"{MANIFEST} is not what was written")
    for name, expected in json.loads(manifest).items():
        if _digest(found.path / name) != expected:
            raise ValueError(f"{name} is not what was written")
