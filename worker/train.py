"""The training loop, one for all methods: a generator of measurements that knows only tensors."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from app import pace
from app.errors import StudioError
from app.methods import Params
from app.points import Measured
from worker import distributed, evaluate, lanes, learn, obstacles, optimizers, packing, signs
from worker.backbones import num_virtual
from worker.checkpoints import State
from worker.distributed import ALONE, Group
from worker.hardware import Hardware, peak_memory_mb
from worker.packing import Example


class Tick(NamedTuple):
    """A sign of life between two measurements: `done` of `total` rows of this step or look."""

    doing: str  # "training" or "validating"
    step: int
    done: int
    total: int


def begin(
    model: Any,
    soft_prefix: Tensor | None,
    examples: Sequence[Example],
    params: Params,
    machine: Hardware,
) -> State:
    """The state before the first step."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for value in trained.values():
        value.grad = None
    shapes = [
        [value for value in trained.values() if (value.ndim > 1) is wide] for wide in (True, False)
    ]
    groups = [
        # Scales and biases are not pulled towards zero.
        {"params": values, "weight_decay": decay}
        for values, decay in zip(shapes, (params.weight_decay, 0.0), strict=True)
        if values
    ]
    optimizer = optimizers.make(groups, params, machine)
    obstacle = obstacles.find(model, soft_prefix, examples, machine)
    paired = lanes.suit(machine) and not (
        obstacle
        or params.gradient_checkpointing  # it sets the common generator back
        or obstacles.draws_chance(model, soft_prefix, examples, machine)
    )
    return State(trained, optimizer, obstacle, paired)


def train(
    model: Any,
    soft_prefix: Tensor | None,
    examples: Sequence[Example],
    validation: Sequence[Example],
    params: Params,
    seed: int,
    machine: Hardware,
    state: State,
    *,
    usual_rates: tuple[float, float],
    look_first: bool = False,
    score: Callable[[], float] | None = None,
    group: Group = ALONE,
) -> Iterator[Measured | Tick]:
    """Train from `state` to the end, yielding a point for every step and for every look at the
    validation loss, and a tick after every row: whoever stops asking has stopped the training.

    `state` is current at every yield; after a validation point, `state.best_step` equals its step
    if it is the best so far: by `score` if that is given, and by the loss. `look_first` looks before the
    first step too, which is never the best: what is kept has been trained. Raises StudioError when the loss stays no number.

    Where a `group` of processes shares the run, each calls this; the points are the same in all.
    """
    run = _Run(model, soft_prefix, examples, validation, params, seed, machine, state, group, score)
    look_after = pace.looks(run.total, params) | ({0} if look_first else set())
    model.train()
    while True:
        if state.step in look_after and state.looked < state.step:
            yield from _look(run)
        if state.step >= run.total or run.is_stale:
            return
        yield from _step(run)
        if state.skipped >= signs.PATIENCE:
            raise StudioError(
                signs.no_number(state.step, run.total, params.learning_rate, usual_rates)
            )


class _Run(NamedTuple):
    """What stays the same from step to step."""

    model: Any
    soft_prefix: Tensor | None
    examples: Sequence[Example]
    validation: Sequence[Example]
    params: Params
    seed: int
    machine: Hardware
    state: State
    group: Group
    score: Callable[[], float] | None

    @property
    def per_epoch(self) -> int:
        return pace.steps_per_epoch(len(self.examples), self.params)

    @property
    def total(self) -> int:
        return self.per_epoch * self.params.num_epochs

    @property
    def is_stale(self) -> bool:
        """Whether nothing has improved for as many looks as were to be waited."""
        return 0 < self.params.patience <= self.state.stale


