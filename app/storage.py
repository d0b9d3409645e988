"""Where datasets, checkpoints and tuned models lie: the only module that joins paths.

Names on disk are ids made by the studio, never text from a user.
"""

import contextlib
import hashlib
import os
import secrets
import shutil
import tempfile
from pathlib import Path as Path  # re-exported: other modules may name the type, not join paths

from app.settings import settings

REPOSITORY = Path(__file__).resolve().parent.parent


def _folder(*parts: str) -> Path:
    path = Path(settings.home).expanduser().absolute().joinpath(*parts)
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def home() -> Path:
    """The home folder, made if it is missing; nobody else may look into it."""
    return _folder()


def database_file() -> Path:
    """The SQLite file."""
    return home() / "studio.sqlite"


def lock_file() -> Path:
    """Held by the one studio that runs on this home folder."""
    return home() / "studio.lock"


def dataset_file(dataset_id: str) -> Path:
    """A dataset's examples as JSONL, one `{"input", "output"}` a line."""
    return _folder("datasets") / f"{dataset_id}.jsonl"


def upload_file() -> Path:
    """A new temporary file on the same file system as the datasets."""
    return _folder("datasets") / f".upload-{secrets.token_hex(8)}"


def models_folder() -> Path:
    """Where a person may put model folders of their own."""
    return _folder("models")


def base_model_folder(base_model_id: str) -> Path:
    """A base model ready for use: safetensors, config, tokenizer. Not made here."""
    return _folder("base_models") / base_model_id


def run_folder(run_id: str) -> Path:
    """All that a run leaves."""
    return _folder("runs", run_id)


def files_of_run(run_id: str) -> Path:
    """The same folder, not made here."""
    return _folder("runs") / run_id


def checkpoints_folder(run_id: str) -> Path:
    """A run's checkpoints, one folder each, and the best state so far."""
    return _folder("runs", run_id, "checkpoints")


def checkpoint_folder(run_id: str, step: int, attempt: int) -> Path:
    """One checkpoint; the attempt is in its name, so that none overwrites another's. Not made here."""
    return checkpoints_folder(run_id) / f"{step:08d}-{attempt:04d}"


def tuned_model_folder(run_id: str) -> Path:
    """What is kept, scored and prompted: the state with the best validation loss. Not made here."""
    return run_folder(run_id) / "best"


def last_model_folder(run_id: str) -> Path:
    """The state after the last step. Not made here."""
    return run_folder(run_id) / "last"


def whole_model_folder(run_id: str) -> Path:
    """The tuned model merged into one set of weights, once asked for. Not made here."""
    return run_folder(run_id) / "whole"


def tokenizer_folder(base_model_id: str) -> Path:
    """A copy of a base model without its weights, where no more is needed. Not made here."""
    return _folder("tokenizers") / base_model_id


def stamp_file(path: Path) -> Path:
    """Says of a copy from the file store which version it is; locked while it is fetched."""
    return _folder("stamps") / "-".join(path.relative_to(home()).parts)


def crash_mark(name: str) -> Path:
    """Says that a process has died at this crash point, which it does once."""
    return _folder("crashes") / name


def free() -> int:
    """Bytes that are free on the disk of the home folder."""
    return shutil.disk_usage(home()).free


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put(source: Path, target: Path) -> None:
    """Give a file its name, for good: it has it on the disk too before this returns."""
    source.replace(target)
    sync(target.parent)


def entries(what: str) -> list[Path]:
    """What lies in a folder of the home: datasets, base_models, runs or logs."""
    return sorted(_folder(what).iterdir())


def log_file(name: str) -> Path:
    """A process's log."""
    return _folder("logs") / f"{name}.log"


def examples_file(name: str) -> Path:
    """One of the example sets that the studio ships."""
    return REPOSITORY / "examples" / name


def templates_folder() -> Path:
    """The Jinja templates."""
    return REPOSITORY / "templates"


def static_folder() -> Path:
    """Stylesheet and scripts; `vendor/` in it holds the installed browser files."""
    return REPOSITORY / "static"


def migrations_folder() -> Path:
    """Alembic's scripts."""
    return REPOSITORY / "migrations"


def socket_folder() -> Path:
    """A private folder for the embedded Valkey, short enough for a unix socket's 107 bytes."""
    path = home() / "valkey"
    if len(str(path)) > 80:
        name = hashlib.sha256(str(path).encode()).hexdigest()[:16]
        path = Path(tempfile.gettempdir()) / f"studio-{os.getuid()}-{name}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.stat().st_uid != os.getuid() or path.stat().st_mode & 0o077:
        raise PermissionError(f"{path} must belong to this user alone (mode 0700).")
    return path


def token_file() -> Path:
    """Where the access token is kept, unless it is set."""
    return home() / "token"


def token() -> str:
    """The access token: the one set, else one made once and kept with mode 0600."""
    if settings.token:
        return settings.token
    path = token_file()
    if not path.exists():
        descriptor, made = tempfile.mkstemp(dir=home())  # mode 0600
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(24))
        with contextlib.suppress(FileExistsError):  # another process was first: its token holds
            os.link(made, path)  # all at once: nobody may ever read an empty token
        os.unlink(made)
    return path.read_text().strip()


def size(path: Path) -> int:
    """Bytes that a file, or all files of a folder, take; 0 if it is gone."""
    total = 0
    for part in [path] if path.is_file() else parts(path):
        with contextlib.suppress(FileNotFoundError):  # gone since it was listed
            total += part.stat().st_size
    return total


def parts(folder: Path) -> list[Path]:
    """All files in the folder and in those within it, in the order of their names."""
    return sorted(part for part in folder.rglob("*") if part.is_file())


def settle(new: Path, final: Path) -> None:
    """Give a file or folder its name, in place of what stood there, once it is on the disk."""
    for path in [*parts(new), new]:
        sync(path)
    if final.is_dir():
        remove(final)
    put(new, final)


def inside(folder: Path, name: str) -> Path:
    """The place in the folder that a relative name gives. Raises ValueError if it is outside."""
    pieces = name.split("/")
    plain = all(piece.isprintable() and "\\" not in piece for piece in pieces)
    if not plain or {"", ".", ".."} & set(pieces):
        raise ValueError(f"{name!r} is no place in a folder")
    return folder.joinpath(*pieces)


def passing_folder(what: str) -> Path:
    """A new folder in the home folder for work that ends by removing it."""
    return Path(tempfile.mkdtemp(prefix=f".{what}-", dir=home()))


def home_name(path: Path) -> str:
    """How a file is called within the home folder."""
    return path.relative_to(home()).as_posix()


def remove(path: Path) -> None:
    """Delete a file or a folder; nothing happens if it is gone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def users_file(name: str) -> Path:
    """A file that the user of the command line named."""
    return Path(name).expanduser()


def copy(source: Path, target: Path) -> None:
    """Copy a file's content."""
    shutil.copyfile(source, target)
