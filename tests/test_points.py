"""Points: numbered without gaps, fenced, taken back by a resume, and read from any number on."""

import math

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app import points, runs
from app.errors import LostClaim
from app.tables import Point, Run
from tests import factories
from tests.factories import measured


def _numbers(db: Session, run: Run) -> list[tuple[int, int]]:
    """(number, step) of each point, by number."""
    found = db.execute(
        select(Point.number, Point.step).where(Point.run_id == run.id).order_by(Point.number)
    )
    return [(number, step) for number, step in found]


def test_numbers_run_from_one_without_gaps(any_db: Session) -> None:
    of = factories.experiment(any_db)
    run, other = (factories.run(any_db, of, state="running") for _ in range(2))
    points.record(any_db, run.id, 1, [measured(0, "validation"), measured(1), measured(2)])
    points.record(any_db, other.id, 1, [measured(1)])
    points.record(any_db, run.id, 1, [measured(3), measured(3, "validation", loss=0.5)])
    assert _numbers(any_db, run) == [(1, 0), (2, 1), (3, 2), (4, 3), (5, 3)]
    assert _numbers(any_db, other) == [(1, 1)]
    after = runs.get(any_db, run.id)
    assert (after.step, after.last_number, after.train_seconds) == (3, 5, 3.0)


def test_one_point_for_each_kind_and_step(any_db: Session) -> None:
    run = factories.run(any_db, state="running")
    points.record(any_db, run.id, 1, [measured(1), measured(1, "validation")])
    with pytest.raises(IntegrityError):
        points.record(any_db, run.id, 1, [measured(2), measured(1)])
    any_db.rollback()
    assert _numbers(any_db, run) == [(1, 1), (2, 1)]
    after = runs.get(any_db, run.id)
    assert (after.step, after.last_number) == (1, 2)


def test_what_is_not_finite_is_stored_as_null(any_db: Session) -> None:
    run = factories.run(any_db, state="running")
    given = [
        measured(1, loss=math.nan, grad_norm=math.inf),
        measured(2, loss=-math.inf, memory_mb=None),
        measured(3),
    ]
    points.record(any_db, run.id, 1, given)
    found = points.curve(any_db, run.id)
    assert [(point.loss, point.grad_norm, point.memory_mb) for point in found] == [
        (None, None, 300.0),
        (None, 1.0, None),
        (0.5, 1.0, 300.0),
    ]


@pytest.mark.parametrize("state", ["queued", "succeeded", "cancelled"])
def test_nothing_is_stored_of_a_run_that_nobody_holds(db: Session, state: str) -> None:
    run = factories.run(db, state=state, attempt=1)
    with pytest.raises(LostClaim):
        points.record(db, run.id, 1, [measured(1)])
    assert _numbers(db, run) == []
    assert runs.get(db, run.id).step == 0


def test_nothing_is_stored_by_an_earlier_attempt(any_db: Session) -> None:
    run = factories.run(any_db, state="running")
    points.record(any_db, run.id, 1, [measured(1)])
    any_db.execute(update(Run).where(Run.id == run.id).values(attempt=2))
    any_db.commit()
    with pytest.raises(LostClaim):
        points.record(any_db, run.id, 1, [measured(2)])
    with pytest.raises(LostClaim):
        points.rewind(any_db, run.id, 1, 0)
    assert _numbers(any_db, run) == [(1, 1)]
    after = runs.get(any_db, run.id)
    assert (after.step, after.last_number, after.rewinds) == (1, 1, [])


def test_a_rewind_takes_back_later_points_and_numbers_go_on(any_db: Session) -> None:
    run = factories.run(any_db, state="running")
    points.record(any_db, run.id, 1, [measured(step) for step in range(1, 6)])
    points.record(any_db, run.id, 1, [measured(4, "validation")])
    points.rewind(any_db, run.id, 1, 3)
    assert _numbers(any_db, run) == [(1, 1), (2, 2), (3, 3)]
    after = runs.get(any_db, run.id)
    assert (after.step, after.last_number, after.rewinds) == (3, 6, [[6, 3]])
    points.record(any_db, run.id, 1, [measured(4), measured(5)])
    assert _numbers(any_db, run) == [(1, 1), (2, 2), (3, 3), (7, 4), (8, 5)]
    points.rewind(any_db, run.id, 1, 0)
    after = runs.get(any_db, run.id)
    assert (after.step, after.rewinds) == (0, [[6, 3], [8, 0]])
    assert _numbers(any_db, run) == []


