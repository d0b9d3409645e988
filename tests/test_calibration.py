"""Calibration: what finished runs and rehearsals make of the next forecast, and the error that is shown."""

import time
from typing import Any

import pytest
from sqlalchemy.orm import Session

from app import calibration, experiments, forecast, lengths, rehearsals
from app.tables import BaseModel, Dataset, Experiment, Run
from tests import factories
from tests.test_forecast import SMOLLM2


@pytest.fixture
def base(any_db: Session) -> BaseModel:
    return factories.base_model(any_db, shapes=SMOLLM2)


@pytest.fixture
def data(any_db: Session) -> Dataset:
    return factories.dataset(any_db)


def _create(db: Session, base: BaseModel, data: Dataset, **chosen: dict[str, Any]) -> Experiment:
    return experiments.create(
        db,
        name="One",
        base_model_id=base.id,
        dataset_id=data.id,
        task="generation",
        template="Say it:\n{{input}}",
        labels=[],
        seed=1,
        methods=chosen or {"lora": {}},
    )


def _finish(
    db: Session,
    run: Run,
    memory: float,
    train: float = 1.0,
    kind: str = "cpu",
    other: float = 1.0,
    base: float = 0.0,
) -> None:
    """As if it had taken so many times what was reckoned: guessed memory, training, the rest; and as many
    seconds for the base model."""
    was = run.forecast["reckoned"][kind]
    seconds = train * was["train"] + other * was["other"] + base
    run.figures = {
        "peak_memory_mb": was["known_mb"] + memory * was["guessed_mb"],
        "device_kind": kind,
        "base_seconds": base,
    }
    run.state, run.attempt, run.train_seconds = "succeeded", 1, train * was["train"]
    run.finished_at = time.time()
    run.started_at = run.finished_at - seconds
    db.commit()


def test_the_median_of_the_last_eight_runs_corrects_what_is_guessed(
    any_db: Session, base: BaseModel, data: Dataset
) -> None:
    made = [_create(any_db, base, data).runs[0] for _ in range(10)]
    for run, ratio in zip(made, [9.0, 9.0, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 5.0], strict=True):
        _finish(any_db, run, ratio, train=ratio)
        time.sleep(0.01)
    told = _create(any_db, base, data).runs[0].forecast
    was = told["reckoned"]["cpu"]
    assert told["memory_mb"] == round(was["known_mb"] + 1.35 * was["guessed_mb"])
    assert told["parts"]["weights"] == made[0].forecast["parts"]["weights"]  # exact as they are
    assert told["train_seconds"] == pytest.approx(1.35 * was["train"], abs=0.1)
    assert told["runs"] == 8
    assert told["memory_from"] == {"cpu": "runs", "cuda": "shapes"}
    assert told["seconds_low"] < told["seconds"] < told["seconds_high"]
    assert told["seconds_high"] >= round(5 * was["train"] + was["other"])  # all of them lie in it


def test_a_short_run_says_less_of_its_pace_than_a_long_one(
    any_db: Session, base: BaseModel, data: Dataset
) -> None:
    _finish(any_db, _create(any_db, base, data, full={}).runs[0], 1.0)
    found = []
    for epochs in (1, 20):
        of = _create(any_db, base, data, lora={"num_epochs": epochs}).runs[0]
        _finish(any_db, of, 1.0, train=0.25, other=0.5)
        told = _create(any_db, base, data).runs[0].forecast
        found.append(told["train_seconds"] / told["reckoned"]["cpu"]["train"])
        assert told["seconds_low"] < told["seconds"]
        any_db.delete(of)
        any_db.commit()
    short, long = found
    # The pace of all runs, one as reckoned and one of a quarter of it, is 0.625.
    assert 0.25 < long < short < 0.625


def test_measuring_the_base_model_is_foretold_of_the_first_run_alone_and_learned_from_none(
    any_db: Session, base: BaseModel, data: Dataset
) -> None:
    first, second = _create(any_db, base, data, lora={}, prompt_tuning={}).runs
    was = first.forecast["reckoned"]["cpu"]
    assert was["base"] > 0
    assert first.forecast["seconds"] == round(was["train"] + was["other"] + was["base"])
    assert second.forecast["reckoned"]["cpu"]["base"] == 0
    _finish(any_db, first, 1.0, base=500.0)
    told = forecast.make(any_db, first.experiment, first.method, first.params)
    assert told["reckoned"]["cpu"]["base"] == 0  # its experiment has a run that measured it
    assert told["seconds"] == round(was["train"] + was["other"])
    first.state, second.state = "failed", "cancelled"
    any_db.commit()
    again = forecast.make(any_db, first.experiment, first.method, first.params)
    assert again["reckoned"]["cpu"]["base"] == was["base"]


