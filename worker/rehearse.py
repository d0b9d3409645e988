"""Rehearses one configuration: two steps on its longest batch, measured. `python -m worker.rehearse KEY`."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import transformers

from app import (
    base_models,
    database,
    datasets,
    files,
    methods,
    pace,
    processes,
    prompts,
    rehearsals,
)
from app.errors import StudioError
from app.points import Measured
from app.tables import BaseModel, Dataset, Rehearsal
from worker import backbones, failures, hardware, packing, train

STEPS = 2  # the second is measured: the first one fetches memory and builds what is built once
MOST_BATCHES = 2  # of those that are accumulated: more take more time and no more memory
WIDER = 4  # how many times as many rows are counted as are wanted, the widest by characters

log = logging.getLogger(__name__)


def rehearse(asked: Rehearsal) -> dict[str, Any]:
    """What two steps took, and of which examples they were. Raises StudioError."""
    with database.reading() as db:
        base_model = base_models.get(db, asked.base_model_id)
        dataset = datasets.get(db, asked.dataset_id)
    method = methods.get(asked.method)
    params = method.schema.model_validate(
        asked.params | {"devices": 1, "num_epochs": STEPS, "validation_interval": pace.NO_LOOK}
    )
    _say(asked, "Loading the base model")
    machine = hardware.find()
    examples = _longest(asked, base_model, dataset, method, params)
    model, soft_prefix = backbones.load_trainable(
        method, params, files.base_model(base_model.id), 1, machine
    )
    state = train.begin(model, soft_prefix, examples, params, machine)
    _say(asked, f"Training {STEPS} steps on the {len(examples)} longest examples")
    going = train.train(
        model,
        soft_prefix,
        examples,
        examples[:1],
        params,
        1,
        machine,
        state,
        usual_rates=method.usual_rates,
    )
    seconds = _steps(going)
    return {
        "peak_memory_mb": hardware.peak_memory_mb(machine),
        "step_seconds": seconds[-1],
        "steps": STEPS,
        "examples": [[len(row.prompt_ids), len(row.answer_ids)] for row in examples],
        "shared": packing.shared_prefix(examples),
        "device": machine.name,
        "device_kind": machine.device,
        "precision": machine.dtype,
        "token_budget": machine.token_budget,
    }


def _steps(going: Iterator[Measured | train.Tick]) -> list[float]:
    """Seconds of each step; no longer asked after the last, before the look that would follow."""
    ends = [0.0]
    for item in going:
        if isinstance(item, Measured):
            ends.append(item.seconds)
            if item.step == STEPS:
                break
    return [later - earlier for earlier, later in pairwise(ends)]


def _longest(
    asked: Rehearsal, base_model: BaseModel, dataset: Dataset, method: Any, params: Any
) -> list[prompts.Row]:
    """The longest examples of the dataset, as many as a step has, or some batches of it."""
    formatter = prompts.formatter(files.base_model(base_model.id))
    count = params.batch_size * min(params.accumulate_steps, MOST_BATCHES)
    wide = sorted(datasets.rows(dataset), key=lambda one: -len(one.input) - len(one.output))
    virtual = method.virtual_tokens(params)
    rows = [
        formatter.row(asked.template, asked.labels, one, params.max_length, virtual)
        for one in wide[: WIDER * count]
    ]
    return sorted(rows, key=lambda row: -len(row.prompt_ids) - len(row.answer_ids))[:count]


def _say(asked: Rehearsal, text: str) -> None:
    database.lasting(lambda db: rehearsals.progress(db, asked.key, text))


def _failure(error: Exception) -> str:
    """Why it did not come to an end, in words."""
    if isinstance(error, StudioError):
        return error.message
    if failures.is_lack_of_memory(error):
        return (
            "The machine has not enough memory for such a batch at once. A run would go on with half "
            "of it at a time, and take longer."
        )
    return f"The rehearsal stopped on an unexpected error: {type(error).__name__}: {error}"


def main() -> None:
    """Rehearse the configuration of the key given, and say in its row how that went."""
    processes.die_with_parent(signal.SIGKILL)
    os.nice(5)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    transformers.utils.logging.disable_progress_bar()
    key = sys.argv[1]
    asked = database.lasting(lambda db: rehearsals.get(db, key))
    try:
        figures = rehearse(asked)
    except Exception as error:
        log.exception("The rehearsal %s failed.", key)
        reason = _failure(error)
        database.lasting(lambda db: rehearsals.fail(db, key, reason))
        return
    database.lasting(lambda db: rehearsals.finish(db, key, figures))


if __name__ == "__main__":
    main()
