"""The disk: every byte is counted once, and what is needed no more can go."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select
from sqlalchemy.orm import Session

from app import disk, runs, storage, trash, tuned_models
from app.errors import NotFound
from app.tables import Checkpoint
from tests import factories, web


def _write(folder: Path, num_bytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "file").write_bytes(b"x" * num_bytes)


def test_every_byte_is_counted_once(any_db: Session) -> None:
    of = factories.experiment(any_db, name="Mine")
    done, waiting = factories.run(any_db, of, state="succeeded"), factories.run(any_db, of)
    _write(storage.checkpoints_folder(done.id) / "00000001", 1000)
    _write(storage.tuned_model_folder(done.id), 200)
    _write(storage.last_model_folder(done.id), 300)
    _write(storage.whole_model_folder(done.id), 5000)
    _write(storage.checkpoints_folder(waiting.id) / "00000001", 40)
    _write(storage.base_model_folder(of.base_model_id), 7000)
    spare = factories.dataset(any_db, count=50)
    storage.log_file("web").write_text("x" * 99)
    _write(storage.home() / "valkey", 11)
    found = disk.usage(any_db)
    assert [(entry.kind, entry.num_bytes) for entry in found.entries[:2]] == [
        ("base-model", 7000),
        ("experiment", 6540),
    ]
    entries = {entry.id: entry for entry in found.entries}
    mine = entries[of.id]
    assert mine.parts == {"checkpoints": 1040, "best": 200, "last": 300, "whole": 5000}
    assert (mine.frees, mine.kept) == (6540, "")
    assert (entries[of.dataset_id].frees, entries[of.dataset_id].kept) == (0, "Used by Mine")
    assert entries[spare.id].frees == spare.num_bytes
    assert (found.finished, found.logs) == (1300, 99)
    assert found.database > 0
    assert found.used == storage.size(storage.home())
    assert found.free > 0
    trash.throw_away(any_db, "experiment", of.id)
    entries = {entry.id: entry for entry in disk.usage(any_db).entries}
    assert entries[of.id].trashed
    assert entries[of.dataset_id].frees > 0


def test_what_finished_runs_need_no_more_goes(db: Session) -> None:
    done, failed = factories.tuned(db), factories.run(db, state="failed", error="x")
    at_work = factories.run(db, state="running")
    for run in (done, failed, at_work):
        _write(storage.checkpoints_folder(run.id) / "00000001", 1000)
        row = {"step": 1, "attempt": 1, "digest": "", "num_bytes": 1000, "seconds": 1.0}
        db.add(Checkpoint(run_id=run.id, **row))
    _write(storage.last_model_folder(done.id), 500)
    db.commit()
    assert disk.drop_finished(db) == disk.drop_finished(db) + 2500
    assert disk.usage(db).finished == 0
    assert list(db.scalars(select(Checkpoint.run_id))) == [at_work.id]
    assert storage.size(storage.checkpoints_folder(at_work.id)) == 1000
    assert len(tuned_models.files(runs.get(db, done.id), "tuned")) == 2
    with pytest.raises(NotFound):
        tuned_models.files(runs.get(db, done.id), "last")


@pytest.fixture
def browser(home: Path) -> TestClient:
    return web.client()


def test_the_page_and_the_json(browser: TestClient, db: Session) -> None:
    run = factories.tuned(db)
    _write(storage.last_model_folder(run.id), 500)
    name = run.experiment.name
    db.commit()
    page = browser.get("/disk").text
    assert name in page
    assert "602 B" in page
    assert "needed no more" in page
    assert "Used by" in page
    assert browser.get("/api/disk").json()["finished"] == 500
    assert "state after the last step" in browser.get(f"/tuned-models/{run.id}").text.lower()
    answer = browser.post("/disk/drop-finished")
    assert answer.headers["location"] == "/disk"
    assert "/files/last.zip" not in browser.get(f"/tuned-models/{run.id}").text
    assert browser.post("/api/disk/drop-finished").json() == {"freed": 0}
    assert "There are none" in browser.get("/disk").text
    assert "/disk" in browser.get("/now").text


def test_the_trash_on_its_page_and_as_json(browser: TestClient, db: Session) -> None:
    run = factories.tuned(db)
    experiment = run.experiment
    db.commit()
    assert "The trash is empty" in browser.get("/trash").text
    gone = browser.post(f"/experiments/{experiment.id}/delete")
    landed = browser.get(gone.headers["location"]).text
    assert f'action="/trash/experiment/{experiment.id}/put-back"' in landed
    assert "put-back" not in browser.get("/experiments").text  # said once
    page = browser.get(f"/experiments/{experiment.id}")
    assert page.status_code == 404
    assert "in 24 h" in page.text
    assert "Put it back" in page.text
    assert browser.get(f"/runs/{run.id}").status_code == 404
    assert (
        "in the trash"
        in browser.get(f"/api/experiments/{experiment.id}").json()["error"]["message"]
    )
    (item,) = browser.get("/api/trash").json()
    assert (item["kind"], item["id"], item["num_bytes"]) == ("experiment", experiment.id, 102)
    assert experiment.name in browser.get("/trash").text
    back = browser.post(f"/trash/experiment/{experiment.id}/put-back")
    assert back.headers["location"] == f"/experiments/{experiment.id}"
    assert browser.get(back.headers["location"]).status_code == 200
    assert browser.post(f"/trash/experiment/{experiment.id}/delete").status_code == 409
    assert browser.delete(f"/api/tuned-models/{run.id}").status_code == 204
    address = f"/api/trash/tuned-model/{run.id}"
    assert browser.post(f"{address}/put-back").status_code == 204
    assert browser.delete(f"/api/tuned-models/{run.id}").status_code == 204
    assert browser.delete(address).status_code == 204
    assert browser.post(f"{address}/put-back").status_code == 204  # nothing to put back
    assert browser.post("/trash/nonsense/1/put-back").status_code == 404


def test_an_undo_that_someone_else_wrote_is_not_offered(browser: TestClient) -> None:
    for undo in ("//evil.example/x", "experiment/../../x", '"><script>'):
        browser.cookies.set("studio-undo", undo)
        browser.cookies.set("studio-notice", "Hello")
        text = browser.get("/datasets").text
        assert "put-back" not in text
