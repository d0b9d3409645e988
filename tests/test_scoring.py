"""What a worker measures of a finished run: choice among the labels, speed of answers, intervals."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy.orm import Session

from app import claims, database, experiments
from app.comparison import baselines, figures, verdict
from app.settings import settings
from app.tables import Experiment, Run
from tests import tiny
from tests.engine import MACHINE, Setup, rows
from tests.faults import small
from worker import choices, energy, evaluate, generate, latency
from worker import run as worker_run
from worker.packing import Row
from worker.watch import Watch

LABELS = [[70, 80, 2], [71, 81, 2], [72, 82, 2], [73, 83, 84, 2]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model(tmp_path_factory.mktemp("scoring") / "llama", initializer_range=0.15)


class Unwatched(Watch):
    """Nobody says anything."""

    def __init__(self, run: Run) -> None:
        self.run_id, self.attempt = run.id, run.attempt

    def check(self) -> None:
        pass


def _attempt() -> None:
    """One go at the next run, as a worker's child makes it."""
    with database.session() as other:
        claimed = claims.claim_next(other, "w")
    assert claimed is not None
    worker_run._ended(claimed.id, claimed.attempt, Unwatched(claimed))


def _finished(db: Session, of: Experiment, method: str, **params: Any) -> Run:
    """A run that went all its way."""
    run = small.run(db, of, method, **params)
    _attempt()
    found = small.now(run.id)
    assert found.state == "succeeded", small.said(run.id)
    return found


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "disk_reserve_mb", 0)


def test_a_method_crippled_on_purpose_gets_the_right_verdict(db: Session, model: Path) -> None:
    """Trained, answered, scored and judged on the whole way: one learns, one may not move."""
    of = small.experiment(db, model)
    able = _finished(db, of, "full", num_epochs=12)
    crippled = _finished(db, of, "prompt_tuning", num_epochs=1, learning_rate=1e-5)
    db.expire_all()
    found = figures.compare(db, experiments.get(db, of.id))
    said = " ".join(verdict.of(found, of.task))
    assert able.scores["metrics"]["accuracy"] > 0.7 > crippled.scores["metrics"]["accuracy"]
    assert "Best answers: Full fine tuning" in said
    assert "it is better than Prompt tuning by" in said
    assert "Full fine tuning is better than the base model as it is." in said
    assert "Prompt tuning: no difference from the base model can be seen." in said
    assert "Prompt tuning is not shown to be better than always answering the commonest" in said

    for stored in (able.scores, baselines.known(db, of, able.figures["precision"]).scores):
        metrics, sure = stored["metrics"], stored["intervals"]
        assert metrics.keys() >= {"accuracy", "macro_f1", "choice_accuracy", "choice_macro_f1"}
        assert sure.keys() == metrics.keys() | {"test_loss"}
        for name, (low, high) in sure.items():
            value = metrics.get(name, stored["test_loss"])
            assert low <= value <= high
        assert len(stored["choices"]) == stored["num_test"] == 20
        assert stored["first_token_seconds"] > 0
    row = next(row for row in found.rows if row.key == able.id)
    assert row.perplexity == pytest.approx(math.exp(able.scores["test_loss"]))
    assert row.energy_wh is None  # a processor tells nothing
    assert 0 < able.figures["base_seconds"] < able.finished_at - able.started_at
    assert "base_seconds" not in crippled.figures  # it was known by then
    assert able.figures["size_bytes"] > 0


def test_the_best_state_may_be_told_by_the_score_of_answers(db: Session, model: Path) -> None:
    of = small.experiment(db, model)
    by_loss = _finished(db, of, "full", num_epochs=3)
    run = _finished(db, of, "full", num_epochs=3, keep_by="score")
    told = [line for line in small.said(run.id) if line.startswith("Accuracy of 20 validation")]
    scores = [float(line.split(": ")[1].rstrip(".")) for line in told]
    looks = [point for point in small.curve(run.id) if point[0] == "validation"]
    assert len(scores) == len(looks) == 10
    best = max(range(10), key=lambda place: (scores[place], -looks[place][2]))  # type: ignore[operator]
    assert run.best_step == looks[best][1]
    # Answering changes nothing of the training.
    assert small.curve(run.id) == small.curve(by_loss.id)
    assert not any("validation examples:" in line for line in small.said(by_loss.id))


