"""The life of a run: which moves there are, and who may make them."""

import time

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from app import order, runs
from app.errors import Conflict, LostClaim, NotFound
from app.tables import Run
from tests import factories

# As the design says: queued -> running -> succeeded | failed; queued | running -> cancelling ->
# cancelled; running -> pausing -> paused -> queued; running -> queued; running -> waiting ->
# queued. What nobody works on is cancelled and paused without a stage between.
ALLOWED = {
    ("queued", "running"),
    ("queued", "cancelled"),
    ("queued", "paused"),
    ("running", "succeeded"),
    ("running", "failed"),
    ("running", "cancelling"),
    ("running", "pausing"),
    ("running", "queued"),
    ("running", "waiting"),
    ("cancelling", "cancelled"),
    ("pausing", "paused"),
    ("pausing", "cancelling"),
    ("paused", "queued"),
    ("paused", "cancelled"),
    ("waiting", "queued"),
    ("waiting", "cancelled"),
}
FINAL = {"succeeded", "failed", "cancelled"}
HELD = {"running", "pausing", "cancelling"}


def _state(db: Session, run: Run) -> str:
    return runs.get(db, run.id).state


@pytest.mark.parametrize("source", runs.STATES)
def test_moves(db: Session, source: str) -> None:
    of = factories.experiment(db)
    for target in runs.STATES:
        run = factories.run(db, of, state=source)
        if (source, target) in ALLOWED:
            assert runs.move(db, run.id, frozenset({source}), target)
            assert _state(db, run) == target
        else:
            with pytest.raises(AssertionError, match="is no move"):
                runs.move(db, run.id, frozenset({source}), target)
            assert _state(db, run) == source


def test_a_run_that_is_elsewhere_is_not_moved(db: Session) -> None:
    run = factories.run(db, state="paused")
    assert not runs.move(db, run.id, frozenset({"queued"}), "running")
    assert _state(db, run) == "paused"


def test_final_states_never_change(any_db: Session) -> None:
    assert set(runs.FINAL) == FINAL
    for state in sorted(FINAL):
        run = factories.run(any_db, state=state, attempt=1)
        for refused in (runs.cancel, runs.pause, runs.resume):
            with pytest.raises(Conflict, match=f"is {state} and cannot"):
                refused(any_db, run.id)
        for fenced in (
            lambda run=run: runs.finish(any_db, run.id, 1),
            lambda run=run: runs.fail(any_db, run.id, 1, "Too late."),
            lambda run=run: runs.settle(any_db, run.id, 1, "Too late."),
            lambda run=run: runs.tell(any_db, run.id, 1, "Too late."),
            lambda run=run: runs.progress(any_db, run.id, 1, phase="training"),
            lambda run=run: runs.state(any_db, run.id, 1),
        ):
            with pytest.raises(LostClaim):
                fenced()
            any_db.rollback()
        after = runs.get(any_db, run.id)
        assert (after.state, after.error, after.phase) == (state, None, "")
        assert runs.history(any_db, run.id) == []


@pytest.mark.parametrize(
    ("state", "cancelled", "paused", "resumed"),
    [
        ("queued", "cancelled", "paused", None),
        ("running", "cancelling", "pausing", None),
        ("pausing", "cancelling", None, None),
        ("cancelling", None, None, None),
        ("paused", "cancelled", None, "queued"),
        ("waiting", "cancelled", None, "queued"),
        ("succeeded", None, None, None),
        ("failed", None, None, None),
        ("cancelled", None, None, None),
    ],
)
def test_cancel_pause_and_resume(
    db: Session, state: str, cancelled: str | None, paused: str | None, resumed: str | None
) -> None:
    for action, expected in (
        (runs.cancel, cancelled),
        (runs.pause, paused),
        (runs.resume, resumed),
    ):
        run = factories.run(db, state=state)
        if expected is None:
            with pytest.raises(Conflict, match=r"Nothing was changed\."):
                action(db, run.id)
            assert _state(db, run) == state
            assert runs.history(db, run.id) == []
        else:
            action(db, run.id)
            assert _state(db, run) == expected
            assert len(runs.history(db, run.id)) == 1


def test_what_does_not_exist_is_not_found(db: Session) -> None:
    for action in (runs.get, runs.cancel, runs.pause, runs.resume, runs.retry):
        with pytest.raises(NotFound):
            action(db, "nothing")


