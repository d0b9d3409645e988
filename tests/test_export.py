"""The merged copy of a tuned model: whole weights that answer as the tuned model does."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from peft.tuners.lora.layer import Linear
from safetensors.torch import load_file, save_file
from sqlalchemy.orm import Session

from app import claims, database, methods, storage
from app.errors import StudioError
from tests.faults import small
from worker import backbones, export, hardware
from worker import run as worker_run


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def _tuned(db: Session, model: Path, method: str) -> str:
    run_id = small.run(db, small.experiment(db, model), method).id
    with database.session() as other:
        claimed = claims.claim_next(other, "w")
    assert claimed
    assert worker_run.work(claimed.id, claimed.attempt) == 0
    assert small.now(run_id).state == "succeeded", small.said(run_id)
    return run_id


@pytest.mark.parametrize("key", [key for key, one in methods.METHODS.items() if one.merges])
def test_the_merged_copy_answers_as_the_tuned_model(
    db: Session, tiny_model: Path, key: str
) -> None:
    run_id = _tuned(db, tiny_model, key)
    machine = hardware.find()
    assert export.whole(small.now(run_id), machine) <= export.MOST_DIFFERENCE
    folder = storage.whole_model_folder(run_id)
    copy = backbones.load_base(methods.Method(), None, folder, machine)
    kinds = {type(part).__name__ for part in copy.modules()}
    assert "Linear" in kinds
    assert not any("4bit" in kind or "Lora" in kind for kind in kinds)
    assert (folder / "tokenizer.json").is_file()


def test_a_copy_that_answers_otherwise_is_not_kept(
    db: Session, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = _tuned(db, tiny_model, "lora")
    monkeypatch.setattr(export, "MOST_DIFFERENCE", -1.0)
    with pytest.raises(StudioError, match="so it was not kept"):
        export.whole(small.now(run_id), hardware.find())
    assert not storage.whole_model_folder(run_id).exists()


def _emphasize(run_id: str, times: float) -> None:
    """Make more or less of what the adapter has learned."""
    path = storage.tuned_model_folder(run_id) / "adapter_model.safetensors"
    values = load_file(path)
    save_file(
        {name: part * times if "lora_B" in name else part for name, part in values.items()}, path
    )


def test_a_copy_that_bf16_is_too_rough_for_is_kept_in_float32(
    db: Session, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = _tuned(db, tiny_model, "lora")
    _emphasize(run_id, 50.0)
    monkeypatch.setattr(export, "MOST_DIFFERENCE", 1e-5)
    machine = hardware.find()._replace(dtype="bfloat16", products="")
    assert export.whole(small.now(run_id), machine) <= 1e-5
    config = json.loads((storage.whole_model_folder(run_id) / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert export.WIDENED in small.said(run_id)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("times", [0.0, -1.0], ids=["left out", "taken away"])
def test_a_merge_that_is_wrong_is_refused(
    db: Session, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, times: float, dtype: str
) -> None:
    run_id = _tuned(db, tiny_model, "lora")
    _emphasize(run_id, 0.04)
    right = Linear.get_delta_weight
    monkeypatch.setattr(
        Linear, "get_delta_weight", lambda self, adapter: right(self, adapter) * times
    )
    with pytest.raises(StudioError, match="in float32, and at most 5% may, so it was not kept"):
        export.whole(small.now(run_id), hardware.find()._replace(dtype=dtype, products=""))
    assert not storage.whole_model_folder(run_id).exists()
