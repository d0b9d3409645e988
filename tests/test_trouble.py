"""When a training goes wrong: too little memory, losses that are no numbers or rise, and when to end early."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy.orm import Session

from app import database, runs
from app.tables import Run
from tests import tiny
from tests.faults import small
from tests.test_resume import _quick, attempt, check, model, stop, whole  # noqa: F401
from worker import learn, relief, train
from worker import run as worker_run
from worker.backbones import inner
from worker.hardware import FLOAT32
from worker.signs import LONG, Divergence


def lacking(monkeypatch: pytest.MonkeyPatch, error: Exception, room: int, thrifty: int) -> None:
    """A machine on which longer rows than `room`, checkpointed `thrifty`, find no memory."""
    learned = learn.Learner._learn

    def narrow(learner: Any, parts: Any, lender: Any) -> float:
        most = thrifty if inner(learner.model).is_activation_checkpointing else room
        if sum(part.row.tokens for part in parts) > most:
            raise error
        return learned(learner, parts, lender)

    monkeypatch.setattr(learn.Learner, "_learn", narrow)


def finding(monkeypatch: pytest.MonkeyPatch, by_step: Callable[[int], float | None]) -> None:
    """Training that finds these losses; None: what it really finds."""
    learned, step, states = learn.Learner._learn, train._step, []

    def noted(run: Any) -> Any:
        states[:] = [run.state]
        return step(run)

    def found(*given: Any) -> float:
        true = learned(*given)
        told = by_step(states[0].step)
        return true if told is None else told

    monkeypatch.setattr(train, "_step", noted)
    monkeypatch.setattr(learn.Learner, "_learn", found)


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, so that other rows change nothing but the order of sums."""
    real = worker_run.hardware.find
    monkeypatch.setattr(
        worker_run.hardware,
        "find",
        lambda *given: real(*given)._replace(dtype=FLOAT32, products=FLOAT32),
    )


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
]


