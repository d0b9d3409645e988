"""Files of several machines: what one publishes another reads, whole, and never a mix."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from app import file_store, files, storage
from app.errors import Damaged, NoRoom, NotFound, Unavailable
from app.settings import settings
from tests import servers

RUN, OTHER = "a1b2c3d4e5f6", "0123456789ab"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder; nothing here needs a database."""
    monkeypatch.setattr(settings, "home", str(tmp_path / "home"))
    return tmp_path / "home"


def _write(folder: Path, **contents: str) -> Path:
    storage.remove(folder)
    for name, content in contents.items():
        part = folder / name.replace("__", "/").replace("_json", ".json")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(content)
    return folder


def _read(folder: Path) -> dict[str, str]:
    return {str(part.relative_to(folder)): part.read_text() for part in storage.parts(folder)}


def _best(attempt: int, content: str) -> None:
    """An attempt's best state so far, saved and published."""
    folder = _write(storage.tuned_model_folder(RUN), weights=content, config_json=content)
    files.publish(folder, attempt)


def _stored() -> list[str]:
    system, root = fsspec.url_to_fs(settings.files_url, use_listings_cache=False)
    found = system.find(root)
    return sorted(path.partition(f"{root.rpartition('/')[2]}/")[2] for path in found)


def _object(ending: str) -> str:
    system, root = fsspec.url_to_fs(settings.files_url, use_listings_cache=False)
    [found] = [path for path in system.find(root) if path.endswith(ending)]
    return str(found)


def test_without_a_store_the_home_is_all_there_is(home: Path) -> None:
    folder = _write(storage.tuned_model_folder(RUN), weights="1")
    files.publish(folder, 1)
    assert files.tuned_model(RUN, 1) == folder
    assert files.dataset("nothing") == storage.dataset_file("nothing")
    files.remove(folder)
    assert not (home / "stamps").exists()


def test_a_file_goes_from_one_machine_to_another(
    shared_store: str, machines: servers.Machines
) -> None:
    machines.on("a")
    storage.dataset_file(OTHER).write_text("one\ntwo\n")
    files.publish(storage.dataset_file(OTHER))
    machines.on("b")
    assert not storage.dataset_file(OTHER).exists()
    assert files.dataset(OTHER) == storage.dataset_file(OTHER)
    assert files.dataset(OTHER).read_text() == "one\ntwo\n"
    assert [path.name for path in storage.dataset_file(OTHER).parent.iterdir()] == [
        f"{OTHER}.jsonl"
    ]


def test_a_folder_goes_with_what_lies_in_it(shared_store: str, machines: servers.Machines) -> None:
    machines.on("a")
    contents = {"config_json": "{}", "empty": "", "deep__down": "x" * 100_000}
    files.publish(_write(storage.base_model_folder(OTHER), **contents))
    machines.on("b")
    found = files.base_model(OTHER)
    assert _read(found) == {"config.json": "{}", "empty": "", "deep/down": "x" * 100_000}
    assert found.stat().st_mode & 0o077 == 0


