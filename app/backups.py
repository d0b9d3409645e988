"""Backup of the whole studio into one file, while it runs."""

import contextlib
import hashlib
import io
import json
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from sqlalchemy import Connection, select

from app import files, runs, snapshots, storage
from app.errors import Conflict, Damaged, NotFound, Unavailable
from app.registry import is_good
from app.settings import settings
from app.storage import Path

FORMAT = 1
MANIFEST, SEAL = "manifest.json", "manifest.json.sha256"
SECRET = {"token", "webhook_secret", "webhook_url", "database_url", "redis_url", "home"}
SPARE = {"last", "whole"}  # what a run can do without
_TRIES = 5

Tell = Callable[[int, int], None]  # bytes done, bytes in all


class Saved(NamedTuple):
    """What a backup holds; `missing`: a sentence for each file that should have been there."""

    num_files: int
    num_bytes: int
    missing: list[str]


class _Vanished(Exception):
    """A checkpoint was pruned before it could be held: look again."""


class _Held(NamedTuple):
    """The files that the rows name, under second names, and the checkpoints among them."""

    checkpoints: set[tuple[str, int, int]]  # run, step, attempt
    missing: list[str]


def save(target: Path, tell: Tell) -> Saved:
    """Write the backup. Raises Conflict if the file is there; a backup that fails leaves none."""
    if target.exists():
        raise Conflict(f"{target} is there already, and was left as it is. Choose another name.")
    half = target.with_name(f".{target.name}.part")
    for attempt in range(_TRIES):
        folder = storage.passing_folder("backup")
        try:
            saved = _save(folder, half, tell, last_try=attempt == _TRIES - 1)
            half.replace(target)
            return saved
        except _Vanished:
            time.sleep(0.2 * attempt)
        except OSError as error:
            raise Unavailable(
                f"The backup could not be written: {error.strerror or error}. Nothing was changed "
                "in the studio; make room or choose another place, and try again."
            ) from error
        finally:
            storage.remove(folder)
            storage.remove(half)
    raise AssertionError("the last try accepts what it finds")


def _save(folder: Path, half: Path, tell: Tell, last_try: bool) -> Saved:
    tables = storage.inside(folder, "tables")
    tables.mkdir()
    with snapshots.frozen() as connection:
        # Under a second name each file stays as it is now, whatever the studio does meanwhile.
        held = _hold(connection, storage.inside(folder, "home"), last_try)
        counts = snapshots.dump(connection, tables, lambda table, row: _wanted(held, table, row))
        head = {
            "format": FORMAT,
            "made_at": time.time(),
            "revision": snapshots.revision(connection),
            "database": connection.dialect.name,
            "rows": counts,
            "settings": settings.model_dump(exclude=SECRET),
        }
    contents = [(path.relative_to(folder).as_posix(), path) for path in storage.parts(folder)]
    total = _write(half, contents, head, tell)
    return Saved(len(contents), total, held.missing)


def _wanted(held: _Held, table: str, row: Any) -> bool:
    """Of checkpoints only those whose files are here."""
    return table != "checkpoint" or (row.run_id, row.step, row.attempt) in held.checkpoints


def _hold(connection: Connection, folder: Path, last_try: bool) -> _Held:
    tables = snapshots.tables(connection)
    checkpoints, lost = _hold_checkpoints(connection, tables, folder)  # they do not stay for long
    if lost and not last_try:
        raise _Vanished
    missing = [f"The run {run_id} has no good checkpoint: it would begin anew." for run_id in lost]
    for name, path, attempt in _named(connection, tables):
        with contextlib.suppress(NotFound, Damaged):  # what lies on another machine is brought here
            files.fetch(path, attempt)
        if not _hold_all(path, folder) and path.name not in SPARE:
            missing.append(f"{name} has no file, so the backup has none of it either.")
    if not settings.token:
        storage.token()
        _hold_all(storage.token_file(), folder)
    return _Held(checkpoints, missing)


