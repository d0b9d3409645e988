"""Claims: in the queue's order, never twice, renewed, and put back when a worker is lost."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from app import claims, database, order, runs
from app.errors import LostClaim
from app.settings import settings
from app.tables import Run
from tests import factories


def _lose(db: Session, run: Run) -> None:
    """The lease of the run ends."""
    moment, _ = claims.now(db)
    db.execute(update(Run).where(Run.id == run.id).values(lease_until=moment - 1))
    db.commit()


def test_the_first_of_the_queue_is_claimed(any_db: Session) -> None:
    of = factories.experiment(any_db)
    ids = [factories.run(any_db, of, position=place).id for place in (3.0, 1.0, 2.0)]
    factories.run(any_db, of, position=0.0, state="paused")
    taken = [claims.claim_next(any_db, "w1") for _ in range(4)]
    assert [run and run.id for run in taken] == [ids[1], ids[2], ids[0], None]


def test_a_claimed_run_is_held(any_db: Session) -> None:
    factories.run(any_db)
    before, clock = claims.now(any_db)
    run = claims.claim_next(any_db, "w1")
    assert run
    found = runs.get(any_db, run.id)
    assert (found.state, found.worker, found.attempt, found.clock, found.phase) == (
        "running",
        "w1",
        1,
        clock,
        "loading",
    )
    assert found.lease_until
    assert 0 <= found.lease_until - before - settings.lease_seconds < 5
    assert found.started_at
    assert [event.message for event in runs.history(any_db, run.id)] == ["Taken up."]


def test_a_second_claim_is_a_new_attempt_that_began_at_the_first(any_db: Session) -> None:
    run = factories.run(any_db, attempt=1, step=40, started_at=12.5)
    assert claims.claim_next(any_db, "w2")
    found = runs.get(any_db, run.id)
    assert (found.attempt, found.started_at, found.step) == (2, 12.5, 40)
    assert runs.history(any_db, run.id)[-1].message == "Taken up again at step 40."


def test_racing_workers_never_hold_one_run_twice(any_db: Session) -> None:
    """Eight threads claim, each with its own connection, until nothing is left."""
    of = factories.experiment(any_db)
    of_id, num_runs, num_workers = of.id, 60, 8
    params = factories.run(any_db, of, state="cancelled").params
    any_db.add_all(
        Run(experiment_id=of_id, method="lora", params=params, position=float(n))
        for n in range(num_runs)
    )
    any_db.commit()
    start = threading.Barrier(num_workers, timeout=60)

    def work(number: int) -> list[str]:
        mine: list[str] = []
        start.wait()
        while True:
            with database.session() as db:
                run = claims.claim_next(db, f"w{number}")
            if run is None:
                # What others are just taking is passed over, and may not be taken after all.
                with database.reading() as db:
                    if not order.count_waiting(db):
                        return mine
                continue
            mine.append(run.id)

    with ThreadPoolExecutor(num_workers) as pool:
        taken = list(pool.map(work, range(num_workers)))
    claimed = [run_id for mine in taken for run_id in mine]
    assert len(claimed) == num_runs
    assert len(set(claimed)) == num_runs
    for number, mine in enumerate(taken):
        for run_id in mine:
            found = runs.get(any_db, run_id)
            assert (found.worker, found.attempt) == (f"w{number}", 1)
            assert len(runs.history(any_db, run_id)) == 1


def test_hundreds_of_races_for_one_run(any_db: Session) -> None:
    """Two workers claim the same single run at the same moment, again and again."""
    run = factories.run(any_db)
    rounds, wins = 150, {"w0": 0, "w1": 0}
    start = threading.Barrier(2, timeout=60)

    def work(name: str) -> None:
        for number in range(rounds):
            start.wait()
            with database.session() as db:
                taken = claims.claim_next(db, name)
            start.wait()
            if taken:
                wins[name] += 1
                assert taken.attempt == number + 1
                with database.session() as db:
                    runs.settle(db, taken.id, taken.attempt, "Again.")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, wins))
    assert sum(wins.values()) == rounds
    assert runs.get(any_db, run.id).attempt == rounds


def test_a_beat_renews_the_lease_of_this_attempt_alone(any_db: Session) -> None:
    of = factories.experiment(any_db)
    mine, other, later = (
        factories.run(any_db, of, state="running", attempt=attempt) for attempt in (1, 1, 2)
    )
    for run in (mine, other, later):
        _lose(any_db, run)
    claims.beat(any_db, mine.id, 1)
    claims.beat(any_db, later.id, 1)  # of an attempt that lost the run to the next
    assert claims.sweep(any_db) == 2
    assert runs.get(any_db, mine.id).state == "running"
    assert runs.get(any_db, other.id).state == runs.get(any_db, later.id).state == "queued"


def test_a_sweep_leaves_living_leases_alone(any_db: Session) -> None:
    run = factories.run(any_db, state="running")
    assert claims.sweep(any_db) == 0
    assert runs.get(any_db, run.id).state == "running"


@pytest.mark.parametrize(
    ("state", "after"), [("running", "queued"), ("cancelling", "cancelled"), ("pausing", "paused")]
)
def test_what_a_lost_worker_held_goes_where_it_was_meant_to(
    any_db: Session, state: str, after: str
) -> None:
    run = factories.run(any_db, state=state, step=9)
    _lose(any_db, run)
    assert claims.sweep(any_db) == 1
    found = runs.get(any_db, run.id)
    assert (found.state, found.worker, found.step) == (after, None, 9)
    with pytest.raises(LostClaim):
        runs.progress(any_db, run.id, 1, phase="training")


def test_leases_of_another_boot_have_ended(db: Session) -> None:
    """The monotonic clock begins anew at each boot: its numbers then mean nothing."""
    run = factories.run(db, state="running", clock="an earlier boot", lease_until=1e12)
    assert claims.sweep(db) == 1
    assert runs.get(db, run.id).state == "queued"


def test_leases_do_not_end_while_the_wall_clock_jumps(
    db: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = factories.run(db, state="running")
    monkeypatch.setattr(time, "time", lambda: 9e9)
    assert claims.sweep(db) == 0
    assert runs.get(db, run.id).state == "running"


@pytest.mark.postgres
def test_leases_count_by_the_servers_clock(postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines whose own clocks differ share one PostgreSQL."""
    monkeypatch.setattr(time, "monotonic", lambda: 5.0)
    with database.session() as db:
        run = factories.run(db, state="running")
        monkeypatch.setattr(time, "monotonic", lambda: 9e9)
        assert claims.sweep(db) == 0
        assert runs.get(db, run.id).clock == "server"