def _step(run: _Run) -> Iterator[Measured | Tick]:
    """One update from `batch_size * accumulate_steps` examples, weighed by their target tokens."""
    state, params = run.state, run.params
    epoch, place = divmod(state.step, run.per_epoch)
    size = params.batch_size * params.accumulate_steps
    order = packing.order(len(run.examples), run.seed, epoch)
    if state.obstacle:
        order = packing.of_like_length(order, run.examples, size)
    chosen = [run.examples[index] for index in order[place * size : (place + 1) * size]]
    targets = sum(len(example.answer_ids) for example in chosen)
    tokens = targets + sum(len(example.prompt_ids) for example in chosen)
    virtual = num_virtual(run.soft_prefix)
    paired = state.paired and run.group.size == 1
    rows = run.group.rows(
        chosen,
        run.machine.token_budget,
        virtual,
        plain=bool(state.obstacle),
        pairs=paired,
        even=run.machine.keeps_shapes,
        lend=not run.group.spreads,
    )
    state.optimizer.zero_grad()
    # A seed of its own for each row, so that dropout is the same after a resume.
    stream = numpy.random.Philox(key=[run.seed % 2**64, 2**63 + state.step])
    dropouts = stream.random_raw(len(rows) * run.group.size)[run.group.rank :: run.group.size]
    parts = [
        learn.Part(row, weight / targets, int(dropout >> 1))
        for (row, weight), dropout in zip(rows, dropouts, strict=True)
    ]
    loss = seconds = 0.0
    done = 0
    learner = learn.Learner(run.model, run.soft_prefix, state.trained, run.machine)
    started = time.perf_counter()
    for share, count in learner.step(parts, paired=paired):
        loss, done = loss + share, done + count
        seconds += time.perf_counter() - started
        yield Tick("training", state.step + 1, done, len(parts))
        started = time.perf_counter()
    run.group.sum_gradients(state.trained)
    (loss,) = run.group.sums(loss)
    learning_rate = pace.rate(state.step + 1, run.total, params)
    norm = _update(state, learning_rate, params.max_grad_norm, loss)
    seconds += time.perf_counter() - started
    state.step += 1
    state.seconds += seconds
    state.tokens += tokens
    state.skipped = 0 if norm is not None else state.skipped + 1
    yield Measured(
        kind="train",
        step=state.step,
        epoch=state.step / run.per_epoch,
        loss=loss if norm is not None else None,
        learning_rate=learning_rate,
        grad_norm=norm,
        tokens_per_second=tokens / seconds,
        memory_mb=peak_memory_mb(run.machine),
        seconds=state.seconds,
        tokens=state.tokens,
    )


def _update(state: State, learning_rate: float, longest: float, loss: float) -> float | None:
    """Apply the gradients; their norm before clipping, or None if they are no numbers: nothing moved."""
    length = torch.nn.utils.clip_grad_norm_(state.trained.values(), longest)
    norm = float(distributed.whole(length))
    fit = math.isfinite(loss) and math.isfinite(norm)
    if fit:
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate
        state.optimizer.step()
    state.optimizer.zero_grad()
    return norm if fit else None


def _look(run: _Run) -> Iterator[Measured | Tick]:
    """Measure the validation loss, and the score, and note whether the state is the best so far."""
    state = run.state
    found: list[evaluate.Loss] = []
    plain = bool(state.obstacle)
    for some in evaluate.losses(
        run.model, run.soft_prefix, run.validation, run.machine, plain=plain, group=run.group
    ):
        found += some
        yield Tick("validating", state.step, len(found), len(run.validation))
    total, tokens = run.group.sums(
        sum(one.total for one in found), sum(one.tokens for one in found)
    )
    loss = total / max(1, tokens)
    known = math.isfinite(loss)
    score = run.score() if run.score and known else None
    state.looked = state.step
    if known and state.step and _is_better(state, loss, score):
        state.best_loss, state.best_score, state.best_step = loss, score, state.step
        state.stale = 0
    elif state.step:
        state.stale += 1
    yield Measured(
        kind="validation",
        step=state.step,
        epoch=state.step / run.per_epoch,
        loss=loss if known else None,
        learning_rate=None,
        grad_norm=None,
        tokens_per_second=None,
        memory_mb=peak_memory_mb(run.machine),
        seconds=state.seconds,
        tokens=state.tokens,
    )


def _is_better(state: State, loss: float, score: float | None) -> bool:
    """Than the best so far: by the score where there is one, and where that is equal by the loss."""
    if state.best_loss is None:
        return True
    if score is None or state.best_score is None or score == state.best_score:
        return loss < state.best_loss
    return score > state.best_score
