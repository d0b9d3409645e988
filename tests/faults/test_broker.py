"""The broker dies, forgets, hangs: no run is lost, none runs twice, and the web answers."""

import os
import signal
import time
from pathlib import Path

import pytest
import redis
from sqlalchemy.orm import Session

from app import experiments, points, queue, runs, valkey
from app.tables import Run
from tests import factories
from tests.faults import small
from tests.faults.plant import Plant, reaches, seed, until
from tests.faults.test_kills import same, step, whole
from tests.servers import fresh_queue


def kill(plant: Plant) -> None:
    for pid in plant.broker():
        os.kill(pid, signal.SIGKILL)
    if valkey._process:
        valkey._process.wait()


@pytest.mark.parametrize(
    "away",
    [0, pytest.param(3, marks=pytest.mark.faults), pytest.param(30, marks=pytest.mark.faults)],
)
def test_the_broker_is_killed_and_comes_back(
    db: Session, model: Path, plant: Plant, away: int
) -> None:
    """The run at work goes on, one that is made meanwhile is found, and bells are heard again."""
    run, curve, files = whole(db, model, plant, "quick tuner")
    until(lambda: step(run.id) >= 1)
    kill(plant)
    other = factories.run(db, run.experiment, params=run.params)
    assert not queue.ring("tuner")
    time.sleep(away)
    valkey.start(60)
    reaches(run.id, "succeeded")
    reaches(other.id, "succeeded")
    assert small.now(run.id).attempt == small.now(other.id).attempt == 1
    same(run, curve, files)
    until(lambda: queue.ring("tuner"))
    client = redis.Redis.from_url(queue.redis_url())
    until(lambda: client.llen("tune") == 0, "the consumer hears again")


def test_the_broker_forgets_everything(db: Session, plant: Plant) -> None:
    """FLUSHALL between the ring and the worker that would have heard it."""
    made = [factories.run(db, params={"pretend": "finish"}) for _ in range(3)]
    assert queue.ring("tuner")
    client = redis.Redis.from_url(queue.redis_url())
    client.flushall()
    plant.start("light tuner")
    for run in made:
        reaches(run.id, "succeeded")
    client.flushall()
    late = factories.run(db, params={"pretend": "finish"})
    reaches(late.id, "succeeded")


def test_a_doubled_ring_starts_nothing_twice(db: Session, plant: Plant) -> None:
    of = factories.experiment(db)
    plant.start("light tuner")
    plant.start("light tuner", as_name="second")
    made = []
    for _ in range(5):
        made.append(factories.run(db, of, params={"pretend": "finish"}))
        for _ in range(5):
            queue.ring("tuner")
    for run in made:
        reaches(run.id, "succeeded")
        assert small.now(run.id).attempt == 1


def test_the_broker_hangs(db: Session, plant: Plant) -> None:
    """The web answers, takes new work, says what is away; workers find the work by themselves."""
    base, data = factories.base_model(db), factories.dataset(db)
    plant.start("web")
    plant.start("light tuner")
    web = plant.web()
    first = experiments.create(
        db,
        name="before",
        base_model_id=base.id,
        dataset_id=data.id,
        task="generation",
        template="{{input}}",
        labels=[],
        seed=1,
        methods={"lora": {}},
    )
    runs.cancel(db, first.runs[0].id)
    (pid,) = plant.broker()
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        given = {"name": "x", "base_model_id": base.id, "dataset_id": data.id}
        answer = web.post("/api/experiments", json=given | {"methods": {"lora": {}}})
        assert answer.status_code == 201
        print(f"Answered in {time.monotonic() - began:.1f} s while the broker hung.")
        run = db.get(Run, answer.json()["runs"][0]["id"])
        assert run
        run.params = {"pretend": "finish"}
        db.commit()
        reaches(run.id, "succeeded")
        for page in ("/", f"/experiments/{first.id}"):
            text = web.get(page).text
            assert "The message broker (Redis) does not answer" in text
            assert "Nothing is lost" in text
        health = web.get("/healthz").json()
        assert (health["status"], health["broker"]) == ("degraded", "away")
    finally:
        os.kill(pid, signal.SIGCONT)
    until(lambda: "does not answer" not in web.get("/").text)


@pytest.mark.faults
def test_a_stream_looks_by_itself_while_the_broker_is_away(db: Session, plant: Plant) -> None:
    run = factories.run(db, state="running", num_steps=10)
    plant.start("web")
    web = plant.web()
    kill(plant)
    began = time.monotonic()
    with web.stream("GET", f"/experiments/{run.experiment_id}/events") as answer:
        points.record(db, run.id, 1, [factories.measured(1)])
        for line in answer.iter_lines():
            if line.startswith("event: points"):
                break
    print(f"The point came {time.monotonic() - began:.1f} s later without a bell.")
    valkey.start(60)


@pytest.mark.faults
def test_promise_1_two_hundred_kills_of_the_broker_lose_no_run(
    db: Session, plant: Plant, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = seed(request)
    of = factories.experiment(db)
    plant.start("light tuner")
    made = []
    for _ in range(200):
        made.append(factories.run(db, of, params={"pretend": "finish"}))
        fresh_queue(monkeypatch)
        queue.ring("tuner")
        time.sleep(chance.random() / 20)
        kill(plant)
        if chance.random() < 0.5:
            time.sleep(chance.random())
        valkey.start(60)
    for run in made:
        reaches(run.id, "succeeded", seconds=1800)
    again = [small.now(run.id).attempt for run in made]
    print(f"200 broker kills, {sum(one == 1 for one in again)} runs at their first attempt.")
    assert again == [1] * 200
