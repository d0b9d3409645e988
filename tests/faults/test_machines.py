"""One studio on several machines: each has a home of its own, and they share a database and a store."""

import io
import json
import os
import shutil
import signal
import subprocess
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from sqlalchemy.orm import Session

from app import (
    base_models,
    claims,
    completions,
    database,
    experiments,
    file_store,
    files,
    holdings,
    invariants,
    points,
    processes,
    registry,
    runs,
    storage,
    trash,
    tuned_models,
)
from app.settings import settings
from app.tables import Run
from tests import factories, servers, web
from tests.engine import QUICK
from worker import answer, export, hardware, prepare, sharing
from worker import run as worker_run
from worker.keeper import SAVED

SETTINGS = {"num_epochs": 4, "batch_size": 8, "max_length": 256}
ON = "tuner-1"


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Checkpoints every now and then, and signals as they were after the test."""
    monkeypatch.setattr(settings, "checkpoint_seconds", 0.05)
    monkeypatch.setattr(settings, "checkpoint_share", 0.5)
    monkeypatch.setattr(sharing, "RETRY_SECONDS", 0.2)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def _base_model(machines: servers.Machines, tiny_model: Path) -> str:
    """A generator makes it ready from a folder that only it has."""
    machines.on("generator")
    shutil.copytree(tiny_model, storage.models_folder() / "tiny")
    with database.session() as db:
        model_id = base_models.add(db, "folder", "tiny").id
    assert prepare.prepare(model_id)
    return model_id


def _experiment(
    machines: servers.Machines, model_id: str, method: str = "lora", **changes: int
) -> Run:
    """The web takes the examples and queues a run."""
    machines.on("web")
    rows = [{"input": one, "output": other} for one, other in factories.examples(60)]
    sent = web.client().post(
        "/api/datasets", files={"file": ("messages.json", str(rows).replace("'", '"').encode())}
    )
    assert sent.status_code == 201, sent.text
    with database.session() as db:
        experiment = experiments.create(
            db,
            name="Machines",
            base_model_id=model_id,
            dataset_id=sent.json()["id"],
            task="classification",
            template=factories.TEMPLATE,
            labels=factories.LABELS,
            seed=1,
            methods={method: QUICK.get(method, {}) | SETTINGS | changes},
        )
        return experiment.runs[0]


def _work(machines: servers.Machines, machine: str) -> int:
    """A tuner there takes up the run and works on it; the exit code of its process."""
    machines.on(machine)
    with database.session() as db:
        run = claims.claim_next(db, machine)
    assert run
    return worker_run.work(run.id, run.attempt)


def _now(run_id: str) -> Run:
    with database.reading() as db:
        return runs.get(db, run_id)


def _history(run_id: str) -> list[str]:
    with database.reading() as db:
        return [event.message for event in runs.history(db, run_id)]


def _when(true: Callable[[], object], act: Callable[[], object]) -> threading.Thread:
    """In a thread of its own: do it as soon as that is so."""
    thread = threading.Thread(target=lambda: servers.wait_for(true, 60) and act(), daemon=True)
    thread.start()
    return thread


def _stored(part: str) -> list[str]:
    system, root = fsspec.url_to_fs(settings.files_url, use_listings_cache=False)
    return [path for path in system.find(root) if part in path]


def _unzipped(address: str) -> dict[str, bytes]:
    sent = web.client().get(address)
    assert sent.status_code == 200, sent.text
    with zipfile.ZipFile(io.BytesIO(sent.content)) as archive:
        return {name.rpartition("/")[2]: archive.read(name) for name in archive.namelist()}


def _contents(folder: Path) -> dict[str, bytes]:
    return {part.name: part.read_bytes() for part in storage.parts(folder)}


@pytest.mark.parametrize(
    "shared_store", ["s3", pytest.param("file", marks=pytest.mark.faults)], indirect=True
)
def test_a_run_goes_from_machine_to_machine(
    home: Path, shared_store: str, machines: servers.Machines, tiny_model: Path
) -> None:
    model_id = _base_model(machines, tiny_model)
    run = _experiment(machines, model_id)
    stop = _when(lambda: _now(run.id).step >= 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert _work(machines, "tuner-1") == SAVED
    stop.join()
    assert _now(run.id).state == "queued"
    assert _work(machines, "tuner-2") == 0
    found = _now(run.id)
    assert (found.state, found.attempt) == ("succeeded", 2), _history(run.id)
    said = _history(run.id)
    assert any("Going on from the checkpoint of step" in line for line in said), said
    with database.reading() as db:
        steps = [point.step for point in points.curve(db, run.id) if point.kind == "train"]
        kept = {(one.step, one.attempt) for one in registry.of(db, run.id)}
    assert steps == list(range(1, found.step + 1))
    # In the store lie exactly the checkpoints that have a row, and one version of what is kept.
    names = {path.split("/checkpoints/")[1][:13] for path in _stored("/checkpoints/")}
    assert names == {f"{step:08d}-{attempt:04d}" for step, attempt in kept}
    assert len(_stored("/best/0002/")) == len(_stored("/last/0002/"))
    assert _stored("/best/0001/") == []

    machines.on("generator")
    with database.session() as db:
        asked = completions.ask(
            db, base_model_id=model_id, run_ids=[None, run.id], input="Hello", template="{{input}}"
        )
        answer.answer(completions.claim_ask(db, "g"), answer.Models(hardware.find()))
        assert [one.state for one in completions.of(db, asked)] == ["done", "done"]
        tuned_models.ask_whole(db, run.id)
        tuned_models.claim_whole(db, "g")
        export.whole(runs.get(db, run.id), hardware.find())
        tuned_models.finish_whole(db, run.id)
    whole = _contents(storage.whole_model_folder(run.id))

    machines.on("tuner-2")
    best, last = storage.tuned_model_folder(run.id), storage.last_model_folder(run.id)
    tuned = {"tuned": _contents(best), "last": _contents(last), "whole": whole}
    machines.on("web")
    for which, contents in tuned.items():
        found = _unzipped(f"/api/tuned-models/{run.id}/files/{which}.zip")
        assert b"tuned by LoRA" in found.pop("README.md")
        assert found == contents, which
    assert "Your text" in web.client().get(f"/tuned-models/{run.id}").text
    assert not storage.base_model_folder(model_id).exists()  # the web needs no weights
    removed = web.client().delete(f"/api/experiments/{run.experiment_id}")
    assert removed.status_code == 204, removed.text
    assert _stored("/runs/") != []  # in the trash it can be put back
    with database.session() as db:
        trash.purge(db, "experiment", run.experiment_id)
    assert _stored("/runs/") == []
    assert _stored("/base_models/")


@pytest.fixture
def share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Share":
    """The store is a folder that can go away."""
    monkeypatch.setattr(settings, "files_url", f"file://{tmp_path}/share")
    return Share(tmp_path / "share")


class Share:
    """A shared folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def go(self) -> None:
        """As a share whose server is gone: every access is an error."""
        self.folder.rename(self.folder.with_name("elsewhere"))
        self.folder.write_text("not a folder")

    def come_back(self) -> None:
        self.folder.unlink()
        self.folder.with_name("elsewhere").rename(self.folder)