def test_a_run_that_is_lost_again_and_again_fails(db: Session) -> None:
    run = factories.run(db)
    for attempt in (1, 2, 3):
        assert claims.claim_next(db, "w1")
        runs.progress(db, run.id, attempt, step=attempt * 5)  # measured, but not saved
        claims.put_back(db, run.id, attempt, "The tuning process was ended by signal SIGKILL.")
    found = runs.get(db, run.id)
    assert found.state == "failed"
    assert found.error
    assert found.error.startswith("The tuning process was ended by signal SIGKILL.")
    assert "3 times" in found.error
    assert claims.claim_next(db, "w1") is None


def test_a_run_that_saves_something_each_time_goes_on(db: Session) -> None:
    run = factories.run(db)
    for attempt in range(1, 8):
        assert claims.claim_next(db, "w1")
        runs.progress(db, run.id, attempt, stuck=0)  # as after each checkpoint
        claims.put_back(db, run.id, attempt, "Lost.")
    assert runs.get(db, run.id).state == "queued"


def test_resuming_a_paused_run_gives_it_all_its_attempts_again(db: Session) -> None:
    run = factories.run(db, state="paused", stuck=2)
    runs.resume(db, run.id)
    assert claims.claim_next(db, "w1")
    claims.put_back(db, run.id, 1, "Lost.")
    assert runs.get(db, run.id).state == "queued"


@pytest.mark.parametrize(("state", "after"), [("cancelling", "cancelled"), ("pausing", "paused")])
def test_the_limit_does_not_fail_what_was_to_stop_anyway(
    db: Session, state: str, after: str
) -> None:
    run = factories.run(db, state=state, stuck=claims.MOST_STUCK)
    claims.put_back(db, run.id, 1, "Lost.")
    assert runs.get(db, run.id).state == after


def test_putting_back_what_another_attempt_holds_is_refused(db: Session) -> None:
    run = factories.run(db, state="running", attempt=2, stuck=claims.MOST_STUCK)
    with pytest.raises(LostClaim):
        claims.put_back(db, run.id, 1, "Lost.")
    db.rollback()
    found = runs.get(db, run.id)
    assert (found.state, found.attempt) == ("running", 2)


def test_workers_that_sweep_at_once_put_each_run_back_once(any_db: Session) -> None:
    of = factories.experiment(any_db)
    lost = [factories.run(any_db, of, state="running") for _ in range(20)]
    for run in lost:
        _lose(any_db, run)
    start = threading.Barrier(4, timeout=60)

    def sweep(_: int) -> int:
        start.wait()
        with database.session() as db:
            return claims.sweep(db)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(sweep, range(4)))  # none of them may raise
    for run in lost:
        found = runs.get(any_db, run.id)
        assert (found.state, found.stuck) == ("queued", 1)
        assert len(runs.history(any_db, run.id)) == 1
