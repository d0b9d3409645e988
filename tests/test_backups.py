"""Backups: the whole studio while it works, and back on either database, or refused whole."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from typer.testing import CliRunner

from app import (
    backups,
    completions,
    database,
    doctor,
    migrate,
    points,
    restores,
    runs,
    snapshots,
    storage,
    supervisor,
    trash,
    workers,
)
from app.cli import cli
from app.errors import Conflict, Invalid
from app.settings import settings
from app.tables import Checkpoint, Event, Experiment, Point, Run, Table, Worker
from tests import factories
from tests.factories import measured
from tests.servers import new_database


def quiet(_done: int, _total: int) -> None:
    """No progress."""


def checkpoint(db: Session, run: Run, step: int, attempt: int = 1) -> Path:
    """A checkpoint with its row, as a worker writes it."""
    folder = storage.checkpoint_folder(run.id, step, attempt)
    folder.mkdir()
    (folder / "values.safetensors").write_bytes(os.urandom(500))
    digest = hashlib.sha256((folder / "values.safetensors").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"values.safetensors": digest}))
    row = {"step": step, "attempt": attempt, "num_bytes": 500, "seconds": 0.1}
    digest = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    db.add(Checkpoint(run_id=run.id, digest=digest, **row))
    db.commit()
    return folder


def weights(folder: Path) -> None:
    """A file that looks like weights."""
    folder.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}).encode()
    content = len(header).to_bytes(8, "little") + header + os.urandom(9)
    (folder / "adapter_model.safetensors").write_bytes(content)


@pytest.fixture
def whole(any_db: Session) -> Experiment:
    """A studio with a bit of everything: done, at work, in the trash; text of every kind."""
    db = any_db
    of = factories.experiment(db, name='Größe "x" \\ \x7f 😀')
    folder = storage.base_model_folder(of.base_model_id)
    weights(folder)
    (folder / "sub").mkdir()
    (folder / "sub" / "more.txt").write_text("ü")
    done = factories.tuned(db, of, num_steps=3, step=3, whole_state="ready", attempt=1)
    for part in (storage.tuned_model_folder, storage.last_model_folder, storage.whole_model_folder):
        weights(part(done.id))
    at_work = factories.run(db, of, method="full", state="running", num_steps=9)
    points.record(db, at_work.id, 1, [measured(step) for step in (1, 2, 3)])
    runs.tell(db, at_work.id, 1, "Taken up.")
    for step in (1, 2):
        checkpoint(db, at_work, step)
    for step in (1, 2, 3):
        point = measured(step)._asdict()
        db.add(Point(run_id=done.id, number=step, attempt=1, **point))
    look = measured(3, "validation", loss=float("1e-17"))._asdict()
    db.add(Point(run_id=done.id, number=4, attempt=1, **look))
    done.last_number = 4
    db.commit()
    other = factories.experiment(db, of.base_model, of.dataset)
    gone = factories.tuned(db, other, state="failed", error="It was too large.")
    trash.throw_away(db, "experiment", gone.experiment_id)
    base = of.base_model_id
    completions.ask(db, base_model_id=base, run_ids=[done.id], input="Hé", template="{{input}}")
    completions.claim_ask(db, "w1")
    workers.beat(db, Worker(id="w9", kind="tuner", host="h", pid=1))
    workers.leave(db, "w9")
    db.commit()
    return of


def rows() -> dict[str, list[Any]]:
    """Every row of every table but those that a restore may change."""
    with database.reading() as db:
        return {
            name: db.execute(select(table).order_by(*table.primary_key.columns)).all()
            for name, table in Table.metadata.tables.items()
            if name not in {"worker", "run", "event", "completion", "checkpoint"}
        }


def files() -> dict[str, bytes]:
    """What lies in the home folder and is worth keeping."""
    folders = [path for what in restores.FOLDERS for path in storage.entries(what)]
    found = [
        part for path in folders for part in ([path] if path.is_file() else storage.parts(path))
    ]
    return {storage.home_name(path): path.read_bytes() for path in found}


@pytest.fixture
def fresh(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], None]]:
    """Makes the studio work on an empty home with an empty database of that kind."""
    made = []

    def use(kind: str) -> None:
        url = ""
        if kind == "postgres":
            url = new_database(request.getfixturevalue("postgres_server"))
        database.engine().dispose()
        monkeypatch.setattr(settings, "home", str(tmp_path / f"fresh{len(made)}"))
        monkeypatch.setattr(settings, "database_url", url)
        database.engine.cache_clear()
        made.append(kind)

    before = settings.home, settings.database_url
    yield use
    database.engine().dispose()
    database.engine.cache_clear()
    # The tables of the test's own database are emptied by who made it.
    monkeypatch.setattr(settings, "home", before[0])
    monkeypatch.setattr(settings, "database_url", before[1])


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def test_all_comes_back_on_either_database(
    whole: Experiment, tmp_path: Path, fresh: Callable[[str], None], kind: str
) -> None:
    before, stored, token = rows(), files(), storage.token()
    told: list[tuple[int, int]] = []
    saved = backups.save(tmp_path / "b.tar", lambda *sizes: told.append(sizes))
    assert saved.missing == []
    assert told[-1] == (saved.num_bytes, saved.num_bytes)
    assert (tmp_path / "b.tar").stat().st_mode & 0o077 == 0
    assert not [path.name for path in storage.home().iterdir() if path.name[0] == "."]
    fresh(kind)
    made = restores.restore(tmp_path / "b.tar", replace=False, tell=quiet)
    assert rows() == before
    assert made.requeued == 1
    assert storage.token() == token
    at_work = next(run for run in whole.runs if run.method == "full")
    old = storage.checkpoint_folder(at_work.id, 1, 1)  # the newest is enough
    kept = {name: content for name, content in stored.items() if old.name not in name}
    assert files() == kept
    with database.session() as db:
        found = runs.get(db, at_work.id)
        assert (found.state, found.attempt, found.worker) == ("queued", 1, None)
        assert runs.history(db, at_work.id)[-1].message.startswith("The studio was restored")
        assert [one.step for one in db.scalars(select(Checkpoint))] == [2]
        (asked,) = completions.recent(db)
        assert asked.state == "failed"
        assert doctor.examine(db) == []
        runs.cancel(db, at_work.id)  # new rows get new numbers
        numbers = list(db.scalars(select(Event.id).order_by(Event.id)))
        assert len(numbers) == len(set(numbers)) >= 3
    assert not [path.name for path in storage.home().iterdir() if path.name[0] == "."]
    migrate.up()  # the tables are those of this version


WRITER = """
import shutil, time
from app import database, points, storage, tables, queue
from tests import factories, test_backups
queue.announce = lambda key: None
run_id = {run_id!r}
GO
step = 0
while True:
    step += 1
    with database.session() as db:
        points.record(db, run_id, 1, [factories.measured(step)])
    if step % 5 == 0:  # as often as a checkpoint, and as many of them are kept
        with database.session() as db:
            test_backups.checkpoint(db, db.get(tables.Run, run_id), step)
            for old in db.query(tables.Checkpoint).filter(tables.Checkpoint.step <= step - 10):
                db.delete(old)
                db.commit()
                shutil.rmtree(storage.checkpoint_folder(run_id, old.step, 1))
    time.sleep(0.1)
