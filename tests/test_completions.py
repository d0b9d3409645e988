"""Completions: asked, claimed once, written, stopped, ended, and never left open for ever."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app import completions, database
from app.completions import Sampling
from app.errors import Invalid, NotFound
from app.tables import BaseModel, Completion
from tests import factories


def _ask(db: Session, of: BaseModel | None = None, **changes: Any) -> str:
    given: dict[str, Any] = {"run_ids": [None], "input": "Where is it?", "template": "{{input}}"}
    base_model_id = changes.pop("base_model_id", None) or (of or factories.base_model(db)).id
    return completions.ask(db, base_model_id=base_model_id, **given | changes)


def _states(db: Session, ask: str) -> list[str]:
    return [one.state for one in completions.of(db, ask)]


def test_an_ask_is_one_completion_for_each_model_in_their_order(any_db: Session) -> None:
    of = factories.experiment(any_db)
    one, two = factories.tuned(any_db, of), factories.tuned(any_db, of)
    ask = _ask(
        any_db,
        of.base_model,
        run_ids=[two.id, None, one.id, None],
        labels=["a", "b"],
        sampling=Sampling(temperature=0.5, max_tokens=9, seed=3),
    )
    found = completions.of(any_db, ask)
    assert [row.run_id for row in found] == [two.id, None, one.id]
    assert [row.place for row in found] == [0, 1, 2]
    assert {row.state for row in found} == {"queued"}
    expected = {"temperature": 0.5, "max_tokens": 9, "seed": 3, "labels": ["a", "b"]}
    assert found[0].settings == expected


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"input": " \n"}, "input"),
        ({"input": "x" * 100_001}, "input"),
        ({"run_ids": []}, "models"),
        ({"run_ids": [None] * 9}, "models"),
        ({"template": "Nothing to fill."}, "template"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_stored(
    db: Session, changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(Invalid) as refused:
        _ask(db, **changes)
    assert refused.value.field == field
    db.commit()
    assert db.scalar(select(func.count()).select_from(Completion)) == 0


def test_models_that_are_not_there_are_refused(db: Session) -> None:
    of = factories.experiment(db)
    unfinished = factories.run(db, of, state="running")
    deleted = factories.tuned(db, of, deleted_at=1.0)
    for run_id in ("nothing", unfinished.id, deleted.id):
        with pytest.raises(NotFound):
            _ask(db, of.base_model, run_ids=[run_id])
    with pytest.raises(NotFound):
        _ask(db, base_model_id="nothing")
    with pytest.raises(Invalid, match="one base model"):
        _ask(db, factories.base_model(db), run_ids=[factories.tuned(db, of).id])
    db.commit()
    assert db.scalar(select(func.count()).select_from(Completion)) == 0


def test_sampling_has_bounds() -> None:
    for wrong in ({"temperature": float("nan")}, {"temperature": 2.1}, {"max_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Sampling(**wrong)


def test_the_oldest_ask_is_claimed_whole(any_db: Session) -> None:
    of = factories.experiment(any_db)
    tuned = factories.tuned(any_db, of)
    first = _ask(any_db, of.base_model, run_ids=[None, tuned.id])
    second = _ask(any_db, of.base_model)
    taken = completions.claim_ask(any_db, "w1")
    assert [one.ask for one in taken] == [first, first]
    assert {(one.state, one.worker) for one in taken} == {("running", "w1")}
    assert [one.ask for one in completions.claim_ask(any_db, "w2")] == [second]
    assert completions.claim_ask(any_db, "w2") == []


def test_an_ask_is_claimed_once(any_db: Session) -> None:
    base = factories.base_model(any_db)
    asks = [_ask(any_db, base) for _ in range(40)]
    start = threading.Barrier(4, timeout=60)

    def work(number: int) -> list[str]:
        start.wait()
        mine: list[str] = []
        for _ in range(len(asks)):
            with database.session() as db:
                mine += [one.ask for one in completions.claim_ask(db, f"w{number}")]
        return mine

    with ThreadPoolExecutor(4) as pool:
        taken = [ask for mine in pool.map(work, range(4)) for ask in mine]
    assert sorted(taken) == sorted(asks)


def test_an_answer_is_written_and_ends(any_db: Session) -> None:
    ask = _ask(any_db)
    (one,) = completions.claim_ask(any_db, "w1")
    assert completions.write(any_db, one, text="It is", num_tokens=2)
    assert completions.of(any_db, ask)[0].text == "It is"
    assert completions.write(any_db, one, text="It is here.", num_tokens=4)
    completions.end(any_db, one)
    found = completions.of(any_db, ask)[0]
    assert (found.state, found.text, found.num_tokens) == ("done", "It is here.", 4)


def test_stopping_ends_what_waits_and_tells_who_writes(any_db: Session) -> None:
    base = factories.base_model(any_db)
    ask = _ask(any_db, base)
    (one,) = completions.claim_ask(any_db, "w1")
    completions.write(any_db, one, text="It is")
    completions.stop(any_db, ask)
    assert _states(any_db, ask) == ["stopping"]
    assert completions.write(any_db, one, text="It is here") is False
    completions.end(any_db, one)
    found = completions.of(any_db, ask)[0]
    assert (found.state, found.text) == ("stopped", "It is here")

    waiting = _ask(any_db, base)
    completions.stop(any_db, waiting)
    assert _states(any_db, waiting) == ["stopped"]
    assert completions.claim_ask(any_db, "w1") == []


def test_a_failure_says_why(db: Session) -> None:
    ask = _ask(db)
    (one,) = completions.claim_ask(db, "w1")
    completions.end(db, one, "The machine has no memory left.")
    found = completions.of(db, ask)[0]
    assert (found.state, found.error) == ("failed", "The machine has no memory left.")
    completions.end(db, one)
    assert _states(db, ask) == ["failed"]


def test_stopping_what_has_ended_changes_nothing(db: Session) -> None:
    ask = _ask(db)
    (one,) = completions.claim_ask(db, "w1")
    completions.end(db, one)
    completions.stop(db, ask)
    assert _states(db, ask) == ["done"]
    with pytest.raises(NotFound):
        completions.stop(db, "nothing")


def test_what_a_dead_process_left_open_fails(any_db: Session) -> None:
    base = factories.base_model(any_db)
    asks = [_ask(any_db, base) for _ in range(4)]
    for worker in ("w1", "w1", "w2"):
        completions.claim_ask(any_db, worker)
    completions.stop(any_db, asks[1])
    completions.fail_lost(any_db, "w1")
    assert [_states(any_db, ask)[0] for ask in asks] == ["failed", "stopped", "running", "queued"]
    assert "Ask again" in (completions.of(any_db, asks[0])[0].error or "")


def test_what_dead_workers_left_open_fails(any_db: Session) -> None:
    base = factories.base_model(any_db)
    asks = [_ask(any_db, base) for _ in range(3)]
    for worker in ("w1", "w2"):
        completions.claim_ask(any_db, worker)
    completions.fail_orphans(any_db, ["w2", "w3"])
    assert [_states(any_db, ask)[0] for ask in asks] == ["failed", "running", "queued"]
    completions.fail_orphans(any_db, [])
    assert [_states(any_db, ask)[0] for ask in asks] == ["failed", "failed", "queued"]


def test_one_worker_does_not_write_into_anothers_answer(db: Session) -> None:
    ask = _ask(db)
    (one,) = completions.claim_ask(db, "w1")
    db.expunge(one)
    one.worker = "w2"
    completions.write(db, one, text="Not mine.")
    assert completions.of(db, ask)[0].text == ""


def test_recent_asks_come_newest_first(db: Session) -> None:
    base = factories.base_model(db)
    asks = [_ask(db, base) for _ in range(3)]
    assert [one.ask for one in completions.recent(db)] == asks[::-1]
    assert len(completions.recent(db, limit=2)) == 2


def test_what_can_be_prompted(db: Session) -> None:
    of = factories.experiment(db)
    tuned = factories.tuned(db, of)
    factories.run(db, of, state="failed")
    bare = factories.base_model(db, name="Bare")
    factories.base_model(db, state="preparing")
    found = completions.choices(db)
    expected = {of.base_model_id: [tuned.id], bare.id: []}
    assert {base: [run.id for run in runs] for base, runs in found.items()} == expected
