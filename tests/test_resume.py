"""A run that is interrupted goes on as if nothing had been: same points, same weights, same best.

Here the process does not die: what it holds in memory is thrown away at a point where nothing
was saved. The fault suite (tests/faults) kills real processes.
"""

import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy.orm import Session

from app import claims, database, invariants, methods, points, registry, runs, space, storage
from app.errors import LostClaim
from app.settings import settings
from app.tables import Run
from tests import tiny
from tests.factories import measured
from tests.faults import small
from worker import checkpoints, recorder
from worker import run as worker_run
from worker.watch import Stopped, Watch


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model(tmp_path_factory.mktemp("resume") / "llama", initializer_range=0.15)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every step, and no answers to score."""
    monkeypatch.setattr(settings, "checkpoint_seconds", 1e-9)
    monkeypatch.setattr(settings, "disk_reserve_mb", 0)
    monkeypatch.setattr(settings, "checkpoint_share", 1.0)
    monkeypatch.setattr(worker_run.gc, "collect", lambda: 0)
    monkeypatch.setattr(worker_run.scoring, "look_at_base", lambda job, model: None)
    monkeypatch.setattr(worker_run.scoring, "score_run", lambda job: {})
    monkeypatch.setattr(worker_run.scoring, "score_base", lambda job: None)


class Killed(BaseException):
    """In the place of a signal: nothing catches it, nothing is saved."""


class Sign(Watch):
    """Counts the looks of a run, one after every row, and ends it at those given."""

    def __init__(self, run: Run, acts: dict[int, Callable[[], None]] | None = None) -> None:
        self.run_id, self.attempt = run.id, run.attempt
        self.acts = acts or {}
        self.count = 0

    def check(self) -> None:
        self.count += 1
        self.acts.get(self.count, lambda: None)()


def kill() -> None:
    raise Killed


def stop(why: str) -> Callable[[], None]:
    def act() -> None:
        raise Stopped(why)

    return act


def attempt(run_id: str, acts: dict[int, Callable[[], None]] | None = None) -> int:
    """One go at the run, as a worker's child makes it; how many looks it took."""
    with database.session() as db:
        claimed = claims.claim_next(db, "w")
    assert claimed is not None
    assert claimed.id == run_id
    watch = Sign(claimed, acts)
    try:
        worker_run._ended(claimed.id, claimed.attempt, watch)
    except Killed:
        with database.session() as db:
            claims.put_back(db, run_id, claimed.attempt, "It was killed.")
    except LostClaim:
        pass
    return watch.count


_whole: dict[str, tuple[Any, Any]] = {}


def whole(of: Run) -> tuple[Any, Any]:
    """Curve and files of a run like this that nobody disturbed; computed once."""
    key = f"{of.method} {of.params}"
    if key in _whole:
        return _whole[key]
    with database.session() as db:
        twin = Run(experiment_id=of.experiment_id, method=of.method, params=of.params, position=0.0)
        db.add(twin)
        db.commit()
    attempt(twin.id)
    assert small.now(twin.id).state == "succeeded", small.said(twin.id)
    _whole[key] = small.curve(twin.id), small.left(twin.id)
    return _whole[key]


def check() -> None:
    with database.reading() as db:
        assert invariants.check(db) == []


SHAPES = {
    "prompt_tuning": {"accumulate_steps": 2, "num_epochs": 3},
    "lora": {"dropout": 0.1, "num_epochs": 2},
    "qlora": {"validation_interval": 3},
    "full": {"weight_decay": 0.1, "batch_size": 7, "gradient_checkpointing": True, "num_epochs": 3},
}


@pytest.mark.parametrize("method", methods.METHODS)
def test_promise_3_the_same_curve_after_any_number_of_kills(
    db: Session, model: Path, method: str
) -> None:
    run = small.run(db, small.experiment(db, model), method, **SHAPES[method])
    curve, files = whole(run)
    kinds = [kind for kind, *_ in curve]
    assert kinds.count("train") >= 12
    assert kinds.count("validation") >= 4
    draw = random.Random(method)
    kills = 0
    while small.now(run.id).state == "queued":
        # Late enough for every attempt to get on by a step at least.
        attempt(run.id, {draw.randint(8, 24): kill})
        kills += 1
    assert small.now(run.id).state == "succeeded", small.said(run.id)
    assert kills >= 3
    assert small.curve(run.id) == curve
    assert small.left(run.id) == files
    check()


