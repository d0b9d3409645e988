"""What a run's history says where what the prompts begin with cannot be read once."""

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session

from app import database, runs
from tests import tiny
from tests.faults import small
from tests.test_resume import _quick, attempt, stop  # noqa: F401

NOTHING = "The prompts begin with nothing in common, so each is read whole."
ANSWERING = "When this model answers the test examples, it reads each prompt whole"
PACKING = "Training uses plain padded rows"
WINDOW = {"architecture": "mistral", "sliding_window": 12}
RECURRENT = {
    "architecture": "lfm2",
    "layer_types": ["conv", "full_attention"],
    "initializer_range": 0.15,  # with less, what a neighbour changes is too little to be found
}


@pytest.mark.parametrize(
    ("model", "method", "told"),
    [
        ({}, "lora", []),
        ({"chat": False}, "lora", [NOTHING]),
        ({"chat": False}, "prompt_tuning", []),  # they share the prompt vector
        (WINDOW, "full", [ANSWERING]),
        (WINDOW | {"sliding_window": 200}, "full", []),  # longer than all texts
        (RECURRENT, "full", [PACKING, ANSWERING]),
    ],
    ids=["shared", "nothing shared", "prompt vector", "window", "long window", "recurrent"],
)
def test_what_is_not_shared_is_told_once_and_only_then(
    db: Session, tmp_path: Path, model: dict[str, Any], method: str, told: list[str]
) -> None:
    folder = tiny.model(tmp_path / "model", **model)
    run = small.run(db, small.experiment(db, folder), method, num_epochs=1)
    attempt(run.id, {6: stop("ending")})
    attempt(run.id)
    assert small.now(run.id).state == "succeeded", small.said(run.id)
    with database.reading() as reader:
        events = [(event.level, event.message) for event in runs.history(reader, run.id)]
    found = [
        (level, words)
        for level, message in events
        for words in (NOTHING, ANSWERING, PACKING)
        if words in message
    ]
    levels = {PACKING: "warning"}
    assert found == [(levels.get(words, "info"), words) for words in told]