@pytest.mark.faults
def test_a_tuner_waits_for_a_store_that_is_away(
    home: Path, share: Share, machines: servers.Machines, tiny_model: Path
) -> None:
    run = _experiment(machines, _base_model(machines, tiny_model), "prompt_tuning")
    share.go()
    back = _when(lambda: _now(run.id).phase == "waiting for the file store", share.come_back)
    assert _work(machines, ON) == 0
    back.join()
    assert _now(run.id).state == "succeeded", _history(run.id)
    told = _history(run.id)
    assert sum("The run waits for it." in line for line in told) == 1
    assert told.count("The file store is back.") == 1


def test_a_run_that_is_cancelled_while_it_waits_for_the_store_ends(
    home: Path, share: Share, machines: servers.Machines, tiny_model: Path
) -> None:
    run = _experiment(machines, _base_model(machines, tiny_model))
    share.go()

    def cancel() -> None:
        with database.session() as db:
            runs.cancel(db, run.id)

    _when(lambda: _now(run.id).phase == "waiting for the file store", cancel)
    _work(machines, ON)
    assert _now(run.id).state == "cancelled"


def test_training_goes_on_while_the_store_is_away_and_nothing_is_lost(
    home: Path, share: Share, machines: servers.Machines, tiny_model: Path
) -> None:
    run = _experiment(machines, _base_model(machines, tiny_model))
    gone = _when(lambda: _now(run.id).step >= 3, share.go)
    at_the_end = []

    def come_back() -> None:
        at_the_end.append(_now(run.id).step)
        share.come_back()

    back = _when(lambda: _now(run.id).phase == "waiting for the file store", come_back)
    assert _work(machines, ON) == 0
    gone.join()
    back.join()
    found, told = _now(run.id), _history(run.id)
    assert found.state == "succeeded", told
    assert at_the_end == [found.num_steps]  # all was trained meanwhile
    assert sum("Training goes on; what is saved lies on" in line for line in told) == 1
    machines.on("web")
    assert "adapter_model.safetensors" in _unzipped(f"/tuned-models/{run.id}/files/tuned.zip")


