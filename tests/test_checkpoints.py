"""Checkpoints hold the state exactly, and a damaged one is passed over."""

from pathlib import Path

import pytest

from app.points import Measured
from tests.engine import Setup, same
from worker import checkpoints


def trained(folder: Path, steps: int) -> Setup:
    setup = Setup(folder, "lora")
    go_on(setup, steps)
    return setup


def go_on(setup: Setup, steps: int) -> None:
    for item in setup.going():
        if isinstance(item, Measured) and item.kind == "train" and item.step == steps:
            return


def test_a_state_comes_back_bit_for_bit(tiny_model: Path, tmp_path: Path) -> None:
    setup = trained(tiny_model, 3)
    path = checkpoints.save(tmp_path, setup.state)
    assert {part.name for part in path.iterdir()} == {
        "values.safetensors",
        "state.json",
        "manifest.json",
    }
    fresh = Setup(tiny_model, "lora", seed=8)
    loaded = checkpoints.load(tmp_path, fresh.state)
    assert loaded == checkpoints.Loaded(path, [])
    assert fresh.state.numbers() == setup.state.numbers()
    assert fresh.state.step == 3
    assert same(fresh.state.tensors(), setup.state.tensors())
    assert same(fresh.values(), setup.values())


def test_a_state_before_the_first_step_can_be_kept(tiny_model: Path, tmp_path: Path) -> None:
    setup = Setup(tiny_model, "prompt_tuning")
    checkpoints.save(tmp_path, setup.state)
    fresh = Setup(tiny_model, "prompt_tuning", seed=8)
    assert checkpoints.load(tmp_path, fresh.state).path
    assert same(fresh.values(), setup.values())


def test_the_last_two_are_kept(tiny_model: Path, tmp_path: Path) -> None:
    setup = Setup(tiny_model, "lora")
    (tmp_path / ".00000009.new").mkdir()  # a writer died here
    for step in (1, 2, 3):
        go_on(setup, step)
        checkpoints.save(tmp_path, setup.state)
    checkpoints.save(tmp_path, setup.state)  # the same step again
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["00000002", "00000003"]


def test_none_leaves_the_state_alone(tiny_model: Path, tmp_path: Path) -> None:
    setup = trained(tiny_model, 2)
    before = setup.values()
    assert checkpoints.load(tmp_path / "missing", setup.state) == checkpoints.Loaded(None, [])
    assert setup.state.step == 2
    assert same(setup.values(), before)


def damage(path: Path, how: str) -> None:
    values = path / "values.safetensors"
    if how == "bit":
        data = bytearray(values.read_bytes())
        data[-1] ^= 1
        values.write_bytes(data)
    elif how == "short":
        values.write_bytes(values.read_bytes()[:-10])
    elif how == "numbers":
        (path / "state.json").write_text('{"step": 9}')
    elif how == "missing":
        values.unlink()
    elif how == "manifest":
        (path / "manifest.json").write_text("{")
    else:
        (path / "manifest.json").unlink()


@pytest.mark.parametrize("how", ["bit", "short", "numbers", "missing", "manifest", "no manifest"])
def test_a_damaged_one_is_passed_over_and_named(tiny_model: Path, tmp_path: Path, how: str) -> None:
    setup = trained(tiny_model, 1)
    older = checkpoints.save(tmp_path, setup.state)
    go_on(setup, 2)
    damage(checkpoints.save(tmp_path, setup.state), how)
    fresh = Setup(tiny_model, "lora")
    loaded = checkpoints.load(tmp_path, fresh.state)
    assert loaded.path == older
    assert fresh.state.step == 1
    (sentence,) = loaded.damaged
    assert sentence.startswith("The checkpoint of step 2 is damaged: ")


def test_all_damaged_starts_anew(tiny_model: Path, tmp_path: Path) -> None:
    setup = trained(tiny_model, 1)
    damage(checkpoints.save(tmp_path, setup.state), "bit")
    fresh = Setup(tiny_model, "lora")
    before = fresh.values()
    loaded = checkpoints.load(tmp_path, fresh.state)
    assert loaded.path is None
    assert len(loaded.damaged) == 1
    assert fresh.state.step == 0
    assert same(fresh.values(), before)


def test_one_of_another_shape_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    checkpoints.save(tmp_path, trained(tiny_model, 1).state)
    other = Setup(tiny_model, "lora", rank=8)
    before = other.values()
    loaded = checkpoints.load(tmp_path, other.state)
    assert loaded.path is None
    assert "another shape" in loaded.damaged[0]
    assert same(other.values(), before)
