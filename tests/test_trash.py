"""The trash: gone from everywhere, back as it was, and for good after a day."""

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app import (
    base_models,
    claims,
    completions,
    database,
    datasets,
    experiments,
    order,
    points,
    runs,
    storage,
    trash,
    tuned_models,
)
from app.errors import Conflict, InTrash, NotFound
from app.settings import settings
from app.tables import Answer, Checkpoint, Completion, Event, Experiment, Notice, Point, Run
from tests import factories
from tests.factories import measured


def _count(db: Session, table: Any) -> int:
    return db.scalar(select(func.count()).select_from(table)) or 0


def _ask(db: Session, run: Run) -> None:
    completions.ask(
        db,
        base_model_id=run.experiment.base_model_id,
        run_ids=[run.id],
        input="Hello",
        template="{{input}}",
    )


def _names(db: Session) -> list[tuple[str, str]]:
    return [(item.kind, item.id) for item in trash.all(db)]


def test_an_experiment_in_the_trash_is_nowhere_and_comes_back_as_it_was(any_db: Session) -> None:
    of = factories.experiment(any_db)
    queued, done = factories.run(any_db, of), factories.tuned(any_db, of, method="full")
    earlier = factories.tuned(any_db, of, method="qlora")
    trash.throw_away(any_db, "tuned-model", earlier.id)
    time.sleep(0.01)
    trash.throw_away(any_db, "experiment", of.id)
    assert experiments.all(any_db) == experiments.on_dataset(any_db, of.dataset_id) == []
    assert order.count_waiting(any_db) == len(order.at_work(any_db)) == 0
    assert tuned_models.all(any_db) == []
    assert completions.choices(any_db) == {of.base_model_id: []}
    assert claims.claim_next(any_db, "w1") is None
    refused: list[Callable[[], Any]] = [
        lambda: experiments.get(any_db, of.id),
        lambda: runs.get(any_db, queued.id),
        lambda: runs.cancel(any_db, queued.id),
        lambda: tuned_models.get(any_db, done.id),
        lambda: _ask(any_db, done),
    ]
    for act in refused:
        with pytest.raises(InTrash, match="is in the trash"):
            act()
        any_db.rollback()
    assert _names(any_db) == [("experiment", of.id)]
    trash.put_back(any_db, "experiment", of.id)
    assert [run.id for run in tuned_models.all(any_db)] == [done.id]
    taken = claims.claim_next(any_db, "w1")
    assert taken
    assert taken.id == queued.id
    assert _names(any_db) == [("tuned-model", earlier.id)]  # went by itself, and comes by itself
    trash.put_back(any_db, "tuned-model", earlier.id)
    assert len(tuned_models.all(any_db)) == 2


def test_what_an_experiment_outside_the_trash_needs_stays(any_db: Session) -> None:
    of = factories.experiment(any_db, name="Mine")
    base, data = of.base_model_id, of.dataset_id
    for kind, thing_id in (("dataset", data), ("base-model", base)):
        with pytest.raises(Conflict, match="'Mine' uses this"):
            trash.throw_away(any_db, kind, thing_id)
    trash.throw_away(any_db, "experiment", of.id)
    trash.throw_away(any_db, "dataset", data)
    trash.throw_away(any_db, "base-model", base)
    assert datasets.all(any_db) == base_models.all(any_db) == base_models.ready(any_db) == []
    for kind, thing_id in (("dataset", data), ("base-model", base)):  # the experiment comes first
        with pytest.raises(Conflict, match="'Mine' uses this"):
            trash.purge(any_db, kind, thing_id)
    trash.put_back(any_db, "experiment", of.id)  # with all that it needs
    assert _names(any_db) == []
    assert datasets.get(any_db, data)
    assert base_models.get(any_db, base)


