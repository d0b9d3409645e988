"""One run from row to tuned model: reads like the workflow in the documentation."""

import gc
import json
import logging
import os
import signal
import sys

import torch

from app import (
    database,
    files,
    methods,
    naming,
    pace,
    processes,
    receipts,
    runs,
    storage,
    workers,
)
from app.errors import LostClaim
from app.tables import Run
from worker import (
    answering,
    backbones,
    checkpoints,
    distributed,
    energy,
    failures,
    hardware,
    launch,
    relief,
    scoring,
    sharing,
    train,
    vectors,
)
from worker.distributed import ALONE, Group
from worker.job import Job, like_before
from worker.keeper import SAVED
from worker.material import gather, know_base
from worker.recorder import Recorder, resume, tidy
from worker.samples import Samples
from worker.watch import Stopped, Watch

log = logging.getLogger(__name__)


def tune(run: Run, watch: Watch, group: Group = ALONE) -> None:
    """Load, adapt, train, score, save. Raises Stopped, LostClaim or StudioError.

    Of processes that share the run all train, and then the first one scores.
    """
    method = methods.get(run.method)
    params = relief.params(run)
    sharing.fetch_material(run, watch)
    machine = group.agreed(hardware.find(group.size))
    machine, change = like_before(machine, run.figures, group.size)
    job = Job(run, method, params, gather(run), machine, watch, group)
    if change:
        job.tell(change, "warning")
    _describe(job)
    if group.leads:
        know_base(run)
    _train(job)
    group.leave()
    if not group.leads:
        return
    gc.collect()
    if job.machine.device == "cuda":
        torch.cuda.empty_cache()
    job.store(phase="scoring")
    scores = scoring.score_run(job)
    job.run.figures["size_bytes"] = storage.size(storage.tuned_model_folder(run.id))
    job.store(scores=scores, figures=job.run.figures)
    scoring.score_base(job)
    database.lasting(lambda db: runs.finish(db, run.id, run.attempt))
    tidy(run.id)


def _describe(job: Job) -> None:
    """Say how this run is computed, and what had to be cut."""
    machine, material = job.machine, job.material
    job.run.figures = {
        **job.run.figures,
        "versions": receipts.versions(),
        "precision": machine.dtype,
        "products": machine.products or machine.dtype,
        "device": machine.name,
        "devices": job.group.size,
        "device_kind": machine.device,
        "threads": machine.threads,
        "token_budget": machine.token_budget,
        "prompts_at_once": machine.prompts_at_once,
        "train_rows": len(material.train),
        "longest_tokens": job.method.virtual_tokens(job.params)
        + max(len(row.prompt_ids) + len(row.answer_ids) for row in material.train),
        "cut_rows": material.num_cut,
        "num_virtual_tokens": job.method.virtual_tokens(job.params),
    }
    per_epoch = pace.steps_per_epoch(len(material.train), job.params)
    job.run.num_steps = per_epoch * job.params.num_epochs
    job.store(phase="loading", num_steps=job.run.num_steps, figures=job.run.figures)
    if job.run.attempt == 1 and (doubt := job.method.doubt(job.params)):
        job.tell(doubt, "warning")
    if material.num_cut:
        total = len(material.train) + len(material.validation) + len(material.test)
        job.tell(
            f"{material.num_cut} of {total} inputs are longer than the maximum length allows and "
            f"were cut at their end (maximum length: {job.params.max_length} tokens).",
            "warning",
        )


