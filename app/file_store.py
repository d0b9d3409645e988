"""The store that several machines share: what was published in it, and what is wrong with it in words.

Any file system that fsspec knows will do: S3, a shared folder. Such a store has no rename of
folders. So the files of one publishing lie in a folder of their own, and the manifest that names it
is written last: who reads the manifest finds all of them, and never a mix of two versions.

    runs/<id>/best/0002/manifest.json     by the run's second attempt; 0000 where none counts
    runs/<id>/best/0002/<random>/...      the files that the manifest lists
"""

import contextlib
import hashlib
import json
import secrets
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.dirfs import DirFileSystem

from app.errors import StudioError, Unavailable
from app.settings import settings
from app.storage import Path

MANIFEST, MARK = "manifest.json", "studio.json"
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        "use_listings_cache": False,  # other machines write there too
        "config_kwargs": {
            "connect_timeout": 5,
            "read_timeout": 60,
            "retries": {"mode": "standard", "max_attempts": 2},
        },
    },
    "file": {"auto_mkdir": True},
}


class Published(NamedTuple):
    """What a manifest says: where the files lie, and their sizes and sha256 by name."""

    key: str  # ends with the number of the attempt
    folder: str
    is_file: bool
    contents: dict[str, dict[str, Any]]

    @property
    def stamp(self) -> str:
        """Says of a copy which version it is, beginning with the attempt."""
        return f"{self.key.rpartition('/')[2]} {self.folder}"


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    """Say in words what is wrong with the store."""
    try:
        yield
    except StudioError:
        raise
    except PermissionError as error:
        raise Unavailable(
            f"{address()} refuses access. Check what the machine may do there and its "
            "credentials. What was stored is safe."
        ) from error
    except ImportError as error:
        raise Unavailable(
            f"{address()} needs a package that is not installed ({error.name}); for S3 install "
            "the studio with the extra `s3`."
        ) from error
    except Exception as error:  # each file system and its HTTP library has kinds of its own
        raise Unavailable(
            f"{address()} cannot be reached, or broke off ({type(error).__name__}: "
            f"{str(error)[:200]}). What was stored is safe."
        ) from error


@_in_words()
def put(name: str, attempt: int, is_file: bool, parts: dict[str, Path]) -> Published:
    """Publish these files under the name: files first, then the manifest, all at once.

    What the attempt had published there before goes then, and what earlier ones left.
    """
    files, root = _files(), f"{name}/{attempt:04d}"
    contents = {part: digest(path) for part, path in parts.items()}
    before = made = _read(files, root)
    if made is None or made.contents != contents:
        made = Published(root, secrets.token_hex(6), is_file, contents)
        for part, path in parts.items():
            files.put_file(str(path), f"{root}/{made.folder}/{part}")
        _write(files, MARK, {"note": "The file store of a studio."})
        _write(files, f"{root}/{MANIFEST}", made._asdict())
    old = [f"{name}/{one}" for one in _attempts(files, name, attempt - 1)]
    if before and before.folder != made.folder:
        old.append(f"{root}/{before.folder}")
    for one in old:
        with contextlib.suppress(Exception):  # it goes with its run; what was published is there
            files.rm(one, recursive=True)
    return made


@_in_words()
def newest(name: str, attempt: int) -> Published | None:
    """What the newest attempt up to this one published under the name."""
    files = _files()
    for number in _attempts(files, name, attempt):
        if found := _read(files, f"{name}/{number}"):
            return found
    if not files.exists(MARK):
        raise Unavailable(
            f"{address()} holds nothing of a studio. Is the folder mounted, the bucket's name "
            "right? What was stored is safe."
        )
    return None


@_in_words()
def get(found: Published, parts: Iterable[str], folder: Path) -> bool:
    """Download these files of it; whether all are there, and as they were published."""
    files = _files()
    for part in parts:
        path = folder / part
        if not path.resolve().is_relative_to(folder.resolve()):
            return False  # no manifest of ours says that
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            files.get_file(f"{found.key}/{found.folder}/{part}", str(path))
        except FileNotFoundError:  # replaced at this moment, or lost
            return False
        if digest(path) != found.contents[part]:
            return False
    return True


@_in_words()
def remove(name: str) -> None:
    """Delete all that was published under the name."""
    with contextlib.suppress(FileNotFoundError):
        _files().rm(name, recursive=True)


def digest(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    with path.open("rb") as file:
        hashed = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": hashed}


def address() -> str:
    """How the store is called in a sentence; a password in its URL is nobody's business."""
    parts = urlsplit(settings.files_url)
    return f"The file store {parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _files() -> Any:
    """The studio's folder in the store as a file system of its own."""
    options = _OPTIONS.get(urlsplit(settings.files_url).scheme, {})
    system, root = fsspec.url_to_fs(settings.files_url, **options)
    return DirFileSystem(root.rstrip("/"), system)


def _names(files: Any, name: str) -> list[str]:
    try:
        return [found.rstrip("/").rpartition("/")[2] for found in files.ls(name, detail=False)]
    except FileNotFoundError:
        return []


def _attempts(files: Any, name: str, last: int) -> list[str]:
    """The attempts up to the last that put something there, whole or not; the newest first."""
    numbers = [one for one in _names(files, name) if one.isdigit() and int(one) <= last]
    return sorted(numbers, reverse=True)


def _read(files: Any, key: str) -> Published | None:
    try:
        return Published(**json.loads(files.cat_file(f"{key}/{MANIFEST}")))
    except FileNotFoundError:
        return None


def _write(files: Any, key: str, content: dict[str, Any]) -> None:
    """All at once: on a shared folder by a rename, on S3 an object comes into being whole."""
    new = f"{key}.{secrets.token_hex(6)}"
    files.pipe_file(new, json.dumps(content).encode())
    files.mv(new, key)
