"""Claims by several processes at once: no run is ever taken twice, none is left."""

import json
from typing import Any

import pytest
from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from app.tables import Event, Run
from tests import factories
from tests.servers import at_once

RACER = """
import json
from sqlalchemy.exc import OperationalError
from app import capacity, claims, database, order, runs
with database.session() as db:
    claims.now(db)
GO
mine, turn = [], 0
while True:
    turn += 1
    # Half of the looks are those of a worker on which another run is at work.
    taken = (capacity.Taken(100.0, 60.0),) if turn % 2 else ()
    try:
        with database.session() as db:
            run = claims.claim_next(db, name, capacity.Room(1000.0, taken=taken))
            left = run or order.count_waiting(db)
    except OperationalError:
        continue  # SQLite was kept busy by the others for too long: a keeper looks again, too
    if run:
        mine.append([run.id, run.attempt])
    elif not left:
        break
print(json.dumps(mine))
"""


def _race(db: Session, num_runs: int, num_processes: int, seconds: float = 120.0) -> None:
    of = factories.experiment(db)
    queued = [
        {
            "id": f"r{number:06}",
            "experiment_id": of.id,
            "method": "lora",
            "params": {},
            "forecast": {"memory_mb": 200, "seconds": 30},
            "position": float(number // 3),
        }
        for number in range(num_runs)
    ]
    db.execute(insert(Run), queued)
    db.commit()
    taken: list[list[list[Any]]] = [
        json.loads(said) for said in at_once(RACER, num_processes, seconds)
    ]
    claimed = [run_id for mine in taken for run_id, _ in mine]
    assert sorted(claimed) == [run["id"] for run in queued]  # each, and each once
    assert {attempt for mine in taken for _, attempt in mine} == {1}
    db.expire_all()
    holders = {run_id: worker for run_id, worker in db.execute(select(Run.id, Run.worker))}  # noqa: C416
    for number, mine in enumerate(taken):
        assert {holders[run_id] for run_id, _ in mine} <= {f"p{number}"}
    assert db.scalar(select(func.count(Event.id))) == num_runs


def test_processes_that_race_for_runs_never_take_one_twice(any_db: Session) -> None:
    _race(any_db, 150, 3)


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_ten_thousand_raced_claims_without_a_double(any_db: Session) -> None:
    _race(any_db, 10_000, 8, 3500.0)
