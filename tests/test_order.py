"""The order of the queue: every move puts a run where it says, ties and crowds included."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app import claims, database, order, runs
from app.errors import Conflict, NotFound
from app.tables import Run
from tests import factories


def _queue(db: Session, positions: list[float], **changes: object) -> list[str]:
    of = factories.experiment(db)
    return [
        factories.run(db, of, id=f"r{number:02}", position=position, **changes).id
        for number, position in enumerate(positions)
    ]


def _order(db: Session, state: str = "queued") -> list[str]:
    found = select(Run.id).where(Run.state == state).order_by(Run.position, Run.id)
    return list(db.scalars(found))


def test_runs_are_moved_one_place_or_to_the_head(any_db: Session) -> None:
    a, b, c, d = _queue(any_db, [1.0, 2.0, 3.0, 4.0])
    order.move(any_db, d, "next")
    assert _order(any_db) == [d, a, b, c]
    order.move(any_db, b, "up")
    assert _order(any_db) == [d, b, a, c]
    order.move(any_db, d, "down")
    assert _order(any_db) == [b, d, a, c]
    order.move(any_db, a, "down")
    assert _order(any_db) == [b, d, c, a]


def test_at_the_ends_nothing_is_changed(any_db: Session) -> None:
    a, b = _queue(any_db, [1.0, 2.0])
    for run, where in ((a, "up"), (a, "next"), (b, "down")):
        order.move(any_db, run, where)  # type: ignore[arg-type]
        assert _order(any_db) == [a, b]
        assert {runs.get(any_db, one).position for one in (a, b)} == {1.0, 2.0}


def test_runs_at_the_same_place_can_be_moved(any_db: Session) -> None:
    ids = _queue(any_db, [5.0] * 5)
    order.move(any_db, ids[3], "up")
    assert _order(any_db) == [ids[0], ids[1], ids[3], ids[2], ids[4]]
    order.move(any_db, ids[0], "down")
    assert _order(any_db) == [ids[1], ids[0], ids[3], ids[2], ids[4]]
    order.move(any_db, ids[4], "next")
    assert _order(any_db) == [ids[4], ids[1], ids[0], ids[3], ids[2]]


def test_there_is_always_room_between_two(any_db: Session) -> None:
    """Halving a gap again and again leaves no number in it: then they are numbered anew."""
    a, b, c, d = _queue(any_db, [1.0, 2.0, 3.0, 4.0])
    for _ in range(40):
        order.move(any_db, c, "up")
        order.move(any_db, d, "up")
        assert _order(any_db) == [a, c, d, b]
        order.move(any_db, c, "down")
        order.move(any_db, c, "down")
        order.move(any_db, d, "down")
        assert _order(any_db) == [a, b, d, c]
        c, d = d, c


def test_numbering_anew_keeps_the_place_of_what_is_paused_or_at_work(any_db: Session) -> None:
    a, b, c = _queue(any_db, [5.0, 5.0, 5.0])
    of = runs.get(any_db, a).experiment
    paused = factories.run(any_db, of, state="paused", position=4.0).id
    running = factories.run(any_db, of, state="running", position=3.0).id
    ended = factories.run(any_db, of, state="succeeded", position=1.0).id
    order.move(any_db, c, "up")
    any_db.execute(update(Run).where(Run.id.in_([paused, running])).values(state="queued"))
    assert _order(any_db) == [running, paused, a, c, b]
    assert runs.get(any_db, ended).position == 1.0
    assert runs.get(any_db, b).position <= 5.0  # what is yet to come is still behind it


@pytest.mark.parametrize("state", [state for state in runs.STATES if state != "queued"])
def test_only_what_is_queued_has_a_place(db: Session, state: str) -> None:
    run = factories.run(db, state=state)
    with pytest.raises(Conflict, match=f"This run is {state} and has no place in the queue"):
        order.move(db, run.id, "next")


def test_a_run_that_is_none_cannot_be_moved(db: Session) -> None:
    with pytest.raises(NotFound):
        order.move(db, "nothing", "up")


def test_random_moves_do_what_they_do_to_a_list(any_db: Session) -> None:
    draw = random.Random(7)
    ids = _queue(any_db, [float(draw.randrange(3)) for _ in range(8)])
    known = _order(any_db)
    for _ in range(80):
        run, where = draw.choice(ids), draw.choice(["next", "up", "down"])
        place = known.index(run)
        known.pop(place)
        to = {"next": 0, "up": max(0, place - 1), "down": min(len(known), place + 1)}[where]
        known.insert(to, run)
        order.move(any_db, run, where)  # type: ignore[arg-type]
        assert _order(any_db) == known


def test_moves_at_the_same_moment_lose_no_run(any_db: Session) -> None:
    """Six people move, and a worker claims meanwhile."""
    ids = _queue(any_db, [1.0] * 24)
    start = threading.Barrier(7, timeout=60)

    def push(number: int) -> None:
        draw = random.Random(number)
        start.wait()
        for _ in range(12):
            with database.session() as db:
                try:
                    order.move(db, draw.choice(ids), draw.choice(["next", "up", "down"]))  # type: ignore[arg-type]
                except Conflict:
                    db.rollback()  # a worker had taken it

    def claim() -> list[str]:
        start.wait()
        mine: list[str] = []
        while len(mine) < 10:  # while all are being numbered anew there is none to have
            with database.session() as db:
                if run := claims.claim_next(db, "w1"):
                    mine.append(run.id)
        return mine

    with ThreadPoolExecutor(7) as pool:
        claimed = pool.submit(claim)
        list(pool.map(push, range(6)))
        taken = claimed.result()
    assert len(set(taken)) == len(taken) == 10
    assert sorted([*taken, *_order(any_db)]) == ids
    assert sorted(_order(any_db, "running")) == sorted(taken)


def test_nothing_is_claimed_while_the_queue_is_held(any_db: Session) -> None:
    of = factories.experiment(any_db)
    running = factories.run(any_db, of, state="running")
    waiting = factories.run(any_db, of)
    assert order.held_since(any_db) is None
    order.hold(any_db)
    since = order.held_since(any_db)
    order.hold(any_db)
    assert since
    assert order.held_since(any_db) == since
    assert claims.claim_next(any_db, "w1") is None
    claims.beat(any_db, running.id, 1)
    runs.finish(any_db, running.id, 1)  # what runs goes on
    order.release(any_db)
    order.release(any_db)
    taken = claims.claim_next(any_db, "w1")
    assert taken
    assert taken.id == waiting.id


def test_many_that_hold_and_release_at_once(any_db: Session) -> None:
    start = threading.Barrier(6, timeout=60)

    def press(number: int) -> None:
        start.wait()
        for _ in range(10):
            with database.session() as db:
                (order.hold if number % 2 else order.release)(db)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(press, range(6)))
    order.release(any_db)
    assert order.held_since(any_db) is None