def test_purging_takes_everything_of_it_and_nothing_else(any_db: Session) -> None:
    of = factories.experiment(any_db)
    run = factories.run(any_db, of, state="running")
    points.record(any_db, run.id, 1, [measured(1)])
    runs.tell(any_db, run.id, 1, "Taken up.")
    runs.finish(any_db, run.id, 1)
    kept = factories.tuned(any_db)
    (storage.checkpoints_folder(run.id) / "step").mkdir()
    any_db.add(Answer(owner=run.id, row=1, text="delivery", score=1.0))
    any_db.add(Checkpoint(run_id=run.id, step=1, attempt=1, digest="", num_bytes=1, seconds=1.0))
    any_db.add(Notice(run_id=run.id))
    any_db.commit()
    for one in (run, kept):
        _ask(any_db, one) if one is kept else any_db.add(
            Completion(
                ask="a", base_model_id=of.base_model_id, run_id=run.id, input="", template="",
                settings={},
            )
        )  # fmt: skip
    any_db.commit()
    with pytest.raises(Conflict, match="not in the trash"):
        trash.purge(any_db, "experiment", of.id)
    trash.throw_away(any_db, "experiment", of.id)
    trash.purge(any_db, "experiment", of.id)
    with pytest.raises(NotFound):
        experiments.get(any_db, of.id)
    for table in (Answer, Event, Point, Checkpoint, Notice):
        assert _count(any_db, table) == 0
    assert any_db.scalars(select(Run.id)).all() == [kept.id]
    assert any_db.scalars(select(Completion.run_id)).all() == [kept.id]
    assert [path.name for path in storage.entries("runs")] == [kept.id]
    for kind, thing_id in (("dataset", of.dataset_id), ("base-model", of.base_model_id)):
        trash.throw_away(any_db, kind, thing_id)
        trash.purge(any_db, kind, thing_id)
        with pytest.raises(NotFound):
            trash.put_back(any_db, kind, thing_id)
    assert [path.stem for path in storage.entries("datasets")] == [kept.experiment.dataset_id]


def test_a_purged_tuned_model_leaves_its_record(db: Session) -> None:
    run = factories.tuned(db, whole_state="ready")
    trash.throw_away(db, "tuned-model", run.id)
    assert trash.all(db)[0].num_bytes == 102
    trash.purge(db, "tuned-model", run.id)
    assert storage.entries("runs") == []
    found = runs.get(db, run.id)
    assert (found.state, found.whole_state, found.trashed_at) == ("succeeded", "", None)
    assert found.deleted_at
    for act in (trash.throw_away, trash.purge):
        with pytest.raises((NotFound, Conflict)):
            act(db, "tuned-model", run.id)
    assert _names(db) == []


@pytest.mark.parametrize("state", sorted(runs.HELD))
def test_what_is_at_work_is_not_thrown_away(db: Session, state: str) -> None:
    of = factories.experiment(db)
    factories.run(db, of, state=state)
    factories.run(db, of, state="queued")
    with pytest.raises(Conflict, match="nothing was deleted"):
        trash.throw_away(db, "experiment", of.id)
    db.rollback()
    assert _names(db) == []
    assert order.count_waiting(db) + len(order.at_work(db)) == 2


def test_what_a_generating_worker_works_on_is_not_thrown_away(db: Session) -> None:
    run = factories.tuned(db, whole_state="making")
    for kind, thing_id in (("tuned-model", run.id), ("experiment", run.experiment_id)):
        with pytest.raises(Conflict, match="being put together"):
            trash.throw_away(db, kind, thing_id)
    base = factories.base_model(db, state="preparing", address="other")
    with pytest.raises(Conflict, match="being prepared"):
        trash.throw_away(db, "base-model", base.id)
    waiting = factories.base_model(db, state="waiting", address="third")
    merged = factories.tuned(db, whole_state="waiting")
    trash.throw_away(db, "base-model", waiting.id)
    trash.throw_away(db, "tuned-model", merged.id)
    assert base_models.claim_waiting(db, "w1") is None
    assert tuned_models.claim_whole(db, "w1") is None


def test_adding_again_takes_out_of_the_trash(db: Session) -> None:
    data, base = datasets.add_example(db, "support_tickets"), base_models.add(db, "hub", "a/b")
    trash.throw_away(db, "dataset", data.id)
    trash.throw_away(db, "base-model", base.id)
    assert datasets.add_example(db, "support_tickets").id == data.id
    assert base_models.add(db, "hub", "a/b").id == base.id
    assert _names(db) == []