@pytest.mark.parametrize("error", ERRORS, ids=["gpu", "cpu"])
def test_a_run_out_of_memory_goes_on_with_half_the_batch_then_with_checkpointing(
    db: Session,
    model: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    run = small.run(db, small.experiment(db, model), "lora", dropout=0.0, batch_size=8)
    curve, _ = whole(run)
    attempt(run.id, {12: stop("ending")})
    begun = small.now(run.id)
    lacking(monkeypatch, error, room=0, thrifty=60)
    budgets = []
    while small.now(run.id).state == "queued":
        attempt(run.id)
        budgets.append(small.now(run.id).figures["token_budget"])
    found = small.now(run.id)
    assert found.state == "succeeded", small.said(run.id)
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[0] >= found.figures["longest_tokens"] == budgets[-1]
    assert found.figures["gradient_checkpointing"] is True
    assert found.figures["prompts_at_once"] == max(1, 16 >> len(set(budgets)))
    said = "\n".join(small.said(run.id))
    assert f"ran out of memory at step {begun.step}" in said
    assert "half the batch at a time and twice the accumulation" in said
    assert "the effective batch of 8 examples stays" in said
    assert "with activation checkpointing" in said
    for one, other in zip(small.curve(run.id), curve, strict=True):
        assert one[:2] == other[:2]
        assert one[2] == pytest.approx(other[2], rel=1e-3)
    check()


def test_where_nothing_helps_the_run_fails_in_words(
    db: Session,
    model: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = small.run(db, small.experiment(db, model), "lora")
    lacking(monkeypatch, MemoryError(), room=0, thrifty=0)
    while small.now(run.id).state == "queued":
        attempt(run.id)
    error = small.now(run.id).error or ""
    assert error.startswith("The machine has not enough memory for this run, not even")
    assert error.endswith("no checkpoint had been saved yet.")
    check()


def test_half_the_batch_is_half_of_what_a_step_has_however_much_a_row_may_hold(
    db: Session,
    model: Path,  # noqa: F811
) -> None:
    run = small.run(db, small.experiment(db, model), "lora")
    with database.session() as own:
        own.get_one(Run, run.id).figures = {"token_budget": 1024, "longest_tokens": 40}
        own.commit()
    found = relief.find(small.now(run.id))
    assert found is not None
    assert found[0]["token_budget"] == 80  # four examples at most, now two
    assert "rows of at most 80 tokens instead of 160" in found[1]


def test_steps_that_are_no_numbers_are_not_applied_and_end_the_run_with_its_last_checkpoint(
    db: Session,
    model: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = small.run(db, small.experiment(db, model), "lora", learning_rate=0.5)
    finding(monkeypatch, lambda step: float("nan") if step >= 5 else None)
    attempt(run.id)
    found = small.now(run.id)
    assert found.state == "failed"
    error = found.error or ""
    assert "Training stopped at step 8 of 20" in error
    assert "3 times in a row, and none of these steps was applied" in error
    assert "a learning rate of 0.5, above what usually works (5e-05 to 0.002)" in error
    assert "What was measured before is kept, and the checkpoint of step" in error
    losses = [point[2] for point in small.curve(run.id) if point[0] == "train"]
    assert losses[5:] == [None] * 3
    check()


def test_a_run_whose_model_cannot_be_given_packed_rows_says_so_once_and_trains(
    db: Session, tmp_path: Path
) -> None:
    bloom = tiny.model(tmp_path / "bloom", architecture="bloom", n_head=4, initializer_range=0.15)
    run = small.run(db, small.experiment(db, bloom), "full")
    attempt(run.id, {12: stop("ending")})
    attempt(run.id)
    assert small.now(run.id).state == "succeeded", small.said(run.id)
    with database.reading() as reader:
        told = [e for e in runs.history(reader, run.id) if "packed rows" in e.message]
    assert [event.level for event in told] == ["warning"]
    assert "BloomForCausalLM has an attention of its own" in told[0].message
    assert "Training uses plain padded rows, which give the same result" in told[0].message
    losses = [point[2] for point in small.curve(run.id) if point[0] == "validation"]
    assert losses[-1] < losses[0]  # type: ignore[operator]
    check()


def test_training_ends_early_when_the_validation_loss_gets_no_better(
    db: Session,
    model: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {"num_epochs": 10, "validation_interval": 2, "patience": 3, "learning_rate": 0.1}
    run = small.run(db, small.experiment(db, model), "full", **given)
    attempt(run.id, {30: stop("ending")})  # the count of looks outlives an interruption
    while small.now(run.id).state == "queued":
        attempt(run.id)
    found = small.now(run.id)
    assert found.state == "succeeded"
    assert found.step == found.num_steps < 100
    assert found.best_step == found.step - 6
    (line,) = [line for line in small.said(run.id) if line.startswith("Training ended early")]
    assert f"at step {found.step} of 100" in line
    assert "has not improved for 3 looks" in line
    assert line.endswith(f"The best state is that of step {found.best_step}.")
    check()


def test_a_run_that_diverges_is_warned_of_once_even_if_it_is_interrupted(
    db: Session,
    model: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finding(monkeypatch, lambda step: 1.0 if step < 15 else 9.0)
    run = small.run(db, small.experiment(db, model), "lora", num_epochs=5)
    attempt(run.id, {90: stop("ending")})
    attempt(run.id)
    with database.reading() as reader:
        warned = [e for e in runs.history(reader, run.id) if "this run diverges" in e.message]
    assert [event.level for event in warned] == ["warning"]
    assert small.now(run.id).state == "succeeded"


def test_divergence_is_a_smoothed_loss_above_twice_its_least_for_some_time() -> None:
    falling = [4.0 * 0.95**step for step in range(200)]
    assert not any(map(Divergence().shows, falling))
    noisy = [1.0 + 0.9 * (step % 2) for step in range(200)]
    assert not any(map(Divergence().shows, noisy))
    one_peak = [1.0] * 50 + [5.0] + [1.0] * 50
    assert not any(map(Divergence().shows, one_peak))
    rising = [1.0] * 30 + [4.0] * 60
    shown = [Divergence(rising[:step]).told for step in range(len(rising) + 1)]
    assert shown.index(True) > 30 + LONG
    watch = Divergence()
    assert sum(map(watch.shows, [*rising, None, *rising])) == 1