@pytest.mark.faults
def test_what_could_be_published_is_kept_while_the_store_is_away(
    home: Path, share: Share, machines: servers.Machines, tiny_model: Path
) -> None:
    """A run that dies then goes on elsewhere from the newest checkpoint that is in the store."""
    run = _experiment(machines, _base_model(machines, tiny_model))
    published: list[int] = []

    def go() -> None:
        published.append(_now(run.id).step)
        share.go()

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    gone = _when(lambda: len(_rows(run.id)) >= 2 and _stored("/checkpoints/"), go)
    _when(lambda: published and len(_rows(run.id)) >= 3, stop)
    assert _work(machines, ON) == SAVED
    gone.join()
    assert _now(run.id).state == "queued"
    rows = _rows(run.id)
    share.come_back()
    there = {int(path.split("/checkpoints/")[1][:8]) for path in _stored("/checkpoints/")}
    kept = there & set(rows)  # one that was to go while the store was away is left in it
    assert kept
    assert max(rows) not in there
    assert _work(machines, "tuner-2") == 0
    told = _history(run.id)
    assert _now(run.id).state == "succeeded", told
    assert any("neither on this machine nor in the file store" in line for line in told)
    assert f"Going on from the checkpoint of step {max(kept)}." in told
    with database.reading() as db:
        steps = [point.step for point in points.curve(db, run.id) if point.kind == "train"]
    assert steps == list(range(1, _now(run.id).step + 1))


def _rows(run_id: str) -> list[int]:
    with database.reading() as db:
        return [one.step for one in registry.of(db, run_id)]


def test_an_upload_is_refused_in_words_while_the_store_is_away(
    home: Path, share: Share, machines: servers.Machines
) -> None:
    share.folder.mkdir()
    share.go()
    machines.on("web")
    rows = b"\n".join(b'{"input": "%d", "output": "x"}' % number for number in range(60))
    sent = web.client().post("/api/datasets", files={"file": ("rows.jsonl", rows)})
    assert sent.status_code == 503
    assert "The file store file://" in sent.json()["error"]["message"]
    assert list(storage.dataset_file("x").parent.iterdir()) == []
    assert web.client().get("/api/datasets").json() == []


@pytest.mark.faults
def test_a_damaged_checkpoint_in_the_store_is_passed_over(
    home: Path, share: Share, machines: servers.Machines, tiny_model: Path
) -> None:
    run = _experiment(machines, _base_model(machines, tiny_model))
    stop = _when(
        lambda: len(_rows(run.id)) >= 2 and _now(run.id).step > 3,
        lambda: os.kill(os.getpid(), signal.SIGTERM),
    )
    assert _work(machines, ON) == SAVED
    stop.join()
    newest, older = _rows(run.id)[:2]
    [values] = [
        path
        for path in _stored(f"/checkpoints/{newest:08d}-0001/")
        if path.endswith("values.safetensors")
    ]
    with Path(values).open("r+b") as file:
        file.seek(200)
        file.write(b"\xff\x00\xff")
    assert _work(machines, "tuner-2") == 0
    told = _history(run.id)
    assert any("is not what was published" in line and "passed over" in line for line in told)
    assert f"Going on from the checkpoint of step {older}." in told
    assert _now(run.id).state == "succeeded"