def test_of_another_method_model_or_device_memory_says_nothing(
    any_db: Session, base: BaseModel, data: Dataset
) -> None:
    before = _create(any_db, base, data).runs[0].forecast
    for key, kind in (("full", "cpu"), ("lora", "cuda")):
        _finish(any_db, _create(any_db, base, data, **{key: {}}).runs[0], 3.0, 4.0, kind)
    other = factories.base_model(any_db, shapes=SMOLLM2)
    _finish(any_db, _create(any_db, other, data).runs[0], 3.0, 4.0)
    told = _create(any_db, base, data).runs[0].forecast
    assert told["memory_mb"] == before["memory_mb"]
    assert told["memory_from"]["cpu"] == "shapes"
    # The machine's speed is known from the other method, only roughly.
    assert told["time_from"] == "others"
    assert told["train_seconds"] == pytest.approx(4 * before["train_seconds"], rel=0.1)
    assert not told["measured"]


def test_the_error_is_of_the_forecasts_as_they_were_stored(
    any_db: Session, base: BaseModel, data: Dataset
) -> None:
    first, second = (_create(any_db, base, data).runs[0] for _ in range(2))
    told = dict(first.forecast)
    _finish(any_db, first, 1.5)
    _finish(any_db, second, 0.9)
    later = _create(any_db, base, data).runs[0].forecast
    assert first.forecast == told  # it stays the one that the run was created with
    memory = calibration.compared(first)[0]
    assert memory.error == pytest.approx(told["memory_mb"] / memory.measured - 1)
    assert later["memory_error"]["runs"] == 2
    assert later["memory_error"]["low"] == pytest.approx(memory.error)
    assert later["memory_error"]["low"] < 0 < later["memory_error"]["high"]


def test_an_interrupted_run_says_nothing_of_time(
    any_db: Session, base: BaseModel, data: Dataset
) -> None:
    (run,) = _create(any_db, base, data).runs
    _finish(any_db, run, 1.2, train=3.0)
    run.attempt = 2
    any_db.commit()
    told = _create(any_db, base, data).runs[0].forecast
    assert told["time_from"] == "shapes"
    assert told["memory_from"]["cpu"] == "run"
    assert [one.measured for one in calibration.compared(run) if one.what == "seconds"] == [None]


def _rehearsed(db: Session, asked: forecast.Given, params: dict[str, Any], **figures: Any) -> None:
    made = rehearsals.ask(db, **asked.row("lora", params))
    assert rehearsals.claim(db, "w1")
    measured = {"examples": [[90, 5]] * 8, "shared": 40, "device": "CPU", "device_kind": "cpu"}
    more = {"precision": "bfloat16", "token_budget": 1024, "step_seconds": 4.0, "steps": 2}
    rehearsals.finish(db, made.key, measured | more | {"peak_memory_mb": 2000.0} | figures)


def test_a_rehearsal_goes_before_runs_but_only_for_its_configuration(
    any_db: Session, base: BaseModel, data: Dataset
) -> None:
    experiment = _create(any_db, base, data)
    (run,) = experiment.runs
    _finish(any_db, run, 1.5)
    asked = forecast.given(experiment)
    _rehearsed(any_db, asked, run.params)
    told = forecast.of(any_db, asked, "lora", run.params | {"learning_rate": 1e-3, "num_epochs": 9})
    assert told["memory_from"]["cpu"] == told["time_from"] == "rehearsal"
    again = forecast.of(any_db, asked, "lora", run.params)
    _rehearsed(any_db, asked, run.params, peak_memory_mb=3000.0, step_seconds=8.0)
    more = forecast.of(any_db, asked, "lora", run.params)
    assert more["memory_mb"] > again["memory_mb"] + 500
    assert more["train_seconds"] == pytest.approx(2 * again["train_seconds"], rel=0.02)
    other = forecast.of(any_db, asked, "lora", run.params | {"rank": 4})
    assert other["memory_from"]["cpu"] == "run"


def test_a_rehearsal_of_the_very_rows_that_come_is_taken_as_it_is(
    any_db: Session, base: BaseModel, data: Dataset
) -> None:
    """Where every step is like the rehearsed one its peak is the forecast."""
    rows = [("same words", "yes")] * 60
    same = factories.dataset(any_db, rows, report={"mean_input": 10, "mean_output": 3})
    two_updates = {"batch_size": 16, "num_epochs": 1}
    experiment = _create(any_db, base, same, lora=two_updates)
    (run,) = experiment.runs
    asked = forecast.given(experiment)
    long = lengths.of(base, same, experiment.template, [])
    pairs = {"examples": [list(long.rows[0])] * 16, "shared": long.shared}
    _rehearsed(any_db, asked, run.params, **pairs, peak_memory_mb=1777.0)
    assert forecast.of(any_db, asked, "lora", run.params)["memory_mb"] == pytest.approx(
        1777, abs=60
    )