@pytest.mark.parametrize("state", sorted(HELD))
def test_a_write_of_an_earlier_attempt_is_refused(any_db: Session, state: str) -> None:
    run = factories.run(any_db, state=state, phase="scoring")
    any_db.execute(update(Run).where(Run.id == run.id).values(attempt=2, worker="w2"))
    any_db.commit()
    for write in (
        lambda: runs.update_held(any_db, run.id, 1, phase="old"),
        lambda: runs.progress(any_db, run.id, 1, phase="old"),
        lambda: runs.tell(any_db, run.id, 1, "old"),
        lambda: runs.finish(any_db, run.id, 1, figures={"old": 1}),
        lambda: runs.fail(any_db, run.id, 1, "old"),
        lambda: runs.settle(any_db, run.id, 1, "old"),
        lambda: runs.state(any_db, run.id, 1),
    ):
        with pytest.raises(LostClaim):
            write()
        any_db.rollback()
    after = runs.get(any_db, run.id)
    assert (after.state, after.phase, after.worker, after.figures) == (state, "scoring", "w2", {})
    assert runs.history(any_db, run.id) == []
    runs.progress(any_db, run.id, 2, phase="saving")
    assert runs.get(any_db, run.id).phase == "saving"


@pytest.mark.parametrize(
    ("state", "after"), [("running", "queued"), ("cancelling", "cancelled"), ("pausing", "paused")]
)
def test_a_worker_lets_go(db: Session, state: str, after: str) -> None:
    run = factories.run(db, state=state)
    runs.settle(db, run.id, 1, "The worker was stopped.")
    found = runs.get(db, run.id)
    assert found.state == after
    assert (found.worker, found.lease_until, found.clock, found.phase) == (None, None, None, "")
    assert (found.finished_at is not None) == (after == "cancelled")


def test_finishing_and_failing(db: Session) -> None:
    run = factories.run(db, state="running", error="left by an earlier attempt")
    runs.finish(db, run.id, 1, scores={"primary": "accuracy"})
    found = runs.get(db, run.id)
    assert (found.state, found.error, found.worker) == ("succeeded", None, None)
    assert found.scores == {"primary": "accuracy"}
    assert found.finished_at

    run = factories.run(db, state="running")
    runs.fail(db, run.id, 1, "The disk is full.")
    found = runs.get(db, run.id)
    assert (found.state, found.error) == ("failed", "The disk is full.")
    assert [(event.level, event.message) for event in runs.history(db, run.id)] == [
        ("error", "The disk is full.")
    ]


@pytest.mark.parametrize(("state", "after"), [("cancelling", "cancelled"), ("pausing", "paused")])
def test_what_was_asked_for_wins_over_the_end(db: Session, state: str, after: str) -> None:
    run = factories.run(db, state=state)
    with pytest.raises(LostClaim):
        runs.finish(db, run.id, 1)
    assert _state(db, run) == state
    runs.fail(db, run.id, 1, "The disk is full.")
    assert _state(db, run) == after


def test_a_worker_reads_what_others_want_of_its_run(db: Session) -> None:
    run = factories.run(db, state="running")
    assert runs.state(db, run.id, 1) == "running"
    db.rollback()
    runs.pause(db, run.id)
    assert runs.state(db, run.id, 1) == "pausing"


def test_retry_is_a_new_run_at_the_end_of_the_queue(db: Session) -> None:
    waiting = factories.run(db)
    failed = factories.run(db, state="failed", step=7, attempt=3, error="Out of memory.")
    new = runs.get(db, runs.retry(db, failed.id).id)
    assert new.id != failed.id
    assert (new.experiment_id, new.method, new.params) == (
        failed.experiment_id,
        failed.method,
        failed.params,
    )
    assert (new.state, new.step, new.attempt, new.error) == ("queued", 0, 0, None)
    assert new.position > waiting.position
    assert _state(db, failed) == "failed"


@pytest.mark.parametrize("state", [state for state in runs.STATES if state not in FINAL])
def test_what_has_not_ended_cannot_be_tried_again(db: Session, state: str) -> None:
    run = factories.run(db, state=state)
    with pytest.raises(Conflict, match="cannot be tried again"):
        runs.retry(db, run.id)
    assert len(run.experiment.runs) == 1


def test_what_is_at_work_is_listed_in_order_and_what_waits_is_counted(db: Session) -> None:
    second = factories.run(db, state="running", position=2.0)
    first = factories.run(db, state="pausing", position=1.0)
    for state in ("queued", "paused", "succeeded"):
        factories.run(db, state=state)
    assert [run.id for run in order.at_work(db)] == [first.id, second.id]
    assert order.count_waiting(db) == 2


def test_a_new_run_is_behind_all_others_even_if_the_clock_was_put_back(
    db: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, failed = factories.run(db), factories.run(db, state="failed")
    monkeypatch.setattr(time, "time", lambda: waiting.position - 3600)
    assert runs.retry(db, failed.id).position > waiting.position


def test_characters_that_no_database_takes_do_not_lose_a_run(any_db: Session) -> None:
    run = factories.run(any_db, state="running")
    runs.fail(any_db, run.id, 1, "It wrote \0 and \ud800.")
    assert runs.get(any_db, run.id).error == "It wrote \ufffd and ?."