@pytest.mark.faults
@pytest.mark.parametrize("shared_store", ["s3"], indirect=True)
def test_a_run_that_is_killed_here_goes_on_there_as_if_nothing_had_been(
    home: Path,
    shared_store: str,
    machines: servers.Machines,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = _experiment(machines, _base_model(machines, tiny_model), num_epochs=20)
    with database.session() as db:
        again = Run(id="other", experiment_id=run.experiment_id, method="lora", params=run.params)
        db.add(again)
        db.commit()
    for name, value in (("DATABASE_URL", f"sqlite:///{home}/studio.sqlite"), ("THREADS", "1")):
        monkeypatch.setenv(f"STUDIO_{name}", value)
    monkeypatch.setenv("STUDIO_CHECKPOINT_SECONDS", "0.05")
    machines.on("tuner-1")
    with database.session() as db:
        claimed = claims.claim_next(db, "tuner-1")
    assert claimed
    child = processes.start("worker.run", "tuner-1", stdin=subprocess.PIPE)
    assert child.stdin
    child.stdin.write(json.dumps({"run": run.id, "attempt": 1}) + "\n")
    child.stdin.flush()
    # Its own manifest, which is written last, lies beside the folder of its files.
    whole = f"/0000/{file_store.MANIFEST}"
    assert servers.wait_for(
        lambda: [path for path in _stored("/checkpoints/") if path.endswith(whole)], 300
    )
    child.kill()
    child.communicate()
    with database.session() as db:
        claims.put_back(db, run.id, 1, "Its process was killed.")
    for machine in ("tuner-2", "tuner-3"):  # the one goes on, the other does all of it
        assert _work(machines, machine) == 0
    found = [_now(run.id), _now("other")]
    assert [one.state for one in found] == ["succeeded"] * 2, _history(run.id)
    assert [one.attempt for one in found] == [2, 1]
    said = _history(run.id)
    assert any("Going on from the checkpoint of step" in line for line in said), said
    curves = []
    with database.reading() as db:
        for one in found:
            curve = points.curve(db, one.id)
            curves.append(
                [(point.kind, point.step, point.loss, point.grad_norm) for point in curve]
            )
    assert curves[0] == curves[1]
    machines.on("generator")
    one, other = (_contents(files.tuned_model(each.id, each.attempt)) for each in found)
    assert one == other


@pytest.mark.parametrize("shared_store", ["s3"], indirect=True)
def test_a_studio_that_is_given_a_store_publishes_what_it_holds(
    any_db: Session, shared_store: str, machines: servers.Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines.on("laptop")
    monkeypatch.setattr(settings, "files_url", "")
    run = factories.tuned(any_db, attempt=3)
    base, dataset = run.experiment.base_model_id, run.experiment.dataset_id
    folder = storage.base_model_folder(base)
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(settings, "files_url", shared_store)
    said: list[str] = []
    holdings.publish(any_db, said.append)
    assert [line.partition(":")[0] for line in said] == ["1 of 3", "2 of 3", "3 of 3"]
    assert not list(invariants.datasets_have_files(any_db))
    machines.on("other")
    assert files.dataset(dataset).stat().st_size == run.experiment.dataset.num_bytes
    assert files.base_model(base).joinpath("config.json").read_text() == "{}"
    assert len(_contents(files.tuned_model(run.id, 3))) == 2
    machines.on("third")  # which has nothing yet, and breaks no rule
    assert not list(invariants.datasets_have_files(any_db))
    files.remove(storage.dataset_file(dataset))
    assert [found for found, _ in invariants.datasets_have_files(any_db)] == [dataset]