def _named(connection: Connection, tables: Any) -> Iterator[tuple[str, Path, int]]:
    """What is there by the rows: a name for a person, the file or folder, and its attempt."""
    for one in connection.execute(select(tables["dataset"])):
        yield f"The dataset {one.name!r}", storage.dataset_file(one.id), 0
    base_model = tables["base_model"]
    for one in connection.execute(select(base_model).where(base_model.c.state == "ready")):
        yield f"The base model {one.name!r}", storage.base_model_folder(one.id), 0
    for one in connection.execute(select(tables["run"])):
        for part in _parts(one):
            yield f"The run {one.id}", storage.files_of_run(one.id) / part, one.attempt


def _parts(run: Any) -> list[str]:
    if run.deleted_at is not None:
        return []
    if run.state != "succeeded":
        return ["best"] if (storage.files_of_run(run.id) / "best").exists() else []
    return ["best", "last", *(["whole"] if run.whole_state == "ready" else [])]


def _hold_all(path: Path, folder: Path) -> bool:
    """Hold the file, or all files of the folder; false if there is none."""
    found = storage.parts(path) if path.is_dir() else [path]
    try:
        for file in found:
            _hold_one(file, storage.inside(folder, storage.home_name(file)))
    except FileNotFoundError:
        storage.remove(storage.inside(folder, storage.home_name(path)))
        return False
    return bool(found)


def _hold_one(file: Path, second: Path) -> None:
    second.parent.mkdir(parents=True, exist_ok=True)
    try:
        second.hardlink_to(file)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links
        storage.copy(file, second)


def _hold_checkpoints(
    connection: Connection, tables: Any, folder: Path
) -> tuple[set[tuple[str, int, int]], set[str]]:
    """The newest good one of each run that has not ended: from there it can go on.

    And the runs of which there should be one, but is none.
    """
    if "checkpoint" not in tables:  # of an older version
        return set(), set()
    run, checkpoint = tables["run"], tables["checkpoint"]
    query = select(checkpoint).join(run).where(run.c.state.not_in(runs.FINAL))
    found = connection.execute(
        query.order_by(checkpoint.c.step.desc(), checkpoint.c.attempt.desc())
    )
    wanted: set[str] = set()
    held: dict[str, tuple[str, int, int]] = {}
    for one in found:
        wanted.add(one.run_id)
        path = storage.checkpoint_folder(one.run_id, one.step, one.attempt)
        if one.run_id not in held and is_good(path, one.digest) and _hold_all(path, folder):
            held[one.run_id] = (one.run_id, one.step, one.attempt)
    return set(held.values()), wanted - set(held)


class _Hashing(io.RawIOBase):
    """Reads a file, and knows the hash of what was read."""

    def __init__(self, file: Any, told: Callable[[int], None]) -> None:
        self.file, self.told = file, told
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """Up to that many bytes."""
        data: bytes = self.file.read(size)
        self.digest.update(data)
        self.told(len(data))
        return data


def _write(half: Path, contents: list[tuple[str, Path]], head: dict[str, Any], tell: Tell) -> int:
    """The archive: files, then the manifest with their hashes, then the manifest's own hash."""
    total, done = sum(storage.size(path) for _, path in contents), 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        tell(done, total)

    listed: dict[str, Any] = {}
    descriptor = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", bufsize=1 << 20) as archive:
            for name, path in contents:
                info = tarfile.TarInfo(name)
                info.size = storage.size(path)
                with path.open("rb") as source:
                    reading = _Hashing(source, more)
                    archive.addfile(info, reading)
                listed[name] = {"size": info.size, "sha256": reading.digest.hexdigest()}
            manifest = json.dumps(head | {"files": listed}, indent=1).encode()
            seal = hashlib.sha256(manifest).hexdigest().encode()
            for name, content in ((MANIFEST, manifest), (SEAL, seal)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        file.flush()
        os.fsync(file.fileno())
    return total