@pytest.mark.parametrize("most", [1, 0], ids=["one is possible", "not even one"])
def test_where_answers_find_no_memory_fewer_are_given_at_a_time_and_nothing_is_trained_again(
    db: Session, model: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    of = small.experiment(db, model)
    params = {"num_epochs": 1, "batch_size": 1}  # a row is as short as it can be from the first
    calm = _finished(db, of, "lora", **params)
    answer, asked = evaluate._answer, []

    def lacking(model: Any, soft_prefix: Any, rest: Any, *given: Any) -> Any:
        asked.append(len(rest))
        if len(rest) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answer(model, soft_prefix, rest, *given)

    monkeypatch.setattr(evaluate, "_answer", lacking)
    run = small.run(db, of, "lora", **params)
    usual = calm.figures["prompts_at_once"]
    tried = [usual >> times for times in range(usual.bit_length())]  # down to one
    for _ in tried:
        _attempt()
    found, said = small.now(run.id), "\n".join(small.said(run.id))
    assert asked == tried + [1] * (19 if most else 0)  # of 20 test examples
    assert found.figures["token_budget"] == calm.figures["token_budget"]
    assert found.figures["prompts_at_once"] == 1
    assert f"with half as many prompts answered at a time ({usual // 2} instead of {usual})" in said
    assert "activation checkpointing" not in said  # it would help training alone
    assert small.curve(run.id) == small.curve(calm.id)
    if most:
        assert found.state == "succeeded"
        assert found.scores["num_test"] == 20
    else:
        assert found.state == "failed"
        assert "not enough memory for this run, not even for one example at a time." in found.error


@pytest.mark.parametrize("key", ["full", "prompt_tuning"])
@pytest.mark.parametrize("plain", [False, True], ids=["packed", "plain"])
def test_the_choice_is_the_label_with_the_highest_probability_of_all_its_tokens(
    model: Path, key: str, plain: bool
) -> None:
    setup = Setup(model, key)
    asked = rows(8)
    found = list(choices.find(setup.model, setup.soft_prefix, asked, LABELS, MACHINE, plain=plain))
    for row, chosen in zip(asked, found, strict=True):
        totals = []
        for label in LABELS:
            alone = [Row(row.prompt_ids, label)]
            (found_of,) = evaluate.losses(
                setup.model, setup.soft_prefix, alone, MACHINE, plain=True
            )
            (loss,) = found_of
            assert loss.tokens == len(label)
            totals.append(loss.total)
        assert chosen == totals.index(min(totals))
    assert len(set(found)) > 1 or key == "prompt_tuning"


def test_what_would_take_too_long_is_left_out_with_a_reason() -> None:
    asked = rows(8)
    assert choices.obstacle(asked, LABELS, MACHINE, plain=False) == ""
    assert "41 labels" in choices.obstacle(asked, [[5, 2]] * 41, MACHINE, plain=False)
    many = asked * 600
    assert "tokens to read" in choices.obstacle(many, LABELS, MACHINE, plain=True)


def test_the_wait_for_an_answer_is_that_of_the_playground(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(model, "full")
    setup.model.eval()
    asked = []

    def slow(*given: Any, **how: Any) -> Any:
        asked.append(given[2])
        return iter([1, 2, 3])

    clock = iter(0.5 * place for place in range(100))
    monkeypatch.setattr(generate, "stream", slow)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(clock))
    found = latency.measure(setup.model, None, [[1], [2], [3], [4], [5], [6]], {2}, 8)
    assert asked == [[1], [1], [2], [3], [4], [5]]  # the first once to warm up
    assert found == {"first_token_seconds": 0.5, "answer_tokens_per_second": 2.0}
    monkeypatch.setattr(generate, "stream", lambda *given, **how: iter([]))
    assert latency.measure(setup.model, None, [[1]], {2}, 8) == {}


def test_energy_is_not_measured_where_nothing_tells_it() -> None:
    assert energy.meter(MACHINE)() is None
    if not torch.cuda.is_available():
        assert energy.meter(MACHINE._replace(device="cuda"))() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="There is no GPU here.")
def test_a_gpu_tells_its_energy() -> None:
    meter = energy.meter(MACHINE._replace(device="cuda"))
    big = torch.ones(4096, 4096, device="cuda")
    for _ in range(200):
        big = torch.tanh(big @ big)
    torch.cuda.synchronize()
    spent = meter()
    assert spent is None or spent > 0