def _train(job: Job) -> None:
    """Train to the end, from the newest checkpoint if there is one."""
    folder = files.base_model(job.run.experiment.base_model_id)
    seed = naming.settings(job.run)["seed"]
    model, soft_prefix = backbones.load_trainable(
        job.method, job.params, folder, seed, job.machine, job.group
    )
    start = vectors.begin(soft_prefix)
    state = train.begin(model, soft_prefix, job.material.train, job.params, job.machine)
    if state.obstacle and job.run.attempt == 1:
        job.tell(state.obstacle, "warning")
    if job.run.attempt == 1 and (why := scoring.unshared(job, model, soft_prefix)):
        job.tell(why)
    resume(job, state)
    job.run.figures |= {
        "trainable_parameters": sum(value.numel() for value in state.trained.values()),
        "total_parameters": job.run.experiment.base_model.shapes.get("parameters")
        or sum(value.numel() for value in model.parameters()),
    }
    job.store(phase="training", figures=job.run.figures)
    if state.step == 0 and job.group.size == 1:  # the others would wait
        scoring.look_at_base(job, model)
    meter = energy.meter(job.machine)
    going = train.train(
        model,
        soft_prefix,
        job.material.train,
        job.material.validation,
        job.params,
        seed,
        job.machine,
        state,
        usual_rates=job.method.usual_rates,
        score=answering.judge(job, model, soft_prefix),
        group=job.group,
    )
    beside = Samples(job, model, soft_prefix, state).beside(going)
    Recorder(job, model, state).follow(beside)
    job.run.figures |= vectors.figures(job, model, start)
    _measure(job, state, meter)


def _measure(job: Job, state: checkpoints.State, meter: energy.Meter) -> None:
    """Store what training took."""
    peak = hardware.peak_memory_mb(job.machine)
    earlier = job.run.figures.get("peak_memory_mb", 0.0)  # of an attempt that was interrupted
    job.run.figures |= {
        "peak_memory_mb": max(earlier, peak),
        "tokens_per_second": state.tokens / max(state.seconds, 1e-9),
    }
    # Of one GPU that did all of it: what an interrupted attempt took is not known.
    if job.run.attempt == 1 and job.group.size == 1 and (spent := meter()) is not None:
        job.run.figures["energy_wh"] = spent
    job.store(figures=job.run.figures)


def work(run_id: str, attempt: int, group: Group = ALONE) -> int:
    """Do the run, and see that it ends in a state that says what happened; the exit code.

    One other than 0 ends the processes that share the run; which of them ended first, torchrun knows.
    """
    watch = Watch(run_id, attempt, group)
    try:
        return _ended(run_id, attempt, watch, group)
    except LostClaim as lost:
        log.warning("%s", lost.message)
    return launch.LOST


def _ended(run_id: str, attempt: int, watch: Watch, group: Group = ALONE) -> int:
    run = database.lasting(lambda db: runs.get(db, run_id))
    try:
        tune(run, watch, group)
    except Stopped as stop:
        reason = (
            "The worker was stopped; what was trained is saved, and the run goes on from there."
        )
        group.leave()
        if group.leads:
            database.lasting(lambda db: runs.settle(db, run_id, attempt, reason))
        return SAVED if stop.why == "ending" else 0
    except LostClaim:
        raise
    except Exception as error:
        log.exception("Run %s failed.", run_id)
        if group.size > 1 and distributed.is_loss_of_others(error):
            return launch.LOST
        failures.let_go(run_id, attempt, error)
        return 1
    return 0


def _work_on_devices(run_id: str, attempt: int) -> int:
    """Do the run on as many devices as its parameter says, or say that there are not so many."""
    params = database.lasting(lambda db: runs.get(db, run_id)).params
    wanted, most = params.get("devices", 1), hardware.num_devices()
    if wanted == 1:
        return work(run_id, attempt)
    if wanted <= most:
        return launch.launch(run_id, attempt, wanted)
    reason = (
        f"This run asks for {wanted} devices, and the machine that took it up has {most}. "
        f"Create it again with at most {most} under Devices: the effective batch stays the same."
    )
    database.lasting(lambda db: runs.fail(db, run_id, attempt, reason))
    return 0


def main() -> None:
    """Wait, with everything imported, for the line that says which run to do; then do it."""
    processes.die_with_parent(signal.SIGKILL)
    os.nice(5)  # the web and whatever else runs here answer first
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    machine = hardware.find()
    database.lasting(
        lambda db: workers.describe(
            db, sys.argv[1], machine.name, machine.memory_mb, hardware.num_devices()
        )
    )
    line = sys.stdin.readline()
    if not line:
        return
    wanted = json.loads(line)
    with storage.log_file(f"run-{wanted['run']}").open("a") as file:
        processes.log_to(file)
    sys.exit(_work_on_devices(wanted["run"], wanted["attempt"]))


if __name__ == "__main__":
    main()
