"""Receipts: a finished run with all that repeats it, in one archive that is the same each time."""

import importlib.metadata
import json
import platform
from hashlib import sha256
from typing import Any

from sqlalchemy.orm import Session

from app import files, fingerprints, methods, model_cards, naming, points, runs
from app.comparison import baselines
from app.errors import Conflict
from app.receipt_files import CARD, DATA, ENVIRONMENT, POINTS, RECEIPT, SPLIT
from app.storage import Path
from app.tables import Point, Run

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "safetensors",
    "tokenizers",
    "numpy",
)
MEASURED = (
    *("kind", "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second"),
    *("memory_mb", "seconds", "tokens"),
)


def versions() -> dict[str, str]:
    """Of the studio and of what decides on a result, as installed here."""
    found = {"tuning-studio": "unknown", "python": platform.python_version()}
    for name in ("tuning-studio", *PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a web process without torch
            continue
    return found


def get(db: Session, run_id: str) -> Run:
    """The run, which has finished. Raises NotFound, or Conflict if it has not."""
    run = runs.get(db, run_id)
    if run.state != "succeeded":
        raise Conflict(
            f"A receipt tells of a run that has finished, and this one is {run.state}. "
            "Come back when it has succeeded."
        )
    return run


def name(run: Run) -> str:
    """A name for the archive, safe in any file system."""
    return f"receipt-{run.method.replace('_', '-')}-{run.id}"


def contents(db: Session, run: Run, *, data: bool = False) -> list[tuple[str, Path | bytes]]:
    """The archive's files in the order of their names; the same run gives the same bytes.

    The examples are private, and go with it only if `data` says so.
    """
    experiment = run.experiment
    curve = points.curve(db, run.id)
    base = baselines.known(db, experiment, run.figures.get("precision", "")).scores
    made = {
        POINTS: b"".join(_line(point) for point in curve),
        SPLIT: _json(experiment.split),
        ENVIRONMENT: _environment(run),
    }
    made[CARD] = model_cards.write(run, base).encode()
    hashes = {one: sha256(content).hexdigest() for one, content in made.items()}
    found: dict[str, Path | bytes] = dict(made)
    if data:
        found[DATA] = files.dataset(experiment.dataset_id)
        hashes[DATA] = experiment.dataset.fingerprint
    found[RECEIPT] = _json(_receipt(run, base) | {"files": hashes})
    return sorted(found.items())


def _receipt(run: Run, base: dict[str, Any]) -> dict[str, Any]:
    experiment, dataset, model = run.experiment, run.experiment.dataset, run.experiment.base_model
    trained = ("id", "method", "best_step", "best_loss", "train_seconds", "finished_at")
    setup = ("name", "task", "labels", "template", "seed")
    named = ("name", "source", "address", "licence", "fingerprint")
    sizes = {part: len(experiment.split[part]) for part in ("train", "validation", "test")}
    params = methods.get(run.method).schema.model_validate(run.params).model_dump()
    return {
        "format": 1,
        "versions": run.figures.get("versions", {}),
        "run": {field: getattr(run, field) for field in trained}
        | {"name": naming.name(run)}
        | {"params": params, "attempts": run.attempt, "steps": run.step},
        "experiment": {field: getattr(experiment, field) for field in setup},
        "dataset": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "num_examples": dataset.num_examples,
        },
        "split": sizes | {"fingerprint": fingerprints.of_split(experiment.split)},
        "base_model": {field: getattr(model, field) for field in named},
        "figures": {key: value for key, value in run.figures.items() if key != "versions"},
        "scores": run.scores,
        "base_scores": base,
    }


def _json(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True)
    return text.encode() + b"\n"


def _line(point: Point) -> bytes:
    return json.dumps({name: getattr(point, name) for name in MEASURED}).encode() + b"\n"


def _environment(run: Run) -> bytes:
    known = run.figures.get("versions", {})
    lines = [f"# Python {known.get('python', 'unknown')}; what the run was trained with"]
    lines += [f"{package}=={known[package]}" for package in PACKAGES if package in known]
    return "\n".join(lines).encode() + b"\n"
