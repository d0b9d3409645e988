"""Checkpoints hold the state exactly, and a damaged one is passed over."""

from pathlib import Path

import pytest

from app.points import Measured
from tests.engine import Setup, same
from worker import checkpoints
from worker.checkpoints import Found


def trained(folder: Path, steps: int) -> Setup:
    setup = Setup(folder, "lora")
    go_on(setup, steps)
    return setup


def go_on(setup: Setup, steps: int) -> None:
    for item in setup.going():
        if isinstance(item, Measured) and item.kind == "train" and item.step == steps:
            return


def save(folder: Path, setup: Setup) -> Found:
    path = folder / str(setup.state.step)
    made = checkpoints.write(path, setup.state)
    return Found(made.step, 1, path, made.digest)


def test_a_state_comes_back_bit_for_bit(tiny_model: Path, tmp_path: Path) -> None:
    setup = trained(tiny_model, 3)
    made = checkpoints.write(tmp_path / "new", setup.state)
    assert {part.name: part.stat().st_size for part in (tmp_path / "new").iterdir()}.keys() == {
        "values.safetensors",
        "state.json",
        "manifest.json",
    }
    assert made.step == 3
    assert made.num_bytes == sum(part.stat().st_size for part in (tmp_path / "new").iterdir())
    assert made.num_bytes <= checkpoints.num_bytes(setup.state)
    fresh = Setup(tiny_model, "lora", seed=8)
    found = Found(3, 1, tmp_path / "new", made.digest)
    assert checkpoints.load([found], fresh.state) == checkpoints.Loaded(found, [])
    assert fresh.state.numbers() == setup.state.numbers()
    assert fresh.state.step == 3
    assert same(fresh.state.tensors(), setup.state.tensors())
    assert same(fresh.values(), setup.values())


def test_a_state_before_the_first_step_can_be_kept(tiny_model: Path, tmp_path: Path) -> None:
    setup = Setup(tiny_model, "prompt_tuning")
    fresh = Setup(tiny_model, "prompt_tuning", seed=8)
    assert checkpoints.load([save(tmp_path, setup)], fresh.state).taken
    assert same(fresh.values(), setup.values())


def test_none_leaves_the_state_alone(tiny_model: Path, tmp_path: Path) -> None:
    setup = trained(tiny_model, 2)
    before = setup.values()
    assert checkpoints.load([], setup.state) == checkpoints.Loaded(None, [])
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
    elif how == "forged":  # files and manifest fit each other, but not the row
        checkpoints.storage.remove(values)
        (path / "manifest.json").write_text("{}")
    else:
        (path / "manifest.json").unlink()


KINDS = ["bit", "short", "numbers", "missing", "manifest", "no manifest", "forged"]


@pytest.mark.parametrize("how", KINDS)
def test_a_damaged_one_is_passed_over_and_named(tiny_model: Path, tmp_path: Path, how: str) -> None:
    setup = trained(tiny_model, 1)
    older = save(tmp_path, setup)
    go_on(setup, 2)
    newer = save(tmp_path, setup)
    damage(newer.path, how)
    fresh = Setup(tiny_model, "lora")
    loaded = checkpoints.load([newer, older], fresh.state)
    assert loaded.taken == older
    assert fresh.state.step == 1
    (sentence,) = loaded.damaged
    assert sentence.startswith("The checkpoint of step 2 is damaged: ")


def test_all_damaged_starts_anew(tiny_model: Path, tmp_path: Path) -> None:
    found = save(tmp_path, trained(tiny_model, 1))
    damage(found.path, "bit")
    fresh = Setup(tiny_model, "lora")
    before = fresh.values()
    loaded = checkpoints.load([found], fresh.state)
    assert loaded.taken is None
    assert len(loaded.damaged) == 1
    assert fresh.state.step == 0
    assert same(fresh.values(), before)


def test_one_of_another_shape_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    found = save(tmp_path, trained(tiny_model, 1))
    other = Setup(tiny_model, "lora", rank=8)
    before = other.values()
    loaded = checkpoints.load([found], other.state)
    assert loaded.taken is None
    assert "another shape" in loaded.damaged[0]
    assert same(other.values(), before)


def test_a_folder_takes_anothers_place_and_comes_back_if_that_was_cut_short(tmp_path: Path) -> None:
    final, new = tmp_path / "best", tmp_path / ".new"
    for content in ("first", "second"):
        new.mkdir()
        (new / "file").write_text(content)
        checkpoints.settle(new, final)
        assert (final / "file").read_text() == content
        assert [path.name for path in tmp_path.iterdir()] == ["best"]
    checkpoints.place(new, final)  # again, since nobody heard that it was done
    checkpoints.mend(final)
    assert (final / "file").read_text() == "second"
    final.rename(tmp_path / ".best.old")  # killed between the two renames
    checkpoints.mend(final)
    assert (final / "file").read_text() == "second"
