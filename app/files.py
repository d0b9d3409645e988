"""Files that several machines share: published when they are whole, fetched when they are needed.

With STUDIO_FILES_URL set each machine's home folder is a cache of that store; without it nothing
happens here, and the home folder is all there is.
"""

import contextlib
import fcntl
import logging
from collections.abc import Iterator

from app import file_store, storage
from app.errors import Damaged, NoRoom, NotFound, Unavailable
from app.file_store import Published
from app.settings import settings
from app.storage import Path

TRIES = 3
log = logging.getLogger(__name__)


def dataset(dataset_id: str) -> Path:
    """A dataset's examples, fetched if they are not here."""
    return fetch(storage.dataset_file(dataset_id))


def base_model(base_model_id: str) -> Path:
    """A base model, weights and all."""
    return fetch(storage.base_model_folder(base_model_id))


def tokenizer(base_model_id: str) -> Path:
    """A folder with what prompts are made with: the base model's, or a copy without its weights."""
    whole = storage.base_model_folder(base_model_id)
    if not settings.files_url or whole.exists():
        return whole
    return _fetched(whole, 0, storage.tokenizer_folder(base_model_id), weights=False)


def tuned_model(run_id: str, attempt: int) -> Path:
    """The best state that the run's attempts left, up to the one given."""
    return fetch(storage.tuned_model_folder(run_id), attempt)


def last_model(run_id: str, attempt: int) -> Path:
    """The state after the last step."""
    return fetch(storage.last_model_folder(run_id), attempt)


def whole_model(run_id: str, attempt: int) -> Path:
    """The merged model."""
    return fetch(storage.whole_model_folder(run_id), attempt)


def publish(path: Path, attempt: int = 0) -> None:
    """Put a file or folder of the home, which is whole, into the store.

    `attempt`: of the run that it belongs to. What it publishes replaces what it had published
    before, and is passed over once a later attempt has published: an attempt that lost its run
    changes nothing. 0: for what is made once. Raises Unavailable.
    """
    if not settings.files_url:
        return
    if path.is_file():
        parts = {path.name: path}
    else:
        parts = {part.relative_to(path).as_posix(): part for part in storage.parts(path)}
    made = file_store.put(_name(path), attempt, path.is_file(), parts)
    storage.stamp_file(path).write_text(made.stamp)


def fetch(path: Path, attempt: int = 0) -> Path:
    """See to it that the newest version up to this attempt is at `path`; gives the path.

    The store is not asked where that can be told without it. Raises NotFound if it is neither here
    nor there, Damaged if what is there is not what was published, NoRoom, and Unavailable.
    """
    return _fetched(path, attempt, path) if settings.files_url else path


def is_published(path: Path, attempt: int = 0) -> bool:
    """Whether the store has it. Raises Unavailable."""
    return bool(settings.files_url and file_store.newest(_name(path), attempt))


def remove(path: Path) -> None:
    """Delete a file or folder here and in the store. A store that is away at that moment keeps it."""
    storage.remove(path)
    if not settings.files_url:
        return
    storage.remove(storage.stamp_file(path))
    try:
        file_store.remove(_name(path))
    except Unavailable as error:
        log.warning("%s is deleted, but not from the file store: %s", _name(path), error.message)


def _name(path: Path) -> str:
    return path.relative_to(storage.home()).as_posix()


def _fetched(path: Path, attempt: int, target: Path, *, weights: bool = True) -> Path:
    if _is_here(target, attempt):
        return target
    tried: list[str] = []  # versions; one that is replaced while it comes is not damaged
    with _alone(target):
        while len(tried) < TRIES or len(set(tried[-TRIES:])) > 1:
            if _is_here(target, attempt):  # another process was first
                return target
            found = file_store.newest(_name(path), attempt)
            if target.exists() and (found is None or found.stamp == _stamp(target)):
                return target
            if found is None:
                raise NotFound(f"{_name(path)} is neither on this machine nor in the file store.")
            if _brought(found, target, weights):
                storage.stamp_file(target).write_text(found.stamp)
                return target
            tried.append(found.stamp)
    raise Damaged(
        f"{_name(path)} in the file store is not what was published: files of it are missing or "
        "have changed."
    )


def _is_here(target: Path, attempt: int) -> bool:
    """Whether the copy is the newest for sure: what is made once never changes, and after this
    very attempt's own nothing newer counts.
    """
    return target.exists() and (attempt == 0 or _stamp(target).startswith(f"{attempt:04d} "))


def _stamp(target: Path) -> str:
    stamp = storage.stamp_file(target)
    return stamp.read_text() if stamp.exists() else ""


def _brought(found: Published, target: Path, weights: bool) -> bool:
    """Download beside the target, and give it its name if all is as it was published."""
    wanted = [name for name in found.contents if weights or not name.endswith(".safetensors")]
    needed = sum(found.contents[name]["size"] for name in wanted)
    if needed > storage.free() - settings.disk_reserve_mb * 2**20:
        raise NoRoom(
            f"The disk of the home folder is too full to fetch {_name(target)} from the file store, "
            f"which takes {-(-needed // 2**20):,} MB.",
            needed,
        )
    new = target.with_name(f".{target.name}.fetched")
    storage.remove(new)
    new.mkdir(mode=0o700)
    try:
        if not file_store.get(found, wanted, new):
            return False
        storage.settle(new / wanted[0] if found.is_file else new, target)
    finally:
        storage.remove(new)
    return True


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Of the processes of this machine one fetches; the others wait and find it there."""
    with storage.stamp_file(target).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
