"""The optimizers: what they need, what a checkpoint keeps of them, and that training goes on exactly."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy.orm import Session

from app import admission, arithmetic, forecast
from app.errors import Invalid, StudioError
from app.methods import METHODS
from app.points import Measured
from app.tables import BaseModel, Worker
from tests import factories
from tests.engine import Setup, same
from worker import checkpoints, optimizers
from worker.checkpoints import Found

KEYS = list(METHODS)


def tuner(device: str) -> Worker:
    """One that is alive."""
    return Worker(
        id=device, kind="tuner", host="here", pid=1, device=device, memory_mb=8000.0, num_devices=1
    )


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes computes moments of 8 bits on a processor too, only slowly."""
    theirs = optimizers.make

    def make(groups: Any, params: Any, machine: Any) -> Any:
        return theirs(copy.copy(groups), params, machine._replace(device="cuda"))

    monkeypatch.setattr(optimizers, "make", make)


def losses(setup: Setup, until: int) -> list[Any]:
    """Of the steps up to that one."""
    found = []
    for item in setup.going():
        if isinstance(item, Measured) and item.kind == "train":
            found.append((item.step, item.loss, item.grad_norm))
            if item.step == until:
                break
    return found


def test_eight_bits_are_refused_without_a_gpu(tiny_model: Path) -> None:
    for name in ("adamw_8bit", "paged_adamw_8bit"):
        with pytest.raises(
            StudioError, match=r"need a GPU with CUDA.*Choose the optimizer adamw\."
        ):
            Setup(tiny_model, "lora", optimizer=name)


@pytest.mark.parametrize("key", KEYS)
def test_eight_bits_learn_about_the_same_and_go_on_exactly(
    tiny_model: Path, tmp_path: Path, anywhere: None, key: str
) -> None:
    rank = {"rank": 64} if "lora" in key else {}  # so that some values are large enough for 8 bits
    wide = losses(Setup(tiny_model, key, **rank), 6)
    whole = Setup(tiny_model, key, optimizer="adamw_8bit", **rank)
    true = losses(whole, 6)
    assert [loss for _, loss, _ in true] == pytest.approx([loss for _, loss, _ in wide], rel=0.1)
    state = whole.state.tensors()
    if key != "prompt_tuning":  # too few values for 8 bits
        assert torch.uint8 in {value.dtype for name, value in state.items() if "state1." in name}
    begun = Setup(tiny_model, key, optimizer="adamw_8bit", **rank)
    before = losses(begun, 3)
    made = checkpoints.write(tmp_path / "3", begun.state)
    resumed = Setup(tiny_model, key, optimizer="adamw_8bit", **rank)
    found = Found(3, 1, tmp_path / "3", made.digest)
    assert checkpoints.load([found], resumed.state) == checkpoints.Loaded(found, [])
    assert same(resumed.state.tensors(), begun.state.tensors())
    assert before + losses(resumed, 6) == true
    assert same(resumed.values(), whole.values())


@pytest.mark.parametrize("first", ["adamw", "adamw_8bit"])
def test_a_state_of_another_optimizer_is_passed_over(
    tiny_model: Path, tmp_path: Path, anywhere: None, first: str
) -> None:
    other = {"adamw": "adamw_8bit", "adamw_8bit": "adamw"}[first]
    setup = Setup(tiny_model, "lora", optimizer=first)
    losses(setup, 1)
    made = checkpoints.write(tmp_path / "1", setup.state)
    fresh = Setup(tiny_model, "lora", optimizer=other)
    before = fresh.values()
    loaded = checkpoints.load([Found(1, 1, tmp_path / "1", made.digest)], fresh.state)
    assert "another optimizer" in loaded.damaged[0]
    assert same(fresh.values(), before)


def test_a_forecast_knows_the_moments() -> None:
    base_model = BaseModel(shapes={"parameters": 1000})
    full = METHODS["full"]
    wide, narrow = (
        arithmetic.disk_bytes(base_model, full, full.schema(optimizer=name))
        for name in ("adamw", "paged_adamw_8bit")
    )
    assert wide - narrow == pytest.approx(3 * 1000 * (6 - 8 / 256), abs=1)


def test_workers_without_a_gpu_are_not_given_what_needs_one(db: Session) -> None:
    experiment = factories.experiment(db)
    asked = forecast.given(experiment)
    params = METHODS["lora"].schema(optimizer="adamw_8bit").model_dump()
    wanted = [admission.Wanted("lora", params)]
    admission.forecasts(db, asked, wanted, override=False)  # no worker is known yet
    db.add(tuner("CPU"))
    db.commit()
    with pytest.raises(Invalid, match=r"adamw_8bit needs a GPU with CUDA.*Choose adamw\.") as told:
        admission.forecasts(db, asked, wanted, override=True)
    assert told.value.field == "lora.optimizer"
    db.add(tuner("GPU somebody's"))
    db.commit()
    admission.forecasts(db, asked, wanted, override=False)
