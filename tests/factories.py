"""Rows with defaults, for tests; where a row stands for a file, the file is there too."""

import hashlib
import json
import time
from typing import Any

from sqlalchemy.orm import Session

from app import claims, datasets, methods, storage
from app.points import Measured
from app.settings import settings
from app.tables import BaseModel, Dataset, Experiment, Run, new_id

LABELS = ["delivery", "refund", "account"]
TEMPLATE = "Classify as one of {{labels}}.\n\n{{input}}\n\nLabel:"
METHODS = ("prompt_tuning", "lora", "qlora", "full")


def examples(count: int = 60) -> list[tuple[str, str]]:
    """Inputs with their labels; of three examples two are about delivery."""
    return [(f"Message {n} about my order", LABELS[max(0, n % 6 - 3)]) for n in range(count)]


def dataset(
    db: Session, rows: list[tuple[str, str]] | None = None, count: int = 60, **changes: Any
) -> Dataset:
    """A stored dataset of such rows, or of `count` examples."""
    rows = examples(count) if rows is None else rows
    lines = [json.dumps({"input": one, "output": other}) + "\n" for one, other in rows]
    content = "".join(lines).encode()
    made = Dataset(
        **{
            "id": new_id(),
            "name": "Messages",
            "fingerprint": hashlib.sha256(content).hexdigest(),
            "num_examples": len(rows),
            "num_bytes": len(content),
            "report": {"labels": dict.fromkeys(LABELS, 1)},
            **changes,
        }
    )
    storage.dataset_file(made.id).write_bytes(content)
    return _stored(db, made)


def base_model(db: Session, **changes: Any) -> BaseModel:
    """A base model that is ready; its folder is not made here."""
    given = {
        "id": new_id(),
        "name": "Tiny",
        "source": "folder",
        "address": "tiny",
        "state": "ready",
        "architecture": "LlamaForCausalLM",
        "shapes": {"parameters": 1_000_000, "max_positions": 2048},
        "has_chat": True,
    }
    return _stored(db, BaseModel(**given | changes))


def experiment(
    db: Session, of: BaseModel | None = None, data: Dataset | None = None, **changes: Any
) -> Experiment:
    """An experiment without runs."""
    data = data or dataset(db)
    given = {
        "id": new_id(),
        "name": "Which messages are about what",
        "base_model_id": (of or base_model(db)).id,
        "dataset_id": data.id,
        "task": "classification",
        "labels": LABELS,
        "template": TEMPLATE,
        "seed": 1,
        "split": datasets.split(data.num_examples, 1),
    }
    return _stored(db, Experiment(**given | changes))


def run(db: Session, of: Experiment | None = None, **changes: Any) -> Run:
    """A run in any state; one that is held is held by worker "w1", its first attempt."""
    method = str(changes.get("method", "lora"))
    given: dict[str, Any] = {
        "id": new_id(),
        "experiment_id": (of or experiment(db)).id,
        "method": method,
        "params": methods.get(method).schema().model_dump(),
    }
    if changes.get("state") in {"running", "pausing", "cancelling"}:
        moment, clock = claims.now(db)
        given |= {"worker": "w1", "attempt": 1, "clock": clock, "started_at": time.time()}
        given |= {"lease_until": moment + settings.lease_seconds, "phase": "training"}
    return _stored(db, Run(**given | changes))


def tuned(db: Session, of: Experiment | None = None, **changes: Any) -> Run:
    """A run that succeeded, with two files where its tuned model lies."""
    made = run(db, of, **{"state": "succeeded", "finished_at": time.time(), **changes})
    folder = storage.tuned_model_folder(made.id)
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    return made


def measured(step: int, kind: str = "train", **changes: Any) -> Measured:
    """What was measured at a step."""
    given = Measured(
        kind=kind,
        step=step,
        epoch=step / 10,
        loss=2.0 / (step + 1),
        learning_rate=1e-4,
        grad_norm=1.0,
        tokens_per_second=100.0,
        memory_mb=300.0,
        seconds=float(step),
        tokens=step * 50,
    )
    return given._replace(**changes)


def _stored(db: Session, row: Any) -> Any:
    db.add(row)
    db.commit()
    return row
