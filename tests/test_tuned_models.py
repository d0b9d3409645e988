"""Tuned models: what finished runs left, merged copies asked for and made once, and deletion."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy.orm import Session

from app import database, runs, storage, tuned_models
from app.errors import Conflict, NotFound
from app.tables import Run
from tests import factories


def _whole(db: Session, run: Run) -> tuple[str, str | None]:
    found = runs.get(db, run.id)
    return found.whole_state, found.whole_error


def test_only_what_succeeded_and_is_there_is_listed(db: Session) -> None:
    of = factories.experiment(db)
    older = factories.tuned(db, of, finished_at=1.0)
    newer = factories.tuned(db, of, finished_at=2.0)
    deleted = factories.tuned(db, of, deleted_at=3.0)
    unfinished = [factories.run(db, of, state=state) for state in runs.STATES if state[0] != "s"]
    assert [run.id for run in tuned_models.all(db)] == [newer.id, older.id]
    for run in (deleted, *unfinished):
        with pytest.raises(NotFound):
            tuned_models.get(db, run.id)


def test_files(db: Session) -> None:
    run = factories.tuned(db)
    found = tuned_models.files(run, "tuned")
    assert [name for name, _ in found] == ["adapter_config.json", "adapter_model.safetensors"]
    assert all(path.is_file() for _, path in found)
    with pytest.raises(NotFound, match="gone"):
        tuned_models.files(run, "last")
    with pytest.raises(Conflict, match="Ask for it first"):
        tuned_models.files(run, "whole")
    for wrong in ("", "../best", "checkpoints"):
        with pytest.raises(NotFound, match="Choose"):
            tuned_models.files(run, wrong)


def test_an_archive_has_a_safe_name(db: Session) -> None:
    of = factories.experiment(db, name="../Ünïted “Claims”; rm -rf / — a b c d e f g")
    run = factories.tuned(db, of, method="prompt_tuning")
    name = tuned_models.folder_name(run, "tuned")
    assert name == f"n-ted-claims-rm-rf-a-prompt-tuning-tuned-{run.id[:6]}"


def test_a_merged_copy_is_asked_for_made_and_downloaded(any_db: Session) -> None:
    run = factories.tuned(any_db)
    assert tuned_models.claim_whole(any_db, "w1") is None
    tuned_models.ask_whole(any_db, run.id)
    tuned_models.ask_whole(any_db, run.id)
    taken = tuned_models.claim_whole(any_db, "w1")
    assert taken
    assert taken.id == run.id
    assert tuned_models.claim_whole(any_db, "w2") is None
    tuned_models.ask_whole(any_db, run.id)  # it is being made already
    assert _whole(any_db, run) == ("making", None)
    tuned_models.finish_whole(any_db, run.id)
    folder = storage.whole_model_folder(run.id)
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"\0")
    found = tuned_models.files(runs.get(any_db, run.id), "whole")
    assert [name for name, _ in found] == ["model.safetensors"]


def test_a_merged_copy_is_claimed_once(any_db: Session) -> None:
    of = factories.experiment(any_db)
    wanted = [factories.tuned(any_db, of, whole_state="waiting").id for _ in range(20)]
    start = threading.Barrier(4, timeout=60)

    def work(number: int) -> list[str]:
        start.wait()
        mine: list[str] = []
        for _ in range(2 * len(wanted)):
            with database.session() as db:
                run = tuned_models.claim_whole(db, f"w{number}")
            mine += [run.id] if run else []
        return mine

    with ThreadPoolExecutor(4) as pool:
        taken = [run_id for mine in pool.map(work, range(4)) for run_id in mine]
    assert sorted(taken) == sorted(wanted)


def test_what_could_not_be_merged_may_be_asked_for_again(db: Session) -> None:
    run = factories.tuned(db, whole_state="waiting")
    assert tuned_models.claim_whole(db, "w1")
    tuned_models.fail_whole(db, run.id, "The disk is full.")
    assert _whole(db, run) == ("failed", "The disk is full.")
    with pytest.raises(Conflict):
        tuned_models.files(runs.get(db, run.id), "whole")
    tuned_models.ask_whole(db, run.id)
    assert _whole(db, run) == ("waiting", None)


def test_what_a_dead_worker_was_making_waits_again(any_db: Session) -> None:
    of = factories.experiment(any_db)
    one, two = (
        factories.tuned(any_db, of, whole_state="making", whole_worker=worker)
        for worker in ("w1", "w2")
    )
    tuned_models.free_orphans(any_db, ["w2"])
    assert [_whole(any_db, run)[0] for run in (one, two)] == ["waiting", "making"]


@pytest.mark.parametrize(("method", "merges"), [("lora", True), ("prompt_tuning", False)])
def test_only_what_can_be_merged_is(db: Session, method: str, merges: bool) -> None:
    run = factories.tuned(db, method=method)
    if merges:
        tuned_models.ask_whole(db, run.id)
    else:
        with pytest.raises(Conflict, match="nothing that can be merged"):
            tuned_models.ask_whole(db, run.id)
    assert _whole(db, run)[0] == ("waiting" if merges else "")
