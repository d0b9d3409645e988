"""Two thousand steps, two hundred kills: the same weights, and a point of each kind at each step."""

import time
from collections import Counter
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from app import queue
from tests.faults import small
from tests.faults.plant import Plant, reaches, seed, until
from tests.faults.test_kills import same, step, whole

KILLS = 200
LONG = 3000.0  # seconds


@pytest.mark.faults
def test_promise_3_two_hundred_kills_in_two_thousand_steps(
    db: Session, model: Path, plant: Plant, request: pytest.FixtureRequest
) -> None:
    chance = seed(request)
    given = {"num_epochs": 50, "batch_size": 1, "validation_interval": 50}
    run, curve, files = whole(db, model, plant, "quick tuner", LONG, **given)
    queue.ring("tuner")
    killed: Counter[str] = Counter()
    began = time.monotonic()
    while sum(killed.values()) < KILLS:
        goal = step(run.id) + chance.randint(2, 9)
        until(lambda: step(run.id) >= goal or small.now(run.id).state == "succeeded")  # noqa: B023
        assert small.now(run.id).state != "succeeded", killed
        time.sleep(chance.random() / 10)
        if sum(killed.values()) % 25 == 24:  # now and then the whole worker
            plant.kill("quick tuner")
            plant.start("quick tuner")
            killed["worker"] += 1
        elif plant.kill_trainer("quick tuner", run.id):
            killed["trainer"] += 1
    reaches(run.id, "succeeded", seconds=LONG)
    found = small.now(run.id)
    kinds = Counter(kind for kind, *_ in small.curve(run.id))
    print(
        f"{dict(killed)} killed in {time.monotonic() - began:.0f} s; {found.attempt} attempts, "
        f"{found.last_number - sum(kinds.values())} points measured again; {dict(kinds)}."
    )
    assert kinds == {"train": 2000, "validation": 40}
    assert found.attempt >= KILLS // 2
    same(run, curve, files)


@pytest.mark.faults
@pytest.mark.parametrize("number", range(10))
def test_kills_at_random(
    db: Session, model: Path, plant: Plant, request: pytest.FixtureRequest, number: int
) -> None:
    """Whatever is running, at any moment; the seed is printed."""
    chance = seed(request)
    method = chance.choice(["prompt_tuning", "lora", "qlora", "full"])
    run, curve, files = whole(db, model, plant, "quick tuner", method=method)
    for _ in range(6):
        goal = step(run.id) + 1
        until(lambda: step(run.id) >= goal or small.now(run.id).state == "succeeded")  # noqa: B023
        time.sleep(chance.random() / 2)
        harm = chance.choice(["trainer", "trainer", "worker", "stop", "broker"])
        if harm == "trainer":
            plant.kill_trainer("quick tuner", run.id)
        elif harm == "broker":
            from app import valkey
            from tests.faults.test_broker import kill

            kill(plant)
            valkey.start(60)
        else:
            (plant.kill if harm == "worker" else plant.end)("quick tuner")
            plant.start("quick tuner")
    reaches(run.id, "succeeded")
    same(run, curve, files)
