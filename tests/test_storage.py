"""Where things lie: in the home folder alone, private, under names made by the studio."""

import stat
from pathlib import Path

import pytest

from app import storage
from app.settings import settings
from app.tables import new_id
from tests.servers import at_once


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder that is not there yet."""
    monkeypatch.setattr(settings, "home", str(tmp_path / "home"))
    monkeypatch.setattr(settings, "token", "")
    return tmp_path / "home"


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_home_is_for_its_owner_alone(bare: Path) -> None:
    assert storage.home() == bare
    assert _mode(bare) == 0o700


def test_everything_lies_in_the_home(bare: Path) -> None:
    key = new_id()
    places = [
        storage.database_file(),
        storage.lock_file(),
        storage.dataset_file(key),
        storage.upload_file(),
        storage.models_folder(),
        storage.base_model_folder(key),
        storage.run_folder(key),
        storage.checkpoints_folder(key),
        storage.tuned_model_folder(key),
        storage.last_model_folder(key),
        storage.whole_model_folder(key),
        storage.log_file("web"),
    ]
    assert len(set(places)) == len(places)
    assert all(bare in place.parents for place in places)
    assert all(place.is_absolute() for place in places)
    assert all(place.parent.is_dir() for place in places)
    for made_later in (
        storage.tuned_model_folder(key),
        storage.last_model_folder(key),
        storage.whole_model_folder(key),
        storage.base_model_folder(key),
    ):
        assert not made_later.exists()


def test_uploads_never_share_a_name(bare: Path) -> None:
    assert len({storage.upload_file() for _ in range(100)}) == 100


def test_ids_are_safe_as_file_names() -> None:
    for _ in range(100):
        assert len(new_id()) == 12
        assert set(new_id()) <= set("0123456789abcdef")


def test_what_comes_with_the_studio_is_there() -> None:
    assert storage.templates_folder().is_dir()
    assert storage.static_folder().is_dir()
    assert (storage.migrations_folder() / "env.py").is_file()
    assert storage.examples_file("support_tickets.jsonl").is_file()


def test_a_token_is_made_once_and_kept_private(bare: Path) -> None:
    made = storage.token()
    assert len(made) >= 24
    assert storage.token() == made
    assert _mode(bare / "token") == 0o600
    assert [path.name for path in bare.iterdir()] == ["token"]


def test_the_token_set_is_the_token(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = storage.token()
    monkeypatch.setattr(settings, "token", "chosen")
    assert storage.token() == "chosen" != made


def test_processes_that_start_at_once_have_one_token(bare: Path) -> None:
    """An empty one, read while another process was writing it, would let everybody in."""
    said = at_once("from app import storage\nGO\nprint(storage.token())", 4)
    tokens = {out.strip() for out in said}
    assert tokens == {storage.token()}
    assert "" not in tokens
    assert [path.name for path in bare.iterdir()] == ["token"]


def test_size_and_removal(bare: Path) -> None:
    folder = storage.run_folder("r1")
    (folder / "best").mkdir()
    (folder / "best" / "weights").write_bytes(b"x" * 1000)
    (folder / "note").write_bytes(b"x" * 24)
    assert storage.size(folder) == 1024
    assert storage.size(folder / "note") == 24
    storage.remove(folder / "note")
    storage.remove(folder)
    assert not folder.exists()
    storage.remove(folder)  # gone already: nothing happens
    storage.remove(bare / "nothing")


def test_a_link_is_removed_and_not_what_it_leads_to(bare: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("precious")
    (storage.home() / "link").symlink_to(kept)
    storage.remove(storage.home() / "link")
    assert (kept / "file").read_text() == "precious"
    assert not (storage.home() / "link").is_symlink()


def test_files_of_the_user(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.users_file("~/mine.jsonl") == tmp_path / "mine.jsonl"
    source = tmp_path / "mine.jsonl"
    source.write_text("{}")
    storage.copy(source, storage.home() / "copy")
    assert (storage.home() / "copy").read_text() == "{}"
