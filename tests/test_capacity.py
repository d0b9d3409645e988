"""What fits into a worker, and that a large run is not overtaken for ever."""

import random

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from app import capacity, claims, runs
from app.capacity import Room, Taken
from app.tables import Run
from tests import factories


def _run(db: Session, memory_mb: float | None, seconds: float = 60.0, **params: object) -> Run:
    of = db.scalar(select(Run).limit(1))
    found = {} if memory_mb is None else {"memory_mb": memory_mb, "seconds": seconds}
    found |= {"gpu_memory_mb": 2 * memory_mb} if memory_mb else {}
    made = factories.run(db, of.experiment if of else None, forecast=found)
    made.params = made.params | params
    db.commit()
    return made


def _claims(db: Session, place: Room) -> str | None:
    run = claims.claim_next(db, "w1", place)
    return run.id if run else None


def test_what_is_too_large_is_passed_over(any_db: Session) -> None:
    large, small = _run(any_db, 900.0), _run(any_db, 300.0)
    assert _claims(any_db, Room(500.0)) == small.id
    assert _claims(any_db, Room(500.0)) is None
    assert _claims(any_db, Room(900.0)) == large.id


def test_on_a_gpu_another_figure_counts(any_db: Session) -> None:
    run = _run(any_db, 300.0)
    assert _claims(any_db, Room(500.0, gpu=True)) is None
    assert _claims(any_db, Room(600.0, gpu=True)) == run.id


def test_several_stay_below_a_share_of_the_memory(any_db: Session) -> None:
    run = _run(any_db, 500.0)
    assert _claims(any_db, Room(1000.0, taken=(Taken(410.0, 9.0),))) is None
    assert _claims(any_db, Room(1000.0, taken=(Taken(400.0, 9.0),))) == run.id


@pytest.mark.parametrize("taken", [Taken(None, 9.0), Taken(100.0, 9.0, devices=2)])
def test_runs_of_unknown_need_or_on_several_devices_are_alone(
    any_db: Session, taken: Taken
) -> None:
    _run(any_db, 100.0)
    assert _claims(any_db, Room(1000.0, devices=2, taken=(taken,))) is None


def test_a_run_without_a_forecast_goes_to_a_worker_that_is_empty(any_db: Session) -> None:
    run = _run(any_db, None)
    assert _claims(any_db, Room(1000.0, taken=(Taken(10.0, 9.0),))) is None
    assert _claims(any_db, Room(1000.0)) == run.id


def test_a_run_wants_as_many_devices_as_its_parameters_say(any_db: Session) -> None:
    run = _run(any_db, 100.0, devices=4)
    assert _claims(any_db, Room(1000.0, devices=2)) is None
    assert _claims(any_db, Room(1000.0, devices=4, taken=(Taken(10.0, 9.0),))) is None
    assert _claims(any_db, Room(1000.0, devices=4)) == run.id


def test_an_optimizer_of_8_bits_wants_a_gpu(any_db: Session) -> None:
    run = _run(any_db, 100.0, optimizer="adamw_8bit")
    assert _claims(any_db, Room(1000.0)) is None
    assert _claims(any_db, Room(1000.0, gpu=True)) == run.id


def test_the_database_and_the_arithmetic_say_the_same(any_db: Session) -> None:
    draw = random.Random(3)
    made = [
        _run(
            any_db,
            draw.choice([None, 100.0, 400.0, 899.0, 900.0, 1000.0, 1200.0]),
            devices=count,
            optimizer=optimizer,
        )
        for count in (1, 1, 1, 2, 3)
        for optimizer in ("adamw", "adamw", "adamw", "adamw_8bit")
    ]
    for taken in ((), (Taken(100.0, 5.0),), (Taken(500.0, 5.0), Taken(300.0, 1.0))):
        for gpu in (False, True):
            place = Room(1000.0, gpu, 2, taken)
            fits = set(any_db.scalars(select(Run.id).where(capacity.fits(place))))
            assert fits == {
                run.id
                for run in made
                if place.holds(
                    Taken(
                        capacity.need(run.forecast, gpu),
                        0,
                        capacity.devices(run.params),
                        capacity.needs_gpu(run.params),
                    )
                )
            }


def test_the_wait_is_until_enough_have_ended() -> None:
    place = Room(1000.0, taken=(Taken(300.0, 30.0), Taken(300.0, 10.0), Taken(200.0, 20.0)))
    assert place.wait(Taken(100.0, 0)) == 0
    assert place.wait(Taken(400.0, 0)) == 10.0
    assert place.wait(Taken(600.0, 0)) == 20.0
    assert place.wait(Taken(1000.0, 0)) == 30.0


def test_a_small_run_overtakes_only_if_it_ends_before_the_large_one_can_begin(
    any_db: Session,
) -> None:
    large = _run(any_db, 800.0)
    slow, quick = _run(any_db, 100.0, seconds=500.0), _run(any_db, 100.0, seconds=50.0)
    busy = Room(1000.0, taken=(Taken(300.0, 60.0),))
    assert _claims(any_db, busy) == quick.id
    assert _claims(any_db, busy) is None  # though the slow one would fit
    late = Room(1000.0, taken=(Taken(300.0, 0.0),))  # longer at work than its forecast
    another = _run(any_db, 100.0, seconds=1.0)
    assert _claims(any_db, late) is None
    assert _claims(any_db, Room(1000.0)) == large.id
    beside = Room(1000.0, taken=(Taken(800.0, 60.0),))
    assert _claims(any_db, beside) == slow.id  # nothing large is before it any more
    assert _claims(any_db, beside) == another.id


def test_what_no_worker_of_its_kind_can_ever_hold_keeps_nobody_waiting(any_db: Session) -> None:
    _run(any_db, 5000.0)
    small = _run(any_db, 100.0, seconds=500.0)
    assert _claims(any_db, Room(1000.0, taken=(Taken(300.0, 60.0),))) == small.id


@pytest.mark.parametrize("error", [0.2, 1.0, 5.0])
def test_a_large_run_begins_however_many_small_ones_come(db: Session, error: float) -> None:
    """A worker in thought time; forecasts are wrong by this factor, and small runs never end coming."""
    draw = random.Random(int(error * 10))
    now, work = 0.0, []  # (ends, id, Taken, forecast end)
    for _ in range(4):
        _run(db, 250.0, seconds=draw.uniform(20, 60))
    large = _run(db, 950.0, seconds=100.0)
    while runs.get(db, large.id).state == "queued":
        assert now < 600 * max(1.0, error)
        _run(db, 250.0, seconds=draw.uniform(20, 60))
        for ended in [one for one in work if one[0] <= now]:
            runs.finish(db, ended[1], 1)
            work.remove(ended)
        taken = tuple(one[2]._replace(seconds=max(0.0, one[3] - now)) for one in work)
        if run := claims.claim_next(db, "w1", Room(1000.0, taken=taken)):
            seconds = run.forecast["seconds"]
            takes = Taken(run.forecast["memory_mb"], seconds)
            work.append((now + seconds * error, run.id, takes, now + seconds))
        now += 5.0
