"""The studio's side of a comparison: one training with the worker's own loop, in its own process."""

from __future__ import annotations

from typing import Any

from app import methods, pace
from app.points import Measured
from app.storage import Path
from benchmarks import gemm, measures
from benchmarks.cases import Job
from worker import backbones, hardware, train


def measure(job: Job) -> dict[str, Any]:
    """Train as a run does, and tell what it took."""
    method, params = methods.get(job.method), job.settings
    machine = hardware.find()
    model, soft_prefix = backbones.load_trainable(
        method, params, Path(job.model), job.seed, machine
    )
    loaded = measures.forget_peak()
    clock = measures.Clock()
    state = train.begin(model, soft_prefix, job.train, params, machine)
    start = measures.start_of(state.trained.values())
    going = train.train(
        model,
        soft_prefix,
        job.train,
        job.held_out,
        params,
        job.seed,
        machine,
        state,
        usual_rates=method.usual_rates,
    )
    num_steps = pace.steps_per_epoch(len(job.train), params)
    clock.begin()
    for point in going:
        if isinstance(point, Measured) and point.kind == "train":
            clock.step(point.loss)
            if len(clock.seconds) == num_steps:
                break  # the look that follows is no training
    found = clock.found(job) | {"loaded_mb": loaded, "start": start, "obstacle": state.obstacle}
    if job.held_out:
        found["held_out"] = measures.held_out(model, soft_prefix, job.held_out, machine)
    if job.measure_products:
        found["gemm"] = gemm.share(job, machine, found["examples_per_second"])
    return found


if __name__ == "__main__":
    measures.main(measure)
