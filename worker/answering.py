"""Answers of a run's model to prompts of its experiment: as texts, and as the score that the best state is told by."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from app import files, pace, prompts
from app.comparison import scores
from worker import backbones, evaluate
from worker.job import Job
from worker.material import longest_answer


def texts(
    job: Job,
    model: Any,
    soft_prefix: Tensor | None,
    ids: Sequence[Sequence[int]],
    most: int,
    tell: Callable[[int], None],
) -> list[str]:
    """The likeliest answer to each prompt, of at most `most` tokens; `tell` hears how many there are.

    May be asked in the middle of a training: neither the model's mode nor the chance of its dropout changes.
    """
    formatter = prompts.formatter(files.base_model(job.run.experiment.base_model_id))
    devices = [model.device] if job.machine.device == "cuda" else []
    found: dict[int, str] = {}
    with torch.random.fork_rng(devices), evaluate.evaluating(model):
        for ended in evaluate.answers(
            model, soft_prefix, ids, formatter.stop_ids, most, job.machine
        ):
            found |= {one.prompt: formatter.decode(one.ids) for one in ended}
            tell(len(found))
    return [found[place] for place in range(len(ids))]


def judge(job: Job, model: Any, soft_prefix: Tensor | None) -> Callable[[], float] | None:
    """What tells how good the model in training answers, 0 to 1; None where its loss is to tell it."""
    if job.params.keep_by == "loss":
        return None
    if job.group.size > 1:  # the others would wait
        job.tell("The best state is told by the validation loss: several devices share the run.")
        return None
    experiment, rows = job.run.experiment, job.material.validation[: pace.ANSWERED]
    expected = [example.output for example in job.material.validation_examples[: pace.ANSWERED]]
    most, name = longest_answer(experiment, job.material), scores.primary(experiment.task)

    def found() -> float:
        ids = [list(row.prompt_ids) for row in rows]
        with backbones.compute(job.machine):
            given = texts(job, model, soft_prefix, ids, most, lambda _: job.watch.check())
        pairs = list(zip(expected, given, strict=True))
        score = scores.summary(experiment.task, experiment.labels, pairs)[name]
        label = scores.METRICS[experiment.task][name]
        job.tell(f"{label} of {len(rows)} validation examples: {score:.3f}.")
        return score

    return found
