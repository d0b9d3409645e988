"""On a GPU training gives what it gives on a processor: losses and gradients of every method."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from app import grouping, methods
from app.points import Measured
from tests import tiny
from tests.engine import MACHINE, Setup, rows, same
from worker import checkpoints, hardware, head, learn, packing
from worker.backbones import num_virtual
from worker.checkpoints import Found

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: no GPU"),
]
GPU = MACHINE._replace(device="cuda")  # float32, so that figures can be compared
CLOSE = 1e-3  # a GPU adds up in another order
CLOSE_IN_4_BITS = 3e-2
KEYS = list(methods.METHODS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model(tmp_path_factory.mktemp("gpu"), initializer_range=0.15)


def setup(folder: Path, key: str, machine: hardware.Hardware, **changes: object) -> Setup:
    no_chance = {"dropout": 0.0} if "lora" in key else {}  # each device draws other numbers
    return Setup(folder, key, machine, **no_chance | changes)  # type: ignore[arg-type]


def learned(made: Setup) -> dict[str, Tensor]:
    """Loss and gradients of some examples in packed rows that borrow their prefix, in RAM."""
    packed = packing.pack(rows(12), 60, num_virtual(made.soft_prefix), lend=True)
    assert packed[1].layout is not None
    assert packed[1].layout.borrows
    learner = learn.Learner(made.model, made.soft_prefix, made.state.trained, made.machine)
    step = learner.step([learn.Part(row, 1.0, 1) for row in packed], paired=False)
    total = sum(loss for loss, _ in step)
    grads = {
        name: value.grad.cpu()
        for name, value in made.state.trained.items()
        if value.grad is not None
    }
    return {"loss": torch.tensor(total)} | grads


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "pieces"])
@pytest.mark.parametrize("key", KEYS)
def test_losses_and_gradients_are_the_processors(
    folder: Path, key: str, pieces: bool, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouping, "LEAST_LENT", 1)
    on_cpu, on_gpu = (
        setup(folder, key, machine, gradient_checkpointing=checkpointing)
        for machine in (MACHINE, GPU)
    )
    for name, value in on_gpu.state.trained.items():  # where a vector starts is drawn on the device
        value.data.copy_(on_cpu.state.trained[name].data)
    true = learned(on_cpu)
    if pieces:
        monkeypatch.setattr(head, "most_logits", lambda *_: 777)
    found = learned(on_gpu)
    assert found.keys() == true.keys()
    close = CLOSE_IN_4_BITS if key == "qlora" else CLOSE
    whole = torch.stack([value.norm() for value in true.values()]).norm()
    for name, value in true.items():
        scale = max(value.norm(), 1e-3 * whole)
        assert (found[name] - value).norm() <= close * scale, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("key", KEYS)
def test_every_method_learns_on_a_gpu_with_its_default_dropout(
    folder: Path, key: str, dtype: str
) -> None:
    made = Setup(folder, key, GPU._replace(dtype=dtype), num_epochs=8)
    assert made.state.obstacle == ""
    assert not made.state.paired
    lost = [point.loss for point in made.points() if point.kind == "train"]
    assert lost[-1] < 0.8 * lost[0]  # type: ignore[operator]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_training_goes_on_from_a_checkpoint(folder: Path, tmp_path: Path, optimizer: str) -> None:
    made, fresh = (setup(folder, "full", GPU, optimizer=optimizer) for _ in range(2))
    for item in made.going():
        if isinstance(item, Measured) and item.kind == "train" and item.step == 2:
            break
    saved = checkpoints.write(tmp_path / "2", made.state)
    found = Found(2, 1, tmp_path / "2", saved.digest)
    assert checkpoints.load([found], fresh.state) == checkpoints.Loaded(found, [])
    assert same(fresh.state.tensors(), made.state.tensors())
    left = [
        [
            item.loss
            for item in one.going()
            if isinstance(item, Measured) and item.kind == "train" and item.step <= 5
        ]
        for one in (made, fresh)
    ]
    assert left[1] == pytest.approx(left[0], rel=CLOSE)
