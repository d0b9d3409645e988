"""Restore of a backup: verified whole before anything is touched, then put in place."""

import contextlib
import hashlib
import json
import os
import re
import tarfile
from typing import Any, NamedTuple

from sqlalchemy import Connection, inspect, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app import (
    base_models,
    completions,
    database,
    migrate,
    runs,
    snapshots,
    storage,
    supervisor,
    tuned_models,
    workers,
)
from app.backups import FORMAT, MANIFEST, SEAL, Tell
from app.errors import Conflict, Invalid, Unavailable
from app.storage import Path
from app.tables import Run

FOLDERS = ("datasets", "base_models", "runs")
_NAME = re.compile(r"tables/[a-z_]+\.jsonl|home/(token|(datasets|base_models|runs)/.+)")
_LARGEST_MANIFEST = 1 << 28
_RESTORED = (
    "The studio was restored from a backup. Back in the queue; it goes on from what was saved."
)


class Restored(NamedTuple):
    """What was restored."""

    made_at: float
    num_files: int
    num_rows: int
    requeued: int  # runs that were at work when the backup was made


def restore(source: Path, *, replace: bool, tell: Tell) -> Restored:
    """Put the backup in the place of an empty studio, or with `replace` of the one that is there.

    Raises Conflict if a studio runs here or has something, Invalid if the file is not whole.
    """
    if not source.is_file():
        raise Invalid(f"There is no file {source}.")
    with supervisor.only_one():
        _refuse_company()
        if not replace:
            _refuse_filled()
        folder = storage.passing_folder("restore")
        try:
            manifest = _unpack(source, folder, tell)
            requeued = _put_in_place(folder, manifest["revision"])
        except OSError as error:
            raise Unavailable(
                f"The backup could not be restored: {error.strerror or error}. It is as it was: "
                "see to the reason, then restore it again with --replace."
            ) from error
        finally:
            storage.remove(folder)
    rows = sum(manifest["rows"].values())
    return Restored(manifest["made_at"], len(manifest["files"]), rows, requeued)


def _refuse_company() -> None:
    """Workers and web processes of their own hold no lock, but workers beat."""
    with contextlib.suppress(SQLAlchemyError):  # no database yet, or no tables
        with database.reading() as db:
            found = workers.alive(db)
        if found:
            raise Conflict(
                f"{len(found)} worker(s) of this studio were alive just now, such as {found[0].id}. "
                "End them, wait half a minute, and restore again. Nothing was changed."
            )


def _refuse_filled() -> None:
    filled = [name for name in FOLDERS if storage.entries(name)]
    with database.engine().connect() as connection:
        for name in inspect(connection).get_table_names():
            table = database.Table.metadata.tables.get(name)
            if table is not None and connection.execute(select(table).limit(1)).first():
                filled.append(f"the table {name}")
    if filled:
        raise Conflict(
            f"There is a studio in {storage.home()} already ({', '.join(filled[:4])}). Nothing was "
            "changed. Choose an empty home folder, or say --replace to give up what is there."
        )


def _unpack(source: Path, folder: Path, tell: Tell) -> dict[str, Any]:
    """Every file of the archive, each exactly as its manifest says; the manifest. Raises Invalid."""
    try:
        with tarfile.open(source, "r:") as archive:
            members = {member.name: member for member in archive.getmembers()}
            manifest = _manifest(archive, members)
            listed = manifest["files"]
            if set(members) != {*listed, MANIFEST, SEAL}:
                raise ValueError("its files are not those of its list")
            total, done = sum(entry["size"] for entry in listed.values()), 0
            _check_room(total)
            for name, entry in listed.items():
                _unpack_one(archive, members[name], entry, folder)
                done += entry["size"]
                tell(done, total)
    except (tarfile.TarError, ValueError, KeyError, TypeError, EOFError) as error:
        raise Invalid(
            f"{source} is not a whole backup of a studio: {str(error) or type(error).__name__}. "
            "Nothing was changed. Use another backup."
        ) from error
    return manifest