def test_a_day_later_it_goes_by_itself(any_db: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    of = factories.experiment(any_db)
    factories.run(any_db, of)
    for kind, thing in (
        ("experiment", of.id),
        ("dataset", of.dataset_id),
        ("base-model", of.base_model_id),
        ("tuned-model", factories.tuned(any_db).id),
    ):
        trash.throw_away(any_db, kind, thing)
    assert trash.sweep(any_db) == 0
    assert len(_names(any_db)) == 4
    began = trash.all(any_db)[-1].trashed_at
    monkeypatch.setattr(time, "time", lambda: began + settings.trash_hours * 3600 + 60)
    assert trash.sweep(any_db) == 4
    assert _names(any_db) == []
    assert _count(any_db, Experiment) == 1


def test_a_purge_that_breaks_off_leaves_files_alone(
    db: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = factories.tuned(db)
    trash.throw_away(db, "experiment", run.experiment_id)

    def crash(_path: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "remove", crash)
    with pytest.raises(KeyboardInterrupt):
        trash.purge(db, "experiment", run.experiment_id)
    db.rollback()
    assert _count(db, Run) == 0
    assert [path.name for path in storage.entries("runs")] == [run.id]


def test_throwing_away_while_a_worker_takes_a_run_up(any_db: Session) -> None:
    """Either it is in the trash and nobody works on it, or it stays and the run is at work."""
    data, base = factories.dataset(any_db), factories.base_model(any_db)
    start = threading.Barrier(2, timeout=60)

    def claim() -> Run | None:
        with database.session() as db:
            start.wait()
            return claims.claim_next(db, "w1")

    def throw(experiment_id: str, later: float) -> bool:
        with database.session() as db:
            start.wait()
            time.sleep(later)
            try:
                trash.throw_away(db, "experiment", experiment_id)
            except Conflict:
                return False
            return True

    with ThreadPoolExecutor(2) as pool:
        for number in range(40):
            of = factories.experiment(any_db, base, data)
            run = factories.run(any_db, of)
            claiming, throwing = pool.submit(claim), pool.submit(throw, of.id, number % 5 / 2000)
            taken, thrown = claiming.result(), throwing.result()
            assert (taken is None) == thrown
            any_db.expunge_all()
            if taken:
                runs.finish(any_db, run.id, 1)


def test_an_experiment_begun_while_its_dataset_goes(any_db: Session) -> None:
    """Either the experiment stands on both, or it was refused."""
    start = threading.Barrier(2, timeout=60)

    def create(base: str, data: str) -> bool:
        with database.session() as db:
            start.wait()
            try:
                experiments.create(
                    db, name="x", base_model_id=base, dataset_id=data, task="generation",
                    template="{{input}}", labels=[], seed=1, methods={"lora": {}},
                )  # fmt: skip
            except InTrash:
                return False
            return True

    def throw(kind: str, thing_id: str, later: float) -> bool:
        with database.session() as db:
            start.wait()
            time.sleep(later)
            try:
                trash.throw_away(db, kind, thing_id)
            except Conflict:
                return False
            return True

    with ThreadPoolExecutor(2) as pool:
        for number in range(20):
            data, base = factories.dataset(any_db), factories.base_model(any_db)
            kind = ("dataset", "base-model")[number % 2]
            target = (data.id, base.id)[number % 2]
            creating = pool.submit(create, base.id, data.id)
            throwing = pool.submit(throw, kind, target, number % 5 / 500)
            assert creating.result() != throwing.result()


def test_a_run_tried_again_while_its_experiment_goes(any_db: Session) -> None:
    """Whatever comes first: no run of an experiment in the trash waits for a worker."""
    data, base = factories.dataset(any_db), factories.base_model(any_db)
    start = threading.Barrier(2, timeout=60)

    def retry(run_id: str) -> None:
        with database.session() as db:
            start.wait()
            with contextlib.suppress(InTrash):
                runs.retry(db, run_id)

    def throw(experiment_id: str, later: float) -> None:
        with database.session() as db:
            start.wait()
            time.sleep(later)
            trash.throw_away(db, "experiment", experiment_id)

    with ThreadPoolExecutor(2) as pool:
        for number in range(20):
            of = factories.experiment(any_db, base, data)
            failed = factories.run(any_db, of, state="failed")
            both = pool.submit(retry, failed.id), pool.submit(throw, of.id, number % 5 / 500)
            assert [one.result() for one in both] == [None, None]
            assert claims.claim_next(any_db, "w1") is None