"""


def test_a_backup_while_another_process_writes_is_of_one_moment(
    any_db: Session, tmp_path: Path, fresh: Callable[[str], None]
) -> None:
    run = factories.run(any_db, state="running", num_steps=400)
    weights(storage.base_model_folder(run.experiment.base_model_id))
    run_id = run.id
    any_db.commit()
    environment = {"STUDIO_HOME": settings.home, "STUDIO_DATABASE_URL": settings.database_url}
    script = WRITER.format(run_id=run_id).replace("GO", "print('ready', flush=True)")
    writer = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=storage.REPOSITORY,
        env={"PATH": os.environ["PATH"], **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout
    try:
        assert writer.stdout.readline() == "ready\n", writer.stderr and writer.stderr.read()
        for _ in range(600):
            if any_db.scalar(select(func.count()).select_from(Checkpoint)):
                break
            any_db.rollback()
            time.sleep(0.1)
        any_db.rollback()
        archives = []
        while len(archives) < 3:
            archives.append(tmp_path / f"b{len(archives)}.tar")
            assert backups.save(archives[-1], quiet).missing == []
        assert writer.poll() is None  # it wrote all the while
    finally:
        writer.kill()
        writer.communicate()
    steps = []
    for archive in archives:
        fresh("sqlite")
        restores.restore(archive, replace=False, tell=quiet)
        with database.session() as db:
            assert doctor.examine(db) == []
            found = runs.get(db, run_id)
            (saved,) = db.scalars(select(Checkpoint))
            assert found.state == "queued"
            assert 0 <= found.step - saved.step < 10
            steps.append(found.step)
    assert steps == sorted(steps)
    assert steps[0] < steps[-1]


def test_what_is_there_is_not_given_up_unless_told(
    whole: Experiment, tmp_path: Path, any_db: Session
) -> None:
    before, archive = rows(), tmp_path / "b.tar"
    backups.save(archive, quiet)
    with pytest.raises(Conflict, match="left as it is"):
        backups.save(archive, quiet)
    with pytest.raises(Conflict, match="--replace"):
        restores.restore(archive, replace=False, tell=quiet)
    added = factories.dataset(any_db, count=51).id
    any_db.commit()
    any_db.close()
    with supervisor.only_one():
        script = (
            "from app import restores, storage, errors\n"
            "try: restores.restore(storage.users_file('{}'), replace=True, tell=print)\n"
            "except errors.Conflict as error: print(error.message)"
        )
        run = [sys.executable, "-c", script.format(archive)]
        environment = {"STUDIO_HOME": settings.home, "STUDIO_DATABASE_URL": settings.database_url}
        said = subprocess.run(run, env=environment, cwd=storage.REPOSITORY, capture_output=True)
    assert b"A studio already runs" in said.stdout
    with database.session() as db:
        workers.beat(db, Worker(id="w9", kind="tuner", host="h", pid=1))
    with pytest.raises(Conflict, match="w9"):
        restores.restore(archive, replace=True, tell=quiet)
    with database.session() as db:
        workers.leave(db, "w9")
    restores.restore(archive, replace=True, tell=quiet)
    assert rows() == before
    assert f"{added}.jsonl" not in [path.name for path in storage.entries("datasets")]
    with database.reading() as db:
        assert doctor.examine(db) == []


def _rewrite(source: Path, target: Path, change: Callable[[str, bytes], Any]) -> None:
    """The archive with each member's name, content or info changed; its seals are made anew."""
    with tarfile.open(source) as archive:
        parts = {one.name: archive.extractfile(one).read() for one in archive.getmembers()}  # type: ignore[union-attr]
    made: list[tuple[tarfile.TarInfo, bytes]] = []
    manifest = json.loads(parts.pop("manifest.json"))
    del parts["manifest.json.sha256"]
    listed = {}
    for name, content in parts.items():
        found = change(name, content)
        info, content = found if isinstance(found, tuple) else (tarfile.TarInfo(name), content)
        info.size = 0 if info.issym() else len(content)
        made.append((info, content))
        digest = hashlib.sha256(content).hexdigest()
        listed[info.name] = {"size": info.size, "sha256": digest}
    head = json.dumps(manifest | {"files": listed}).encode()
    seal = hashlib.sha256(head).hexdigest().encode()
    with tarfile.open(target, "w") as archive:
        for info, content in made:
            archive.addfile(info, io.BytesIO(content))
        for name, content in (("manifest.json", head), ("manifest.json.sha256", seal)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def _named(name: str, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


HOSTILE = {
    "up": _named("home/runs/../../../evil"),
    "absolute": _named("/tmp/evil"),
    "elsewhere": _named("home/studio.sqlite"),
    "twice": _named("home/datasets//x"),
    "link": _named("home/datasets/link.jsonl", tarfile.SYMTYPE),
    "hard link": _named("home/datasets/link.jsonl", tarfile.LNKTYPE),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_is_refused_whole(db: Session, tmp_path: Path, kind: str) -> None:
    factories.dataset(db)
    backups.save(tmp_path / "b.tar", quiet)
    changed = lambda name, content: (  # noqa: E731
        (HOSTILE[kind], content) if name.startswith("home/datasets") else None
    )
    _rewrite(tmp_path / "b.tar", tmp_path / "evil.tar", changed)
    before, stored = rows(), files()
    with pytest.raises(Invalid, match="Nothing was changed"):
        restores.restore(tmp_path / "evil.tar", replace=True, tell=quiet)
    assert (rows(), files()) == (before, stored)
    assert not (tmp_path / "evil").exists()
    assert not [path.name for path in storage.home().iterdir() if path.name[0] == "."]


def test_a_damaged_archive_is_refused_whole(db: Session, tmp_path: Path) -> None:
    factories.tuned(db)
    archive = tmp_path / "b.tar"
    backups.save(archive, quiet)
    content, before, stored = archive.read_bytes(), rows(), files()
    with tarfile.open(archive) as opened:
        members = opened.getmembers()
    end = members[-1].offset_data + 3
    broken = [content[:cut] for cut in (0, 100, 512, len(content) // 2, end)]
    places = [one.offset for one in members] + [one.offset_data for one in members if one.size]
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 0x40
        broken.append(bytes(flipped))
    assert len(broken) > 30
    for part in broken:
        archive.write_bytes(part)
        with pytest.raises(Invalid, match="Nothing was changed"):
            restores.restore(archive, replace=True, tell=quiet)
    assert (rows(), files()) == (before, stored)
    archive.write_text("no archive at all")
    with pytest.raises(Invalid):
        restores.restore(archive, replace=True, tell=quiet)


def test_a_backup_of_an_older_version_is_brought_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: Callable[[str], None], home: Path
) -> None:
    fresh("sqlite")
    migrate.up()
    with database.session() as db:
        run_id = factories.run(db, state="running").id
    migrate.down("0001")
    backups_of_old = tmp_path / "old.tar"
    with snapshots.frozen() as connection:
        assert snapshots.revision(connection) == "0001"
        assert "checkpoint" not in snapshots.tables(connection)
    backups.save(backups_of_old, quiet)
    fresh("sqlite")
    restores.restore(backups_of_old, replace=False, tell=quiet)
    with database.session() as db:
        assert runs.get(db, run_id).state == "queued"
    with snapshots.frozen() as connection:
        assert snapshots.revision(connection) == migrate.newest()


def test_a_backup_of_a_newer_version_is_refused(db: Session, tmp_path: Path) -> None:
    factories.dataset(db)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(migrate, "newest", lambda: "9999")
        backups.save(tmp_path / "b.tar", quiet)
    with pytest.raises(Invalid, match="newer version"):
        restores.restore(tmp_path / "b.tar", replace=True, tell=quiet)


def test_what_is_missing_is_named(db: Session, tmp_path: Path) -> None:
    data = factories.dataset(db, name="Lost")
    storage.dataset_file(data.id).unlink()
    run = factories.run(db, state="paused")
    path = checkpoint(db, run, 3)
    (path / "manifest.json").write_text("{}")
    weights(storage.base_model_folder(run.experiment.base_model_id))
    db.commit()
    saved = backups.save(tmp_path / "b.tar", quiet)
    assert saved.missing == [
        f"The run {run.id} has no good checkpoint: it would begin anew.",
        "The dataset 'Lost' has no file, so the backup has none of it either.",
    ]


def test_both_as_commands(home: Path, tmp_path: Path, fresh: Callable[[str], None]) -> None:
    with database.session() as db:
        run = factories.tuned(db)
        weights(storage.base_model_folder(run.experiment.base_model_id))
        db.commit()
    archive, runner = str(tmp_path / "b.tar"), CliRunner()
    assert runner.invoke(cli, ["backup", archive]).exit_code == 0
    refused = runner.invoke(cli, ["backup", archive])
    assert refused.exit_code == 2
    assert runner.invoke(cli, ["restore", archive]).exit_code == 2
    fresh("sqlite")
    assert runner.invoke(cli, ["restore", archive]).exit_code == 0
    with database.reading() as db:
        assert db.scalar(select(Run.state)) == "succeeded"