def test_what_is_made_once_is_not_asked_for_again(
    shared_store: str, machines: servers.Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines.on("a")
    files.publish(_write(storage.base_model_folder(OTHER), config_json="{}"))
    machines.on("b")
    files.base_model(OTHER)
    monkeypatch.setattr(settings, "files_url", "file:///nowhere/at/all")
    assert _read(files.base_model(OTHER)) == {"config.json": "{}"}


def test_a_newer_version_replaces_the_older_everywhere(
    shared_store: str, machines: servers.Machines
) -> None:
    machines.on("a")
    _best(1, "first")
    machines.on("b")
    assert _read(files.tuned_model(RUN, 1))["weights"] == "first"
    machines.on("a")
    _best(1, "second")
    assert _read(files.tuned_model(RUN, 1))["weights"] == "second"
    machines.on("c")
    assert _read(files.tuned_model(RUN, 1)) == {"config.json": "second", "weights": "second"}
    assert len([name for name in _stored() if name.endswith("weights")]) == 1  # none is left over


def test_the_attempt_that_holds_the_run_decides(
    shared_store: str, machines: servers.Machines
) -> None:
    machines.on("a")
    _best(1, "of the first")
    machines.on("b")
    assert _read(files.tuned_model(RUN, 1))["weights"] == "of the first"
    _best(2, "of the second")
    machines.on("a")
    _best(1, "of the first, which does not know that it lost its run")
    for machine in "abc":
        machines.on(machine)
        assert _read(files.tuned_model(RUN, 2))["weights"] == "of the second"


def test_what_an_attempt_saved_but_could_not_publish_is_used_where_it_lies(
    shared_store: str, machines: servers.Machines
) -> None:
    machines.on("a")
    _best(1, "published")
    _write(storage.tuned_model_folder(RUN), weights="newer")  # and then its process was killed
    assert _read(files.tuned_model(RUN, 1)) == {"weights": "newer"}
    machines.on("b")
    assert _read(files.tuned_model(RUN, 1))["weights"] == "published"


def test_publishing_again_what_is_there_changes_nothing(
    shared_store: str, machines: servers.Machines
) -> None:
    machines.on("a")
    _best(1, "same")
    before = _stored()
    _best(1, "same")
    assert _stored() == before


def test_what_is_nowhere_is_said_to_be(shared_store: str, machines: servers.Machines) -> None:
    machines.on("a")
    _best(1, "something")
    with pytest.raises(NotFound, match=f"datasets/{OTHER}.jsonl is neither on this machine nor"):
        files.dataset(OTHER)
    with pytest.raises(NotFound):
        files.tuned_model(OTHER, 3)


def test_half_published_is_not_published(
    shared_store: str, machines: servers.Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines.on("a")
    _best(1, "whole")
    with monkeypatch.context() as patched:
        patched.setattr(file_store, "_write", lambda *_: 1 / 0)  # all but the manifest is there
        with pytest.raises(Unavailable):
            _best(2, "half")
    machines.on("b")
    assert _read(files.tuned_model(RUN, 2))["weights"] == "whole"


@pytest.mark.parametrize("harm", ["changed", "shorter", "gone"])
def test_damage_in_the_store_is_named_and_not_let_in(
    harm: str, shared_store: str, machines: servers.Machines
) -> None:
    machines.on("a")
    _best(1, "weights")
    system, _ = fsspec.url_to_fs(settings.files_url)
    if harm == "gone":
        system.rm(_object("/weights"))
    else:
        system.pipe_file(_object("/weights"), b"weighty" if harm == "changed" else b"w")
    machines.on("b")
    with pytest.raises(Damaged, match=f"runs/{RUN}/best in the file store is not what was"):
        files.tuned_model(RUN, 1)
    assert list(storage.run_folder(RUN).iterdir()) == []


def test_a_version_that_is_replaced_while_it_comes_is_not_damaged(
    shared_store: str, machines: servers.Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    get, replaced = file_store.get, []

    def overtaken(found: file_store.Published, parts: list[str], folder: Path) -> bool:
        if len(replaced) < 2 * files.TRIES:
            replaced.append(found.stamp)
            machines.on("a")
            _best(1, f"{len(replaced)}")
            machines.on("b")
        return get(found, parts, folder)

    machines.on("a")
    _best(1, "0")
    machines.on("b")
    monkeypatch.setattr(file_store, "get", overtaken)
    assert set(_read(files.tuned_model(RUN, 1)).values()) == {f"{2 * files.TRIES}"}
    assert len(set(replaced)) == 2 * files.TRIES


def test_a_manifest_leads_nowhere_else(shared_store: str, machines: servers.Machines) -> None:
    machines.on("a")
    _best(1, "weights")
    system, _ = fsspec.url_to_fs(settings.files_url)
    manifest = _object("best/0001/manifest.json")
    system.pipe_file(manifest, system.cat_file(manifest).replace(b'"weights"', b'"../../../token"'))
    machines.on("b")
    with pytest.raises(Damaged):
        files.tuned_model(RUN, 1)


def test_removal_is_for_everybody(shared_store: str, machines: servers.Machines) -> None:
    machines.on("a")
    _best(1, "weights")
    storage.dataset_file(OTHER).write_text("{}")
    files.publish(storage.dataset_file(OTHER))
    files.remove(storage.run_folder(RUN))
    assert not any(name.startswith("runs/") for name in _stored())
    machines.on("b")
    with pytest.raises(NotFound):
        files.tuned_model(RUN, 1)
    assert files.dataset(OTHER).read_text() == "{}"
    files.remove(storage.run_folder(RUN))  # gone already: nothing happens


def test_the_web_needs_no_weights(shared_store: str, machines: servers.Machines) -> None:
    machines.on("a")
    contents = {"tokenizer_json": "{}", "model.safetensors": "gigabytes"}
    files.publish(_write(storage.base_model_folder(OTHER), **contents))
    machines.on("web")
    assert _read(files.tokenizer(OTHER)) == {"tokenizer.json": "{}"}
    assert not storage.base_model_folder(OTHER).exists()
    machines.on("a")
    assert files.tokenizer(OTHER) == storage.base_model_folder(OTHER)


def test_of_several_processes_one_fetches(shared_store: str, machines: servers.Machines) -> None:
    machines.on("a")
    files.publish(_write(storage.base_model_folder(OTHER), weights="x" * 1_000_000))
    machines.on("b")
    script = f"from app import files, storage\nGO\nprint(storage.size(files.base_model('{OTHER}')))"
    assert servers.at_once(script, 3) == ["1000000\n"] * 3


def test_readers_never_see_a_mix_while_a_writer_publishes(
    shared_store: str, machines: servers.Machines
) -> None:
    machines.on("a")
    _best(1, "0")
    script = (
        "import sys; from app import files, storage\n"
        f"folder = storage.tuned_model_folder('{RUN}')\n"
        "for number in range(1, 1000):\n"
        "    for part in folder.iterdir(): part.write_text(str(number))\n"
        "    files.publish(folder, 1)\n"
        "    print(number, flush=True)\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=storage.REPOSITORY,
        stdout=subprocess.PIPE,
        preexec_fn=servers.die_with_tests,
    )
    try:
        assert writer.stdout
        assert writer.stdout.readline() == b"1\n"
        seen = set()
        end = time.monotonic() + 1.5
        while time.monotonic() < end or len(seen) < 3:
            machines.on(f"reader-{len(seen)}-{time.monotonic_ns()}")
            [content] = set(_read(files.tuned_model(RUN, 1)).values())
            seen.add(int(content))
    finally:
        writer.kill()
        writer.communicate()
    assert len(seen) >= 3


# --- A store that does not do what it should --------------------------------------------------


def test_a_folder_that_is_not_mounted_is_away_and_not_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "files_url", f"file://{tmp_path}/share")
    with pytest.raises(Unavailable, match="Is the folder mounted, the bucket's name right"):
        files.dataset(OTHER)


def test_a_server_that_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{servers.free_port()}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setattr(settings, "files_url", "s3://bucket/files")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    storage.dataset_file(OTHER).write_text("{}")
    began = time.monotonic()
    with pytest.raises(Unavailable) as said:
        files.publish(storage.dataset_file(OTHER))
    assert time.monotonic() - began < 10
    assert said.value.message.startswith("The file store s3://bucket/files cannot be reached")
    assert said.value.message.endswith("What was stored is safe.")
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (PermissionError("AccessDenied"), "refuses access. Check what the machine may do there"),
        (ImportError("Install s3fs", name="s3fs"), "install the studio with the extra `s3`"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (TimeoutError(), "cannot be reached, or broke off (TimeoutError"),
    ],
)
def test_what_is_wrong_is_said_in_words(
    error: Exception, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "files_url", f"file://{tmp_path}/share")
    storage.dataset_file(OTHER).write_text("{}")

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(LocalFileSystem, "put_file", fail)
    with pytest.raises(Unavailable) as said:
        files.publish(storage.dataset_file(OTHER))
    assert sentence in said.value.message


def test_no_password_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "files_url", "sftp://user:hidden@host/files")
    assert file_store.address() == "The file store sftp://host/files"


def test_a_full_disk_here_is_seen_before_anything_is_fetched(
    shared_store: str, machines: servers.Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines.on("a")
    _best(1, "weights")
    machines.on("b")
    monkeypatch.setattr(settings, "disk_reserve_mb", 2**40)
    with pytest.raises(NoRoom, match=r"fetch runs/a1b2c3d4e5f6/best .* takes 1 MB") as said:
        files.tuned_model(RUN, 1)
    assert said.value.needed == 14


def test_deleting_works_while_the_store_is_away(
    shared_store: str, machines: servers.Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines.on("a")
    _best(1, "weights")
    monkeypatch.setattr(file_store, "_files", lambda: 1 / 0)
    files.remove(storage.run_folder(RUN))
    assert not (Path(settings.home) / "runs" / RUN).exists()


def test_threads_may_fetch_at_once(shared_store: str, machines: servers.Machines) -> None:
    machines.on("a")
    files.publish(_write(storage.base_model_folder(OTHER), weights="x" * 1000))
    machines.on("b")
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(storage.size(files.base_model(OTHER))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1000] * 4
