"""Two processes train as one does: the same points, norms and values, and checkpoints for each other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from app import grouping, storage
from app.points import Measured
from tests import engine, sharing, tiny
from tests.sharing import CASES, EXAMPLES, HALFWAY
from worker import backbones, distributed, evaluate
from worker.packing import Row

SLOW = 560  # seconds: on a busy machine the two wait for each other at every step
pytestmark = pytest.mark.timeout(600)
SHARP = {"initializer_range": 0.15}
CLOSE = 1e-5  # relative: sums of float32 in another order
CLOSE_GPU = 1e-3  # its sums are not the same from one time to the next
CLOSE_4_BITS = 3e-3  # one process alone differs as much if its rows are cut in another way
CLOSE_NARROW = 5e-2  # bfloat16 has eight bits, and the differences grow from step to step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and under `in` checkpoints that one process has written halfway."""
    made = tmp_path_factory.mktemp("sharing")
    (made / "out").mkdir()
    tiny.model(made / "models" / "llama", **SHARP)
    tiny.model(made / "models" / "tied", tie_word_embeddings=True, **SHARP)
    tiny.model(made / "models" / "bloom", architecture="bloom", n_head=4, **SHARP)
    for name in sharing.RESUMED:
        setup = CASES[name].setup(made)
        sharing.until(setup, HALFWAY)
        (made / "in" / name).mkdir(parents=True)
        sharing.save(made / "in" / name, setup, made / "models" / CASES[name].model)
    return made


def start(folder: Path, device: str) -> Path:
    """Have two processes train all cases together; where they write."""
    store = folder / "store"
    store.unlink(missing_ok=True)
    begun = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.sharing", str(folder), str(rank), "2", device],
            cwd=storage.REPOSITORY,
            env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=SLOW)[0] for process in begun]
    finally:
        for process in begun:
            process.kill()
    assert [process.returncode for process in begun] == [0, 0], "\n".join(said)
    return folder / "out"


@pytest.fixture(scope="module")
def out(folder: Path) -> Path:
    """What two processes on the CPU wrote."""
    return start(folder, "cpu")


def together(out: Path, name: str) -> tuple[list[Measured], dict[str, Tensor]]:
    """The points and the last state of the two."""
    points = json.loads((out / name / "points.json").read_text())
    return [Measured(**point) for point in points], load_file(out / name / "state.safetensors")


def check(points: list[Measured], true: list[Measured], close: float) -> None:
    assert [told(point) for point in points] == [told(point) for point in true]
    for one, other in zip(points, true, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=close)
        if other.grad_norm is not None:
            assert one.grad_norm == pytest.approx(other.grad_norm, rel=close)


def check_values(state: dict[str, Tensor], true: dict[str, Tensor], close: float) -> None:
    """Values whose gradient is zero but for rounding, as of a bias of keys, move at random."""
    assert state.keys() == true.keys()
    names = [name.removeprefix("value.") for name in true if name.startswith("value.")]
    least = 1e-9 * max(float(true[f"exp_avg_sq.{name}"].max()) for name in names)
    for name in names:
        moved = true[f"exp_avg_sq.{name}"] > least
        one, other = (values[f"value.{name}"][moved] for values in (state, true))
        assert (one - other).norm() <= close * other.norm(), name


def told(point: Measured) -> tuple[object, ...]:
    return (point.kind, point.step, point.epoch, point.learning_rate, point.tokens)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one_does(folder: Path, out: Path, name: str) -> None:
    case = CASES[name]
    alone = case.setup(folder)
    points = alone.points(examples=EXAMPLES)
    found, state = together(out, name)
    if name in sharing.RESUMED:  # the two went on from where one process had stopped
        points = points[-len(found) :]
        assert (found[0].kind, found[0].step) == ("validation", HALFWAY)
    if case.machine.dtype == "bfloat16":
        check(found[:3], points[:3], CLOSE_NARROW)
        return
    close = CLOSE_4_BITS if case.key == "qlora" else CLOSE
    check(found, points, close)
    check_values(state, alone.state.tensors(), close)


@pytest.mark.parametrize("name", CASES)
def test_one_process_goes_on_from_what_two_have_saved(folder: Path, out: Path, name: str) -> None:
    setup = CASES[name].setup(folder)
    sharing.load(out / name, setup)
    assert setup.state.step == HALFWAY + (name in sharing.RESUMED)
    saved = torch.cat([value.detach().flatten() for value in setup.state.trained.values()])
    found, _ = together(out, name)
    rest = setup.points(examples=EXAMPLES)
    bits = setup.machine.dtype == "bfloat16"
    close = CLOSE_NARROW if bits else CLOSE_4_BITS if setup.method.key == "qlora" else CLOSE
    check(rest[:2], found[-len(rest) :][:2], close)
    assert not torch.equal(
        saved, torch.cat([value.detach().flatten() for value in setup.state.trained.values()])
    )


@pytest.mark.parametrize("name", CASES)
def test_what_two_have_tuned_is_loaded_by_one(folder: Path, out: Path, name: str) -> None:
    """In the files that people take away is what was trained, tied weights once."""
    case = CASES[name]
    setup = case.setup(folder)
    sharing.load(out / name, setup)
    base = folder / "models" / case.model
    tuned, soft = backbones.load_tuned(
        setup.method, setup.params, base, out / name / "tuned", case.machine
    )
    examples = engine.rows(9)
    lost = [
        evaluate.mean(
            [
                loss
                for some in evaluate.losses(model, prefix, examples, case.machine, plain=True)
                for loss in some
            ]
        )
        for model, prefix in ((setup.model, setup.soft_prefix), (tuned, soft))
    ]
    narrow = case.machine.dtype == "bfloat16"
    assert lost[1] == pytest.approx(lost[0], rel=CLOSE_NARROW if narrow else CLOSE)
    if case.model == "tied":
        assert "lm_head.weight" not in load_file(out / name / "tuned" / "model.safetensors")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="not run: no GPU, or only one")
def test_two_gpus_train_as_one_does(folder: Path) -> None:
    out = start(folder, "cuda")
    for name in ("full", "lora", "prompt_tuning"):
        alone = CASES[name].setup(folder, device="cuda")
        points = alone.points(examples=EXAMPLES)
        found, _ = together(out, name)
        check(found, points[-len(found) :], CLOSE_GPU)


@pytest.mark.parametrize("key", ["full", "lora"])
def test_all_give_up_together_when_the_loss_stays_no_number(out: Path, key: str) -> None:
    said = [(out / f"{key} {rank}.txt").read_text() for rank in range(2)]
    assert said[0] == said[1]
    assert "Training stopped at step 3 of 6" in said[0]


def test_examples_are_dealt_by_their_tokens() -> None:
    lengths = [9, 2, 3, 9, 4, 2, 30]
    rows = [Row([5] * (length - 1), [7]) for length in lengths]
    dealt = grouping.deal(range(7), lengths, 3)
    assert sorted(index for part in dealt for index in part) == list(range(7))
    assert [sum(lengths[index] for index in part) for part in dealt] == [30, 15, 14]
    assert grouping.deal(range(1), lengths, 3) == [[0], [], []]
    assert distributed.ALONE.rows(rows, 1000, 0, plain=False)[0][1] == 1.0
