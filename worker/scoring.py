"""How good models are on held-out examples: the tuned model, and the base model as it is."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from app import database, files, methods, prompts, runs
from app.comparison import baselines, certainty, scores
from worker import answering, backbones, choices, evaluate, latency, obstacles, packing
from worker.job import Job
from worker.material import longest_answer

LOOK_SECONDS = 4.0  # the first point of a run does not wait longer for the base model's figures
LEAST_PROGRESS_SECONDS = 0.5


def look_at_base(job: Job, model: Any) -> None:
    """Measure the base model's validation loss before training, unless known or slow to get.

    `model` has just been adapted; only where its adapters start as no change can it stand for
    the base. What is not measured now is measured after the training.
    """
    if _known(job).validation_loss is not None or not job.method.starts_as_base:
        return
    end = time.monotonic() + LOOK_SECONDS
    found: list[evaluate.Loss] = []
    rows = job.material.validation
    with _for_the_base(job):
        for some in evaluate.losses(model, None, rows, job.machine, plain=_plain(job, model, None)):
            found += some
            job.watch.check()
            if time.monotonic() > end:
                return
        _keep(job, validation_loss=evaluate.mean(found))


def unshared(job: Job, model: Any, soft_prefix: torch.Tensor | None) -> str:
    """Why what prompts begin with is not read once, in a sentence; empty where it is.

    Of training on rows that cannot be packed, `State.obstacle` tells.
    """
    common = backbones.num_virtual(soft_prefix) + packing.shared_prefix(job.material.train)
    if common <= 1:  # the token that begins every text
        return "The prompts begin with nothing in common, so each is read whole."
    ids = [row.prompt_ids for row in job.material.test]
    most = longest_answer(job.run.experiment, job.material)
    with backbones.compute(job.machine):
        if evaluate.shares(model, soft_prefix, ids, most):
            return ""
    return (
        "When this model answers the test examples, it reads each prompt whole: layers with a sliding "
        "window or of a recurrent kind cannot share what all prompts begin with. The answers are the "
        "same; scoring takes longer."
    )


def score_run(job: Job) -> dict[str, Any]:
    """The tuned model's metrics and loss on the test split; its answers are stored.

    What was saved is loaded anew: the very files that people take away are what is scored.
    """
    run = job.run
    model, soft_prefix = backbones.load_tuned(
        job.method,
        job.params,
        files.base_model(run.experiment.base_model_id),
        files.tuned_model(run.id, run.attempt),
        job.machine,
    )
    return _score(job, model, soft_prefix, owner=run.id, of="the tuned model")


def score_base(job: Job) -> None:
    """Measure what is not yet known of the base model on this experiment's split and template."""
    known = _known(job)
    scored = "intervals" in known.scores  # an earlier version stored less
    if known.validation_loss is not None and scored:
        return
    folder = files.base_model(job.run.experiment.base_model_id)
    with _for_the_base(job):
        model = backbones.load_base(methods.Method(), None, folder, job.machine)
        if known.validation_loss is None:
            rows, plain = job.material.validation, _plain(job, model, None)
            found = _losses(job, model, None, rows, plain, "Measuring the base model")
            _keep(job, validation_loss=evaluate.mean(found))
        if not scored:
            key = baselines.key(job.run.experiment, job.machine.dtype)
            _keep(job, scores=_score(job, model, None, owner=key, of="the base model"))
    job.store(figures=job.run.figures)


@contextmanager
def _for_the_base(job: Job) -> Iterator[None]:
    """Count the seconds apart: the experiment's next run will not take them."""
    begun = time.monotonic()
    try:
        yield
    finally:
        earlier = job.run.figures.get("base_seconds", 0.0)
        job.run.figures["base_seconds"] = earlier + time.monotonic() - begun


def _known(job: Job) -> baselines.Known:
    experiment, dtype = job.run.experiment, job.machine.dtype
    return database.lasting(
        lambda db: baselines.known(db, experiment, dtype), opened=database.reading
    )


def _keep(job: Job, **values: Any) -> None:
    experiment, dtype = job.run.experiment, job.machine.dtype
    database.lasting(lambda db: baselines.keep(db, experiment, dtype, **values))
    database.lasting(lambda db: runs.announce(db, job.run.id))


def _plain(job: Job, model: Any, soft_prefix: torch.Tensor | None) -> bool:
    return bool(obstacles.find(model, soft_prefix, job.material.train, job.machine))


