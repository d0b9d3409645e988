"""Verdicts: fits, tight, does not fit; the advice is true; what cannot fit is not started by accident."""

import re
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session

from app import (
    base_models,
    capacity,
    claims,
    experiments,
    forecast,
    runs,
    tuning,
    verdicts,
    workers,
)
from app.capacity import Room
from app.errors import Invalid
from app.forecast import Given
from app.methods import METHODS
from app.tables import Experiment, Worker
from app.verdicts import Place
from tests import factories
from tests.test_forecast import SMOLLM2


def worker(db: Session, memory_mb: float, device: str = "Small CPU", devices: int = 1) -> Worker:
    """A tuner that is alive and has so much."""
    made = Worker(id=f"w{memory_mb}", kind="tuner", host="here", pid=1, device=device)
    made.memory_mb, made.num_devices = memory_mb, devices
    workers.beat(db, made)
    return made


def _place(memory_mb: float, devices: int = 1, gpu: bool = False) -> Place:
    return Place("GPU one" if gpu else "CPU", Room(memory_mb, gpu, devices), 1)


def _given(db: Session) -> Given:
    base = factories.base_model(db, shapes=SMOLLM2)
    rows = [(f"word {n} " * (20 + n % 30), "yes") for n in range(80)]
    report = {"mean_input": 280, "longest_input": 450, "mean_output": 3}
    return Given(base, factories.dataset(db, rows, report=report), "{{input}}", (), (40, 20, 20))


def _params(key: str, **changes: Any) -> dict[str, Any]:
    return METHODS[key].schema(**changes).model_dump()


@pytest.mark.parametrize(
    ("memory_mb", "key"),
    [(1000, "fits"), (990, "tight"), (851, "tight"), (850, "fits"), (800, "too-large")],
)
def test_the_verdict_by_share(memory_mb: float, key: str) -> None:
    need = {1000: 850, 990: 842, 851: 724, 850: 722, 800: 801}[int(memory_mb)]
    assert verdicts.of({"memory_mb": need}, {}, [_place(memory_mb)]).key == key


def test_the_place_that_suits_best_counts() -> None:
    told = {"memory_mb": 3000, "gpu_memory_mb": 2000}
    small, large, card = _place(2500), _place(3300), _place(2900, gpu=True)
    assert verdicts.of(told, {}, [small, large]).key == "tight"
    assert verdicts.of(told, {}, [small, large, card]).place == card
    assert verdicts.of(told, {"devices": 2}, [large, card]).key == "too-large"
    assert verdicts.of(told, {"devices": 2}, [_place(2900, 2, gpu=True)]).key == "fits"
    assert verdicts.of(told, {}, []).key == "unknown"


def test_workers_that_are_alike_are_one_place(any_db: Session) -> None:
    for number in range(2):
        made = worker(any_db, 4000.0)
        made.id = f"alike-{number}"
    worker(any_db, 8000.0, "GPU large", 2)
    assert [(one.device, one.room.gpu) for one in verdicts.places(any_db)] == [
        ("GPU large", True),
        ("Small CPU", False),
    ]


@pytest.mark.parametrize("key", METHODS)
def test_advice_is_true_and_the_first_change_that_helps(any_db: Session, key: str) -> None:
    asked, params = _given(any_db), _params(key)
    told = forecast.of(any_db, asked, key, params)
    for share in (0.97, 0.9, 0.7, 0.4, 0.1):
        found = [_place(told["memory_mb"] * share)]
        verdict = verdicts.judge(any_db, asked, key, params, told, found)
        assert verdict.key == "too-large"
        helped = [
            change.words
            for change in verdicts._changes(asked, key, params, found)
            if verdicts.of(
                forecast.of(any_db, asked, change.method, change.params), change.params, found
            ).key
            in ("fits", "tight")
        ]
        if helped:
            assert verdict.advice.startswith(f"{helped[0]} makes it fit: about ")
        else:
            assert verdict.advice == "No single change of its parameters makes it fit."
        assert helped or share < 0.9


def _create(db: Session, asked: Given, override: bool = False, **chosen: Any) -> Experiment:
    return experiments.create(
        db,
        name="Large",
        base_model_id=asked.base_model.id,
        dataset_id=asked.dataset.id,
        task="generation",
        template=asked.template,
        labels=[],
        seed=1,
        methods=chosen,
        override=override,
    )


def test_what_fits_nowhere_is_refused_and_nothing_stored(any_db: Session) -> None:
    asked = _given(any_db)
    worker(any_db, 2000.0)
    with pytest.raises(
        Invalid, match=r"Full fine tuning: it needs about \d\.\d GB of memory"
    ) as no:
        _create(any_db, asked, full={}, prompt_tuning={})
    assert no.value.field == "override"
    assert "Small CPU has 2.0 GB" in no.value.message
    assert "Prompt tuning" not in no.value.message
    any_db.rollback()
    assert experiments.all(any_db) == []
    assert len(_create(any_db, asked, prompt_tuning={}).runs) == 1


def test_overridden_it_starts_alone_with_all_there_is(any_db: Session) -> None:
    asked = _given(any_db)
    worker(any_db, 2000.0)
    made = _create(any_db, asked, True, prompt_tuning={}, full={})
    marked = {run.method: run.forecast.get("override") for run in made.runs}
    assert marked == {"prompt_tuning": None, "full": True}
    (full,) = (run for run in made.runs if run.method == "full")
    assert full.forecast["memory_mb"] > 2000  # what was forecast stays
    first = claims.claim_next(any_db, "w1", Room(2000.0))
    assert first
    assert first.method == "prompt_tuning"
    taken = capacity.Taken(capacity.need(first.forecast, False), 1.0)
    assert claims.claim_next(any_db, "w1", Room(2000.0, taken=(taken,))) is None
    second = claims.claim_next(any_db, "w1", Room(2000.0))
    assert second
    assert second.id == full.id
    runs.fail(any_db, full.id, 1, "The machine has not enough memory.")
    assert runs.retry(any_db, full.id).forecast["override"]


def test_without_a_worker_nothing_is_refused(any_db: Session) -> None:
    assert _create(any_db, _given(any_db), full={}).runs[0].state == "queued"


def test_the_command_line_asks_for_the_same_word(db: Session, tmp_path: Path) -> None:
    base = factories.base_model(db, shapes=SMOLLM2, name="Small")
    worker(db, 2000.0)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"input": "text {n}", "output": "o {n}"}}\n' for n in range(60)))
    asked = tuning.Question(str(data), "full", base.name, "", "", "", 1, [])
    with pytest.raises(Invalid, match="fits no tuning worker that is alive"):
        tuning._create(db, asked, {"full": {}})
    db.rollback()
    made = tuning._create(db, asked._replace(override=True), {"full": {}})
    assert made.runs[0].forecast["override"]
    said = tuning.told(made.runs[0], "Full fine tuning")
    assert re.fullmatch(
        r"Full fine tuning: about \d\.\d GB of memory, [\d.]+ to [\d.]+ min\.", said
    )


def test_the_example_leaves_out_what_does_not_fit(any_db: Session) -> None:
    base = base_models.add_default(any_db)
    base.state, base.shapes = "ready", SMOLLM2
    any_db.commit()
    small = worker(any_db, 2800.0)
    made = experiments.tune_example(any_db, "support_tickets")
    assert {run.method for run in made.runs} == {"prompt_tuning", "lora", "qlora"}
    workers.describe(any_db, small.id, "Tiny CPU", 500.0)
    with pytest.raises(Invalid, match=r"Tiny CPU has 0\.5 GB"):
        experiments.tune_example(any_db, "support_tickets")