def _manifest(archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> dict[str, Any]:
    content, seal = (_read(archive, members[name]) for name in (MANIFEST, SEAL))
    if hashlib.sha256(content).hexdigest() != seal.decode():
        raise ValueError("its list of files is damaged")
    manifest: dict[str, Any] = json.loads(content)
    if manifest["format"] != FORMAT or not migrate.is_known(manifest["revision"]):
        raise ValueError("it was made by a newer version, which you need to restore it")
    return manifest


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member) if member.size <= _LARGEST_MANIFEST else None
    if file is None:
        raise ValueError(f"{member.name} is no file")
    return file.read()


def _check_room(total: int) -> None:
    if storage.free() < total:
        raise Unavailable(
            f"The backup needs {total / 1e9:.1f} GB and {storage.free() / 1e9:.1f} GB are free. "
            "Nothing was changed; make room and try again."
        )


def _unpack_one(
    archive: tarfile.TarFile, member: tarfile.TarInfo, entry: dict[str, Any], folder: Path
) -> None:
    """Raises ValueError for a link, for a place outside the folder, and for another content."""
    if not member.isreg() or not _NAME.fullmatch(member.name):
        raise ValueError(f"{member.name!r} does not belong into a backup")
    path = storage.inside(folder, member.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    source, digest = archive.extractfile(member), hashlib.sha256()
    assert source is not None
    with path.open("xb") as target:
        while data := source.read(1 << 20):
            digest.update(data)
            target.write(data)
    if (member.size, digest.hexdigest()) != (entry["size"], entry["sha256"]):
        raise ValueError(f"{member.name} is not what was written")


def _put_in_place(folder: Path, revision: str) -> int:
    """Fill the database beside, give the files their names, then let it count; how many runs went
    back. Whatever fails before the files get their names changes nothing.
    """
    new, tables = storage.inside(folder, "studio.sqlite"), storage.inside(folder, "tables")
    if database.engine().dialect.name == "postgresql":
        with database.engine().connect() as connection:
            _drop_all(connection)
            _fill(connection, tables, revision)
            _swap_files(folder)
            connection.commit()
            return _calm(connection)
    with snapshots.sqlite(new) as connection:
        _fill(connection, tables, revision)
        connection.commit()
        requeued = _calm(connection)
    database.engine().dispose()
    _swap_files(folder)
    file = storage.database_file()
    for left in sorted(file.parent.glob(f"{file.name}*")):  # and what SQLite writes beside it
        left.replace(storage.inside(folder, f"old/{left.name}"))
    new.replace(file)
    return requeued


def _swap_files(folder: Path) -> None:
    """Into the home folder; what was there goes aside."""
    os.sync()  # what was unpacked is on the disk before anything else goes
    storage.inside(folder, "old").mkdir()
    for name in (*FOLDERS, "token"):
        new, place = storage.inside(folder, f"home/{name}"), storage.inside(storage.home(), name)
        if place.exists() and (new.exists() or name in FOLDERS):
            place.rename(storage.inside(folder, f"old/{name}"))
        if new.exists():
            new.rename(place)


def _drop_all(connection: Connection) -> None:
    """The studio's own tables; what else is in the database stays."""
    found = snapshots.tables(connection)
    for name in reversed(list(found)):
        if name in database.Table.metadata.tables or name == "alembic_version":
            found[name].drop(connection)


def _fill(connection: Connection, tables: Path, revision: str) -> None:
    migrate.build(connection, revision)
    snapshots.load(connection, tables)
    migrate.build(connection, "head")


def _calm(connection: Connection) -> int:
    """Nobody works on anything now; how many runs go back into the queue."""
    with Session(connection, expire_on_commit=False) as db:
        held = db.execute(select(Run.id, Run.attempt).where(Run.state.in_(runs.HELD))).all()
        for run_id, attempt in held:
            runs.settle(db, run_id, attempt, _RESTORED)
        completions.fail_orphans(db, [])
        tuned_models.free_orphans(db, [])
        base_models.free_orphans(db, [])
    return len(held)