def test_a_runs_own_seed_is_that_of_an_experiment_with_it(db: Session, model: Path) -> None:
    """Start, order and dropout follow from it; an experiment with that seed trains just so."""
    of = small.experiment(db, model)
    curves = []
    for seed, own in ((1, None), (1, 5), (5, None)):
        of.seed = seed  # the split stays
        run = small.run(db, of, num_epochs=1, dropout=0.1, seed=own)
        attempt(run.id)
        assert small.now(run.id).state == "succeeded", small.said(run.id)
        curves.append(small.curve(run.id))
    assert curves[1] == curves[2]
    assert curves[1] != curves[0]


@pytest.mark.parametrize("why", ["ending", "pausing"])
def test_promise_5_a_stop_saves_at_once_and_nothing_is_redone(
    db: Session, model: Path, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "checkpoint_seconds", 3600.0)
    run = small.run(db, small.experiment(db, model), "full")
    curve, files = whole(run)

    def act() -> None:
        if why == "pausing":
            with database.session() as other:
                runs.pause(other, run.id)
        raise Stopped(why)

    for looks in (7, 15, 31):
        attempt(run.id, {looks: act})
        state = small.now(run.id).state
        assert state == ("paused" if why == "pausing" else "queued"), small.said(run.id)
        if state == "paused":
            with database.session() as other:
                runs.resume(other, run.id)
    attempt(run.id)
    found = small.now(run.id)
    assert found.state == "succeeded", small.said(run.id)
    assert found.rewinds == []  # no point was measured twice
    assert small.curve(run.id) == curve
    assert small.left(run.id) == files
    check()