def test_a_rewind_that_takes_nothing_back_is_not_told_to_readers(db: Session) -> None:
    run = factories.run(db, state="running")
    points.rewind(db, run.id, 1, 0)
    points.record(db, run.id, 1, [measured(1), measured(2)])
    points.rewind(db, run.id, 1, 2)
    assert runs.get(db, run.id).rewinds == []


@pytest.mark.parametrize(
    ("seen", "step"),
    [
        (0, None),  # saw nothing yet
        (2, 3),  # saw less than what was taken back: going to step 3 changes nothing
        (6, 3),  # saw all that the first rewind took back, and by now the second goes further
        (7, 3),
        (9, 3),
        (10, None),  # saw only what came after both
    ],
)
def test_readers_learn_how_far_to_go_back(seen: int, step: int | None) -> None:
    run = Run(rewinds=[[6, 5], [9, 3]])
    assert points.rewound_to(run, seen) == step


def test_a_reader_of_the_later_part_only_goes_back_as_far_as_it_must() -> None:
    run = Run(rewinds=[[6, 1], [9, 3]])
    assert points.rewound_to(run, 6) == 1
    assert points.rewound_to(run, 7) == 3


def test_a_reader_goes_on_from_what_it_has_seen(any_db: Session) -> None:
    of = factories.experiment(any_db)
    one, two = (factories.run(any_db, of, state="running") for _ in range(2))
    for run in (one, two):
        points.record(any_db, run.id, 1, [measured(step) for step in range(1, 5)])
    seen = {one.id: 2, two.id: 4}
    found = points.since(any_db, seen)
    assert [(point.run_id, point.number) for point in found] == [(one.id, 3), (one.id, 4)]
    points.record(any_db, two.id, 1, [measured(5)])
    found = points.since(any_db, {one.id: 4, two.id: 4})
    assert [(point.run_id, point.number) for point in found] == [(two.id, 5)]
    assert points.since(any_db, {}) == []


def test_a_reader_takes_long_curves_in_pieces_and_misses_nothing(db: Session) -> None:
    of = factories.experiment(db)
    one, two = (factories.run(db, of, state="running") for _ in range(2))
    for run in (one, two):
        points.record(db, run.id, 1, [measured(step) for step in range(1, 8)])
    seen = {one.id: 0, two.id: 0}
    read: list[tuple[str, int]] = []
    while piece := points.since(db, seen, limit=3):
        assert len(piece) <= 3
        for point in piece:
            seen[point.run_id] = point.number
            read.append((point.run_id, point.number))
    assert sorted(read) == sorted((run.id, n) for run in (one, two) for n in range(1, 8))


def test_a_reader_across_a_rewind_ends_with_the_whole_curve(db: Session) -> None:
    run = factories.run(db, state="running")
    points.record(db, run.id, 1, [measured(step, loss=9.0) for step in range(1, 7)])
    kept = {point.step: point.loss for point in points.since(db, {run.id: 0})}
    points.rewind(db, run.id, 1, 4)
    points.record(db, run.id, 1, [measured(step, loss=1.0) for step in range(5, 9)])
    back = points.rewound_to(runs.get(db, run.id), 6)
    assert back == 4
    kept = {step: loss for step, loss in kept.items() if step <= back}
    kept |= {point.step: point.loss for point in points.since(db, {run.id: 6})}
    assert kept == {point.step: point.loss for point in points.curve(db, run.id)}
    assert kept == {1: 9.0, 2: 9.0, 3: 9.0, 4: 9.0, 5: 1.0, 6: 1.0, 7: 1.0, 8: 1.0}


def test_a_curve_is_in_the_order_of_its_steps(db: Session) -> None:
    run = factories.run(db, state="running")
    points.record(db, run.id, 1, [measured(1), measured(10), measured(10, "validation")])
    points.record(db, run.id, 1, [measured(2)])
    found = [(point.step, point.kind) for point in points.curve(db, run.id)]
    assert found == [(1, "train"), (2, "train"), (10, "train"), (10, "validation")]


def test_a_sample_has_every_validation_and_evenly_spread_steps(any_db: Session) -> None:
    run = factories.run(any_db, state="running")
    looks = [measured(step, "validation") for step in (0, 7, 100)]
    points.record(any_db, run.id, 1, [*looks, *(measured(step) for step in range(1, 101))])
    found = points.sampled(any_db, run.id, 10)
    assert [one.step for one in found if one.kind == "validation"] == [0, 7, 100]
    assert [one.step for one in found if one.kind == "train"] == [*range(10, 101, 10)]
    every = points.sampled(any_db, run.id, 1000)
    assert len(every) == 103
    assert points.sampled(any_db, "nothing", 10) == []