def _score(
    job: Job, model: Any, soft_prefix: torch.Tensor | None, *, owner: str, of: str
) -> dict[str, Any]:
    experiment, material = job.run.experiment, job.material
    plain = _plain(job, model, soft_prefix)
    losses = _losses(job, model, soft_prefix, material.test, plain, f"Scoring {of}: loss")
    texts = _answers(job, model, soft_prefix, of)
    task, labels = experiment.task, experiment.labels
    pairs = [
        (example.output, text)
        for (_, example), text in zip(material.test_examples, texts, strict=True)
    ]
    by_index = {loss.example: loss.total / max(1, loss.tokens) for loss in losses}
    answers = [
        baselines.Given(
            row, text, scores.score(task, labels, example.output, text), by_index[place]
        )
        for place, ((row, example), text) in enumerate(
            zip(material.test_examples, texts, strict=True)
        )
    ]
    database.lasting(lambda db: baselines.store_answers(db, owner, answers))
    sure = certainty.of_metrics(task, labels, pairs)
    sure["test_loss"] = certainty.of_loss(
        [loss.total for loss in losses], [loss.tokens for loss in losses]
    )
    found = {
        "metrics": scores.summary(task, labels, pairs),
        "primary": scores.primary(task),
        "test_loss": evaluate.mean(losses),
        "num_test": len(pairs),
        "intervals": {name: list(one) for name, one in sure.items()},
        **_latency(job, model, soft_prefix),
    }
    return _with_choices(found, job, model, soft_prefix, plain, of)


def _with_choices(
    found: dict[str, Any],
    job: Job,
    model: Any,
    soft_prefix: torch.Tensor | None,
    plain: bool,
    of: str,
) -> dict[str, Any]:
    """With the figures of a classification by choice among the labels, or why there are none."""
    experiment, rows = job.run.experiment, job.material.test
    names = experiment.labels
    if experiment.task != "classification" or len(names) < 2:
        return found
    formatter = prompts.formatter(files.base_model(experiment.base_model_id))
    labels = [formatter.answer_ids(name) for name in names]
    if why := choices.obstacle(rows, labels, job.machine, plain=plain):
        return found | {"no_choices": why}
    chosen: list[int] = []
    tell = _progress(job, f"Scoring {of}: choice among the labels", len(rows))
    for place in choices.find(model, soft_prefix, rows, labels, job.machine, plain=plain):
        chosen.append(place)
        tell(len(chosen))
    examples = [example for _, example in job.material.test_examples]
    pairs = [
        (example.output, names[place]) for example, place in zip(examples, chosen, strict=True)
    ]
    more = scores.summary(experiment.task, names, pairs)
    sure = certainty.of_metrics(experiment.task, names, pairs)
    return found | {
        "metrics": found["metrics"] | {f"choice_{name}": value for name, value in more.items()},
        "intervals": found["intervals"]
        | {f"choice_{name}": list(one) for name, one in sure.items()},
        "choices": chosen,
    }


def _latency(job: Job, model: Any, soft_prefix: torch.Tensor | None) -> dict[str, float]:
    formatter = prompts.formatter(files.base_model(job.run.experiment.base_model_id))
    ids = [list(row.prompt_ids) for row in job.material.test[: latency.PROMPTS]]
    most = longest_answer(job.run.experiment, job.material)
    return latency.measure(model, soft_prefix, ids, formatter.stop_ids, most)


def _losses(
    job: Job,
    model: Any,
    soft_prefix: torch.Tensor | None,
    rows: Sequence[Any],
    plain: bool,
    doing: str,
) -> list[evaluate.Loss]:
    found: list[evaluate.Loss] = []
    tell = _progress(job, doing, len(rows))
    for some in evaluate.losses(model, soft_prefix, rows, job.machine, plain=plain):
        found += some
        tell(len(found))
    return found


def _answers(job: Job, model: Any, soft_prefix: torch.Tensor | None, of: str) -> list[str]:
    ids = [list(row.prompt_ids) for row in job.material.test]
    most = longest_answer(job.run.experiment, job.material)
    tell = _progress(job, f"Scoring {of}: answers", len(ids))
    return answering.texts(job, model, soft_prefix, ids, most, tell)


def _progress(job: Job, doing: str, total: int) -> Callable[[int], None]:
    """Tell the watchers now and then how far this is, and hear whether to stop."""
    told = 0.0

    def tell(done: int) -> None:
        nonlocal told
        job.watch.check()
        if time.monotonic() - told > LEAST_PROGRESS_SECONDS:
            told = time.monotonic()
            job.store(phase=f"{doing}, {done} of {total}")

    return tell