def test_a_kill_between_a_look_and_its_checkpoint_leaves_one_point_of_each_kind(
    db: Session, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker stopped during a look; the next attempt looked, and died before it saved."""
    run = small.run(db, small.experiment(db, model), "lora", validation_interval=2)
    curve, files = whole(run)
    seen: list[Any] = []
    real = recorder.Recorder._take

    def take(self: recorder.Recorder, point: Any) -> None:
        real(self, point)
        seen.append((point.kind, point.step))

    monkeypatch.setattr(recorder.Recorder, "_take", take)
    looks = 0
    while ("train", 2) not in seen:
        looks += 1
        seen.clear()
        attempt(run.id, {looks: stop("ending")})
    assert ("validation", 2) not in seen  # saved while it looked
    seen.clear()

    def kill_after_look() -> None:
        if ("validation", 2) in seen:
            raise Killed

    attempt(run.id, dict.fromkeys(range(1, 100), kill_after_look))
    assert ("validation", 2) in [point[:2] for point in small.curve(run.id)]
    attempt(run.id)
    assert small.now(run.id).state == "succeeded", small.said(run.id)
    assert small.curve(run.id) == curve
    assert small.left(run.id) == files
    check()


def test_what_is_computed_stays_as_it_was_begun(
    db: Session, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small.run(db, small.experiment(db, model), "lora")
    before = torch.get_num_threads()
    real = worker_run.hardware.find
    attempt(run.id, {20: stop("ending")})
    first = small.now(run.id).figures
    assert first["threads"] == before

    def other(*given: Any) -> Any:
        torch.set_num_threads(before + 1)
        return real(*given)._replace(name="Another CPU", threads=before + 1, memory_mb=1.0)

    monkeypatch.setattr(worker_run.hardware, "find", other)
    attempt(run.id)
    found = small.now(run.id)
    assert torch.get_num_threads() == before
    assert found.figures["threads"] == before
    assert found.figures["token_budget"] == first["token_budget"]
    (line,) = [line for line in small.said(run.id) if "differ" in line]
    assert "and goes on on Another CPU" in line


def test_a_run_that_gets_nowhere_fails_with_the_reason_even_while_it_scores(
    db: Session, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint of the last step is no progress when it is loaded again and again."""
    monkeypatch.setattr(worker_run.scoring, "score_run", lambda job: kill())
    run = small.run(db, small.experiment(db, model), "lora", num_epochs=1)
    for _ in range(3):
        attempt(run.id)
    found = small.now(run.id)
    assert (found.state, found.attempt) == ("failed", 3)
    assert "It was lost 3 times with nothing saved in between" in (found.error or "")
    check()


def folders(run_id: str) -> list[str]:
    return sorted(path.name for path in storage.checkpoints_folder(run_id).iterdir())


def test_old_checkpoints_are_pruned_and_damaged_ones_named_and_passed_over(
    db: Session, model: Path
) -> None:
    run = small.run(db, small.experiment(db, model), "lora")
    curve, files = whole(run)
    attempt(run.id, {25: kill})
    newest, older = registry.of(db, run.id)
    db.commit()
    names = [f"{one.step:08d}-{one.attempt:04d}" for one in (older, newest)]
    assert folders(run.id) == names
    values = storage.checkpoint_folder(run.id, newest.step, newest.attempt) / "values.safetensors"
    data = bytearray(values.read_bytes())
    data[len(data) // 2] ^= 1
    values.write_bytes(data)
    (storage.checkpoints_folder(run.id) / ".00000099-0001").mkdir()  # a writer died here
    attempt(run.id)
    said = small.said(run.id)
    assert any(
        line.startswith(f"The checkpoint of step {newest.step} is damaged: values.safetensors")
        and line.endswith("It was passed over.")
        for line in said
    ), said
    assert f"Going on from the checkpoint of step {older.step}." in said
    assert small.now(run.id).state == "succeeded"
    assert small.curve(run.id) == curve
    assert small.left(run.id) == files
    assert folders(run.id) == []  # it has succeeded
    check()


def test_a_run_that_has_succeeded_keeps_no_checkpoints(
    db: Session, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop = registry.drop
    monkeypatch.setattr(registry, "drop", lambda db, run_id: 1 / 0)
    for left in (True, False):
        run = small.run(db, small.experiment(db, model), "full")
        attempt(run.id)
        assert small.now(run.id).state == "succeeded", small.said(run.id)
        assert bool(registry.of(db, run.id)) == left
        folder = storage.files_of_run(run.id)
        assert (folder / "checkpoints").exists() == left
        assert (folder / "best").is_dir()
        assert (folder / "last").is_dir()
        check()
        monkeypatch.setattr(registry, "drop", drop)


def test_all_checkpoints_damaged_starts_anew(db: Session, model: Path) -> None:
    run = small.run(db, small.experiment(db, model), "lora", num_epochs=1)
    curve, files = whole(run)
    attempt(run.id, {14: kill})
    for name in folders(run.id):
        (storage.checkpoints_folder(run.id) / name / "values.safetensors").write_bytes(b"")
    attempt(run.id)
    assert "Nothing had been saved yet: starting from the beginning." in small.said(run.id)
    assert small.curve(run.id) == curve
    assert small.left(run.id) == files
    check()


@pytest.mark.parametrize("hand", ["nothing", "a best state", "a checkpoint"])
def test_promise_2_what_has_lost_its_claim_changes_nothing(
    db: Session, model: Path, monkeypatch: pytest.MonkeyPatch, hand: str
) -> None:
    """It sleeps with something in its hand, wakes up when another attempt has done it all, and
    puts no file in place.
    """
    run = small.run(db, small.experiment(db, model), "lora")
    curve, files = whole(run)
    after: list[Any] = []

    def sleep(*_: Any, **__: Any) -> None:
        if small.now(run.id).attempt > 1 or after:
            return
        with database.session() as other:
            claims.put_back(other, run.id, 1, "It slept.")
        attempt(run.id)
        after.append((small.left(run.id), folders(run.id)))

    def then_sleep(act: Any) -> Any:
        def both(*given: Any, **named: Any) -> Any:
            done = act(*given, **named)
            sleep()
            return done

        return both

    if hand == "a best state":
        monkeypatch.setattr(
            recorder.backbones, "save_tuned", then_sleep(recorder.backbones.save_tuned)
        )
    if hand == "a checkpoint":
        monkeypatch.setattr(recorder.checkpoints, "write", then_sleep(checkpoints.write))
    attempt(run.id, {20: sleep} if hand == "nothing" else {})
    assert small.now(run.id).state == "succeeded"
    assert small.now(run.id).attempt == 2
    assert small.curve(run.id) == curve
    assert after == [(files, folders(run.id))]
    assert small.left(run.id) == files
    check()


# --- Room on the disk -------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "disk_reserve_mb", 10**9)
    return


def sweep() -> None:
    with database.session() as db:
        claims.sweep(db)


def test_a_run_waits_for_room_and_goes_on_by_itself(
    db: Session, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small.run(db, small.experiment(db, model), "lora")
    curve, files = whole(run)
    monkeypatch.setattr(settings, "disk_reserve_mb", 10**9)
    attempt(run.id)
    found = small.now(run.id)
    assert found.state == "waiting"
    assert "Waiting for disk" in (found.error or "")
    assert "MB are missing" in (found.error or "")
    assert "goes on from there by itself" in (found.error or "")
    check()
    sweep()
    assert small.now(run.id).state == "waiting"
    monkeypatch.setattr(settings, "disk_reserve_mb", 0)
    sweep()
    found = small.now(run.id)
    assert (found.state, found.error) == ("queued", None)
    attempt(run.id)
    assert small.now(run.id).state == "succeeded", small.said(run.id)
    assert small.curve(run.id) == curve
    assert small.left(run.id) == files
    check()


def test_a_pause_on_a_full_disk_says_what_is_lost(
    db: Session, model: Path, full_disk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "checkpoint_seconds", 3600.0)
    run = small.run(db, small.experiment(db, model), "lora")

    def pause() -> None:
        with database.session() as other:
            runs.pause(other, run.id)
        raise Stopped("pausing")

    attempt(run.id, {3: pause})
    assert small.now(run.id).state == "paused"
    assert any(
        "What was trained since the last saving is lost" in one for one in small.said(run.id)
    )
    check()


def _real_disk(folder: Path, megabytes: int) -> bool:
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)],
        capture_output=True,
    )
    return made.returncode == 0


def test_a_disk_that_is_really_full(
    db: Session, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of runs lie on a disk of 8 MB, full but for some bytes; what is free is not asked."""
    disk = tmp_path / "disk"
    if shutil.which("mount") is None or not _real_disk(disk, 8):
        pytest.skip("Mounting a small disk takes rights that this user does not have.")
    try:
        run = small.run(db, small.experiment(db, model), "full")
        curve, files = whole(run)
        storage.remove(storage.home() / "runs")
        (storage.home() / "runs").symlink_to(disk)
        (disk / "ballast").write_bytes(bytes(8_000_000))
        attempt(run.id)
        assert small.now(run.id).state == "waiting", small.said(run.id)
        (folder,) = [path for path in disk.iterdir() if path.name == run.id]
        assert not [path.name for path in folder.rglob(".*")]  # the half-written takes no room
        (disk / "ballast").unlink()
        sweep()
        attempt(run.id)
        assert small.now(run.id).state == "succeeded", small.said(run.id)
        assert small.curve(run.id) == curve
        assert small.left(run.id) == files
    finally:
        subprocess.run(["umount", str(disk)], check=False)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device"), True),
        (OSError(122, "Disk quota exceeded"), True),
        (
            ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
            True,
        ),
        (RuntimeError("(sqlite3.OperationalError) database or disk is full"), True),
        (OSError(13, "Permission denied"), False),
    ],
)
def test_whoever_says_that_the_disk_is_full(error: Exception, expected: bool) -> None:
    assert space.is_full(error) is expected


# --- How often ---------------------------------------------------------------------------------


def test_saving_takes_at_most_its_share_of_the_time(
    db: Session, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "checkpoint_share", 0.03)
    clock = [0.0]
    monkeypatch.setattr(recorder.time, "monotonic", lambda: clock[0])
    written: list[int] = []
    real = checkpoints.write

    def write(new: Path, state: checkpoints.State) -> registry.Made:
        written.append(state.step)
        clock[0] += 3.0  # a slow disk
        return real(new, state)

    monkeypatch.setattr(recorder.checkpoints, "write", write)
    monkeypatch.setattr(settings, "checkpoint_seconds", 60.0)
    run = small.run(db, small.experiment(db, model), "lora", num_epochs=3)

    def tick() -> None:
        clock[0] += 10.0  # about a step

    attempt(run.id, dict.fromkeys(range(1, 1000), tick))
    assert small.now(run.id).state == "succeeded"
    first, second, *_ = written
    assert first <= 8  # after 60 s
    assert second > first  # then not before 97 s have passed
    assert clock[0] * 0.031 + 6 > 3.0 * len(written)


def test_points_that_are_stored_already_are_left_out(db: Session, model: Path) -> None:
    """The connection broke after the commit: the same points are sent once more."""
    run = small.run(db, small.experiment(db, model))
    claimed = claims.claim_next(db, "w")
    assert claimed
    points.record(db, run.id, 1, [measured(1), measured(2)])
    points.record(db, run.id, 1, [measured(1), measured(2), measured(2, "validation")])
    points.record(db, run.id, 1, [measured(1), measured(2), measured(2, "validation")])
    found = [(point.kind, point.step, point.number) for point in points.curve(db, run.id)]
    assert found == [("train", 1, 1), ("train", 2, 2), ("validation", 2, 3)]
