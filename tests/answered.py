"""Experiments whose runs have answered the test examples: right as often as is asked for."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from sqlalchemy.orm import Session

from app import datasets, experiments
from app.comparison import baselines, certainty, scores
from app.comparison.baselines import Given
from app.tables import Experiment
from tests import factories

LABELS = ["delivery", "refund", "account"]


class Model(NamedTuple):
    """A model by its method ("base": the base model), how often it is right, and what it took."""

    method: str
    right: float
    memory_mb: float = 800.0
    seconds: float = 60.0
    num_bytes: int = 5_000_000
    device: str = "A processor"
    params: dict[str, Any] = {}  # noqa: RUF012
    stuck_on: str = ""  # a label that it always answers


BASE = Model("base", 0.35)
FOUR = (
    BASE,
    Model("prompt_tuning", 0.75, 500, 40, 20_000),
    Model("lora", 0.92, 900, 60, 5_000_000),
    Model("qlora", 0.92, 600, 80, 5_000_000),
    Model("full", 0.93, 1800, 100, 270_000_000),
)


def experiment(
    db: Session, models: Sequence[Model] = FOUR, num_test: int = 300, seed: int = 1
) -> Experiment:
    """With a run of each model that has ended well; the same examples are hard for all."""
    chance = np.random.default_rng(seed)
    names = chance.choice(LABELS, num_test + 20, p=[0.6, 0.25, 0.15])
    rows = [(f"Message {n} about my order", str(name)) for n, name in enumerate(names)]
    split = {"train": [*range(10)], "validation": [*range(10, 20)]}
    split["test"] = [*range(20, len(rows))]
    of = factories.experiment(db, data=factories.dataset(db, rows), labels=LABELS, split=split)
    hard = chance.normal(size=num_test)
    for model in models:
        _answer(db, of, model, hard + chance.normal(size=num_test), chance)
    return experiments.get(db, of.id)


def _answer(
    db: Session, of: Experiment, model: Model, luck: np.ndarray, chance: np.random.Generator
) -> None:
    right = luck <= np.quantile(luck, model.right)
    rows = datasets.rows(of.dataset)
    texts = [
        model.stuck_on or (rows[row].output if is_right else _other(rows[row].output, chance))
        for row, is_right in zip(of.split["test"], right, strict=True)
    ]
    pairs = [(rows[row].output, text) for row, text in zip(of.split["test"], texts, strict=True)]
    made = certainty.of_metrics("classification", LABELS, pairs)
    stored = {
        "metrics": scores.summary("classification", LABELS, pairs),
        "intervals": {name: [*one] for name, one in made.items()},
        "test_loss": 0.4,
        "num_test": len(pairs),
        "first_token_seconds": 0.05,
        "answer_tokens_per_second": 40.0,
    }
    given = [
        Given(row, text, scores.score("classification", LABELS, *pair), 0.4)
        for row, text, pair in zip(of.split["test"], texts, pairs, strict=True)
    ]
    if model.method == "base":
        owner = baselines.key(of, "bfloat16")
        baselines.keep(db, of, "bfloat16", validation_loss=2.5, scores=stored)
    else:
        owner = _run(db, of, model, stored)
    baselines.store_answers(db, owner, given)


def _other(label: str, chance: np.random.Generator) -> str:
    return str(chance.choice([one for one in [*LABELS, "no idea"] if one != label]))


def _run(db: Session, of: Experiment, model: Model, stored: dict[str, Any]) -> str:
    figures = {
        "precision": "bfloat16",
        "device": model.device,
        "peak_memory_mb": model.memory_mb,
        "tokens_per_second": 400.0,
        "size_bytes": model.num_bytes,
        "trainable_parameters": model.num_bytes // 4,
        "total_parameters": 135_000_000,
    }
    run = factories.run(
        db,
        of,
        method=model.method,
        state="succeeded",
        finished_at=1.0,
        best_loss=0.4,
        train_seconds=model.seconds,
        figures=figures,
        scores=stored,
        forecast={"memory_mb": model.memory_mb * 1.1, "train_seconds": model.seconds * 0.8},
    )
    run.params = run.params | model.params
    db.commit()
    return run.id
