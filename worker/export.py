"""Merge an adapter into its base model, and prove that the copy answers alike."""

import logging
import signal
import sys
from typing import Any

import torch
from torch import Tensor

from app import database, datasets, files, methods, processes, prompts, runs, storage, tuned_models
from app.crashpoints import crashpoint
from app.errors import StudioError
from app.tables import Run
from worker import backbones, generate, hardware

PROOF_PROMPTS = 8
# Most of the chance that may go to other words: half the sum over all words of how far their chances
# are apart (total variation), the mean over the prompts. Logits themselves shift together in bf16 by
# more than this, which changes no answer.
MOST_DIFFERENCE = 0.05
WIDENED = (
    "The whole model is kept in float32: in bf16 its answers would have been further from the tuned "
    "model's than they may be."
)

log = logging.getLogger(__name__)


def whole(run: Run, machine: hardware.Hardware) -> float:
    """Write the merged model beside the adapter; how far its answers are from the tuned one's.

    Raises StudioError, and keeps nothing, if they are too far in float32 too: in bf16 the rounding of
    the merged weights, and of each product, can be as large as what the adapter has learned.
    """
    target = storage.whole_model_folder(run.id)
    difference = _merge(run, machine, target)
    widened = difference > MOST_DIFFERENCE and machine.dtype != hardware.FLOAT32
    if widened:
        log.info("Run %s: %.1f%% apart in bf16, merging in float32.", run.id, 100 * difference)
        machine = machine._replace(dtype=hardware.FLOAT32, products=hardware.FLOAT32)
        difference = _merge(run, machine, target)
    if difference > MOST_DIFFERENCE:
        storage.remove(target)
        raise StudioError(
            "The merged model's answers differ from the tuned one's: "
            f"{difference:.1%} of the chances of the next word go to other words, in float32, and at "
            f"most {MOST_DIFFERENCE:.0%} may, so it was not kept. The adapter is right: download "
            "that, and load it with PEFT."
        )
    crashpoint("whole.proved")
    files.publish(target, run.attempt)
    if widened:
        with database.session() as db:
            runs.note(db, run.id, run.attempt, WIDENED)
            db.commit()
    return difference


def _merge(run: Run, machine: hardware.Hardware, target: storage.Path) -> float:
    """Write the merged model in the machine's dtype; how far it is from the tuned one in the same."""
    method = methods.get(run.method)
    params = method.schema.model_validate(run.params)
    base = run.experiment.base_model
    folder = files.base_model(base.id)
    tuned_folder = files.tuned_model(run.id, run.attempt)
    model, _ = backbones.load_tuned(method, params, folder, tuned_folder, machine)
    prompt_ids = _proof(run)
    before = _logits(model, prompt_ids, machine)
    if method.quantizes:
        # The weights that the adapter has learned beside, whole again before it is put on: PEFT
        # merges into 4 bits or not at all.
        base_model = backbones.load_base(method, params, folder, machine)
        base_model.dequantize(dtype=machine.precision)
        model, _ = backbones.load_tuned(
            method, params, folder, tuned_folder, machine, base=base_model
        )
    merged = model.merge_and_unload()
    backbones.save_tuned(
        merged, target, base_name=base.address, base_folder=folder, machine=machine
    )
    crashpoint("whole.written")
    del model, merged
    copy = backbones.load_base(methods.Method(), None, target, machine)
    after = _logits(copy, prompt_ids, machine)
    return float((after.softmax(-1) - before.softmax(-1)).abs().sum(-1).mean() / 2)


def _proof(run: Run) -> list[list[int]]:
    experiment = run.experiment
    formatter = prompts.formatter(files.base_model(experiment.base_model_id))
    rows = datasets.rows(experiment.dataset)
    return [
        formatter.prompt_ids(experiment.template, rows[index].input, experiment.labels)
        for index in experiment.split["test"][:PROOF_PROMPTS]
    ]


def _logits(model: Any, prompt_ids: list[list[int]], machine: hardware.Hardware) -> Tensor:
    """After each prompt, (prompts, vocabulary)."""
    given = [torch.tensor([ids], device=machine.device) for ids in prompt_ids]
    return torch.cat([generate.read(model, None, ids)[0] for ids in given])


def main() -> None:
    """Make the whole model of the run named, and say in its row how that went."""
    processes.die_with_parent(signal.SIGKILL)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    run_id = sys.argv[1]
    with database.reading() as db:
        run = runs.get(db, run_id)
    try:
        difference = whole(run, hardware.find())
    except Exception as error:
        log.exception("Run %s could not be merged.", run_id)
        known = isinstance(error, StudioError)
        reason = str(error) if known else f"Merging failed: {type(error).__name__}: {error}"
        with database.session() as db:
            tuned_models.fail_whole(db, run_id, reason)
        return
    log.info("Run %s merged; chances of the next word differ by %.2g.", run_id, difference)
    with database.session() as db:
        tuned_models.finish_whole(db, run_id)


if __name__ == "__main__":
    main()
