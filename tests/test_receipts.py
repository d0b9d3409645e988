"""Receipts: what is in them, that they verify, that what was changed is found out, and what is refused."""

import io
import json
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from sqlalchemy.orm import Session
from typer.testing import CliRunner

from app import claims, database, fingerprints, model_cards, receipt_files, receipts, storage, zips
from app.cli import cli
from app.errors import Conflict, Invalid, StudioError
from app.settings import settings
from app.tables import Dataset
from tests import factories, web
from tests.faults import small
from worker import hardware, repetition, verify
from worker import run as worker_run

Files = dict[str, bytes]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No answers to score; and the signals as they were."""
    before = signal.getsignal(signal.SIGTERM)
    metrics = {"metrics": {"accuracy": 0.5, "macro_f1": 0.25}, "test_loss": 1.5, "num_test": 20}
    monkeypatch.setattr(worker_run.scoring, "score_run", lambda job: metrics)
    monkeypatch.setattr(worker_run.scoring, "score_base", lambda job: None)
    yield
    signal.signal(signal.SIGTERM, before)


def _finished(db: Session, model: Path, method: str = "lora", **params: Any) -> str:
    of = small.experiment(db, model)
    of.watch = ["1 a"]  # answering it changes nothing in the curve
    run_id = small.run(db, of, method, **params).id
    with database.session() as other:
        claimed = claims.claim_next(other, "w")
    assert claimed
    assert worker_run.work(claimed.id, claimed.attempt) == 0
    assert small.now(run_id).state == "succeeded", small.said(run_id)
    return run_id


def _archive(run_id: str, *, data: bool = False) -> bytes:
    with database.reading() as db:
        contents = receipts.contents(db, receipts.get(db, run_id), data=data)
    return b"".join(zips.stream(contents, compressed=True))


def _files(archive: bytes) -> Files:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def _packed(path: Path, files: Files, **changes: Any) -> Path:
    """A receipt of these files; with its hashes as they must be, as a careful forger would."""
    receipt = json.loads(files["receipt.json"])
    for dotted, value in changes.items():
        part, _, field = dotted.partition("__")
        receipt[part] = {**receipt[part], field: value} if field else value
    hashes = {name: sha256(one).hexdigest() for name, one in files.items()}
    receipt["files"] = {name: one for name, one in hashes.items() if name != "receipt.json"}
    files = {**files, "receipt.json": json.dumps(receipt).encode()}
    path.write_bytes(b"".join(zips.stream(sorted(files.items()), compressed=True)))
    return path


def _verify(path: Path, data: str = "") -> verify.Found:
    silent = Console(file=io.StringIO())
    return verify.verify(receipt_files.read(path), data, silent)


@pytest.mark.parametrize("method", ["prompt_tuning", "lora", "qlora", "full"])
def test_a_true_receipt_verifies_bit_for_bit(
    db: Session, tiny_model: Path, tmp_path: Path, method: str
) -> None:
    changes = {"dropout": 0.1} if method == "lora" else {}
    run_id = _finished(db, tiny_model, method, num_epochs=3, validation_interval=2, **changes)
    path = tmp_path / "receipt.zip"
    path.write_bytes(_archive(run_id))
    found = _verify(path)
    assert found.verdict == "The same, bit for bit, on the 20 steps up to step 20."
    assert found.same
    assert "20" in [row.rjust(2) for row in verify.table(found).columns[0].cells][-1]


def test_what_was_changed_is_found_out(db: Session, tiny_model: Path, tmp_path: Path) -> None:
    run_id = _finished(db, tiny_model, num_epochs=3)
    files, path = _files(_archive(run_id, data=True)), tmp_path / "receipt.zip"
    receipt = json.loads(files["receipt.json"])
    params = receipt["run"]["params"]

    found = _verify(_packed(path, files))
    assert found.same

    rate = params["learning_rate"] * 1.01
    found = _verify(_packed(path, files, run__params=params | {"learning_rate": rate}))
    assert (found.same, found.verdict[:20]) == (False, "Differs from step 1:")

    found = _verify(_packed(path, files, run__params=params | {"max_grad_norm": 0.9}))
    assert not found.same
    assert found.verdict.startswith("Differs from step ")

    found = _verify(_packed(path, files, experiment__seed=2))
    assert (found.same, found.verdict[:20]) == (False, "Differs from step 1:")

    # Another example, with all hashes made to fit.
    data = files["examples.jsonl"].splitlines(keepends=True)
    row = json.loads(files["split.json"])["train"][3]
    example = json.loads(data[row])
    assert example["output"] != "account"
    data[row] = json.dumps(example | {"output": "account"}).encode() + b"\n"
    forged = {**files, "examples.jsonl": b"".join(data)}
    fingerprint = sha256(forged["examples.jsonl"]).hexdigest()
    found = _verify(_packed(path, forged, dataset__fingerprint=fingerprint))
    assert not found.same
    with pytest.raises(Invalid, match="not those of the dataset's fingerprint"):
        _verify(_packed(path, forged))

    # A curve that never was.
    points = [json.loads(line) for line in files["points.jsonl"].splitlines()]
    seventh = next(one for one in points if (one["kind"], one["step"]) == ("train", 7))
    seventh["loss"] += 1e-9
    forged = {**files, "points.jsonl": b"".join(json.dumps(p).encode() + b"\n" for p in points)}
    found = _verify(_packed(path, forged))
    assert not found.same
    assert found.verdict.startswith("Differs from step 7: by less than 0.0001")
    # Elsewhere so little may be the hardware.
    found = _verify(_packed(path, forged, versions=receipt["versions"] | {"torch": "1.0"}))
    assert found.same
    assert found.verdict.startswith("The same within 0.0001 on the 20 steps up to step 20 (other")
    seventh["loss"] += 0.01
    forged["points.jsonl"] = b"".join(json.dumps(p).encode() + b"\n" for p in points)
    found = _verify(_packed(path, forged, versions={"torch": "1.0"}))
    assert (found.same, found.verdict) == (False, "Differs from step 7.")


def test_only_the_points_that_are_there_are_compared(
    db: Session, tiny_model: Path, tmp_path: Path
) -> None:
    files = _files(_archive(_finished(db, tiny_model)))
    lines = files["points.jsonl"].splitlines(keepends=True)
    few = [line for line in lines if json.loads(line)["step"] % 5 == 0]
    found = _verify(_packed(tmp_path / "r.zip", {**files, "points.jsonl": b"".join(few)}))
    assert [again.step for _, again in found.pairs] == [5, 10, 15, 20]
    assert found.same
    none = {**files, "points.jsonl": b""}
    with pytest.raises(Invalid, match="tells of none of the first 20 steps"):
        _verify(_packed(tmp_path / "r.zip", none))


def test_data_and_base_model_are_known_by_their_fingerprints(
    db: Session, tiny_model: Path, tmp_path: Path
) -> None:
    run_id = _finished(db, tiny_model)
    path = tmp_path / "receipt.zip"
    path.write_bytes(_archive(run_id))
    experiment = small.now(run_id).experiment
    rows = storage.dataset_file(experiment.dataset_id).read_bytes()
    stored = db.get(Dataset, experiment.dataset_id)
    assert stored
    stored.fingerprint = "0" * 64  # as if it were another studio
    db.commit()
    with pytest.raises(Invalid, match="neither in this studio nor in the receipt"):
        _verify(path)
    own = tmp_path / "own.jsonl"
    own.write_bytes(rows)
    assert _verify(path, str(own)).same
    own.write_bytes(rows.replace(b"refund", b"Refund"))
    with pytest.raises(Invalid, match="are not those that the run was trained on"):
        _verify(path, str(own))

    base = experiment.base_model
    folder = storage.base_model_folder(base.id)
    assert base.fingerprint == fingerprints.of_base_model(folder)
    with database.session() as other:
        found = other.get(type(base), base.id)
        assert found
        found.fingerprint = "1" * 64
        other.commit()
    with pytest.raises(Invalid, match="has other files than the one that was trained"):
        _verify(path, str(own.write_bytes(rows) and own))
    with database.session() as other:
        found = other.get(type(base), base.id)
        assert found
        found.address = "elsewhere"
        other.commit()
    with pytest.raises(Invalid, match="is not in this studio"):
        _verify(path, str(own))


def test_what_a_base_models_fingerprint_depends_on(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_model, folder)
    before = fingerprints.of_base_model(folder)
    (folder / "README.md").write_text("Nothing that matters.")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "9"}))
    assert fingerprints.of_base_model(folder) == before
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 7.0}))
    assert fingerprints.of_base_model(folder) != before
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert fingerprints.of_base_model(folder) != before


def test_a_receipt_is_the_same_bytes_each_time_and_keeps_the_data_back(
    db: Session, tiny_model: Path
) -> None:
    run_id = _finished(db, tiny_model)
    archive = _archive(run_id)
    assert archive == _archive(run_id)
    files = _files(archive)
    assert sorted(files) == sorted({*receipt_files.MOST})
    experiment = small.now(run_id).experiment
    example = json.loads(storage.dataset_file(experiment.dataset_id).read_text().splitlines()[0])
    assert not [name for name, content in files.items() if example["input"].encode() in content]
    whole = _files(_archive(run_id, data=True))
    assert whole["examples.jsonl"] == storage.dataset_file(experiment.dataset_id).read_bytes()
    receipt = json.loads(files["receipt.json"])
    assert receipt["experiment"]["seed"] == experiment.seed
    assert receipt["base_model"]["fingerprint"] == experiment.base_model.fingerprint
    assert receipt["versions"]["torch"] == receipts.versions()["torch"]
    assert json.loads(files["split.json"]) == experiment.split
    assert len(files["points.jsonl"].splitlines()) == len(small.curve(run_id))
    assert f"torch=={receipt['versions']['torch']}\n".encode() in files["requirements.txt"]


def test_pages_api_and_command_line_give_it(db: Session, tiny_model: Path, tmp_path: Path) -> None:
    run_id = _finished(db, tiny_model)
    expected = _archive(run_id)
    with web.client() as client:
        for address in (f"/runs/{run_id}/receipt", f"/api/runs/{run_id}/receipt"):
            answer = client.get(address)
            assert answer.content == expected
            assert f'filename="receipt-lora-{run_id}.zip"' in answer.headers["content-disposition"]
            assert "examples.jsonl" in _files(client.get(f"{address}?data=1").content)
            assert client.get(f"{address}?data=perhaps").status_code == 422
        for page in (f"/runs/{run_id}", f"/tuned-models/{run_id}"):
            assert f'action="/runs/{run_id}/receipt"' in client.get(page).text
        waiting = factories.run(db)
        refused = client.get(f"/api/runs/{waiting.id}/receipt")
        assert refused.status_code == 409
        assert "this one is queued" in refused.text
        assert f"/runs/{waiting.id}/receipt" not in client.get(f"/runs/{waiting.id}").text
        assert client.get("/runs/nothing/receipt").status_code == 404
    path = tmp_path / "r.zip"
    assert CliRunner().invoke(cli, ["receipt", run_id, str(path)]).exit_code == 0
    assert path.read_bytes() == expected
    assert CliRunner().invoke(cli, ["receipt", waiting.id, str(path)]).exit_code == 2
    nowhere = CliRunner().invoke(cli, ["receipt", run_id, str(path / "no" / "x.zip")])
    assert nowhere.exit_code == 2
    assert isinstance(nowhere.exception, SystemExit)


def test_the_command_says_the_verdict_and_its_exit_code(
    db: Session,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_id = _finished(db, tiny_model)
    db.commit()
    files = _files(_archive(run_id))
    good = _packed(tmp_path / "good.zip", files)
    done = subprocess.run(
        [sys.executable, "-c", "from app.cli import main; main()", "verify", str(good)],
        cwd=storage.REPOSITORY,
        env={"PATH": "", "STUDIO_HOME": str(storage.home()), "STUDIO_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("The same, bit for bit")
    refused = CliRunner().invoke(cli, ["verify", str(tmp_path / "none.zip")])
    assert refused.exit_code == 2
    bad = _packed(tmp_path / "bad.zip", files, experiment__seed=5)
    monkeypatch.setattr(sys, "argv", ["verify", str(bad), ""])
    assert verify.main() == 1
    assert "Differs from step 1" in capsys.readouterr().out
    monkeypatch.setattr(settings, "home", str(tmp_path / "empty"))
    database.engine.cache_clear()
    assert verify.main() == 2
    assert "There is no studio here" in capsys.readouterr().err


def _damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda one: one.compress_size)
    content[entry.header_offset + 30 + len(entry.filename) + entry.compress_size // 2] ^= 255
    path.write_bytes(content)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def _added(name: str) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, "{}")

    return act


def _bomb(path: Path) -> None:
    files = _files(path.read_bytes())
    files["receipt.json"] = b" " * (5 * 2**20)
    path.write_bytes(b"".join(zips.stream(sorted(files.items()), compressed=True)))


def _without(name: str) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        files = [
            (one, content) for one, content in _files(path.read_bytes()).items() if one != name
        ]
        path.write_bytes(b"".join(zips.stream(files)))

    return act


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_damaged, "is no whole receipt"),
        (_cut, "File is not a zip file"),
        (lambda path: path.write_bytes(b""), "File is not a zip file"),
        (_added("../../evil.sh"), "it holds '../../evil.sh', which is no part of a receipt"),
        (_added("/etc/passwd"), "no part of a receipt"),
        (_added("receipt.json"), "it holds a file twice"),
        (_bomb, "its receipt.json is larger than 4 MB"),
        (_without("points.jsonl"), "it holds no points.jsonl"),
    ],
)
def test_what_is_no_whole_receipt_is_refused_in_a_sentence(
    made: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    receipt_files.read(made)
    spoil(made)
    with pytest.raises(Invalid, match=r"Nothing was trained\.$") as refused:
        receipt_files.read(made)
    assert reason in refused.value.message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": 2}, "format: Input should be 1"),
        ({"figures__threads": 100_000}, "figures.threads: "),
        ({"figures__token_budget": 2**40}, "figures.token_budget: "),
        ({"experiment__seed": -1}, "experiment.seed: "),
        ({"dataset__num_examples": 3}, "its split does not fit its dataset"),
        ({"split__fingerprint": "0"}, "its split is not the one of its fingerprint"),
        ({"another": "card"}, "its README.md is not the one that it was made with"),
    ],
)
def test_a_receipt_that_contradicts_itself_is_refused(
    made: Path, changes: dict[str, Any], reason: str
) -> None:
    files = _files(made.read_bytes())
    if changes == {"another": "card"}:
        made.write_bytes(b"".join(zips.stream([*sorted({**files, "README.md": b"x"}.items())])))
    else:
        _packed(made, files, **changes)
    with pytest.raises(Invalid) as refused:
        receipt_files.read(made)
    assert reason in refused.value.message


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"format": NaN}', b"\xff\xfe", b"null"])
def test_nonsense_in_place_of_the_receipt_is_refused(made: Path, content: bytes) -> None:
    files = {**_files(made.read_bytes()), "receipt.json": content}
    made.write_bytes(b"".join(zips.stream(sorted(files.items()))))
    with pytest.raises(Invalid, match="is no whole receipt"):
        receipt_files.read(made)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"run__method": "magic"}, "There is no method"),
        ({"run__params": {"learning_rate": 9.0}}, "Learning rate"),
        ({"experiment__task": "magic"}, "There is no task"),
        ({"experiment__template": "no place"}, "The template needs"),
    ],
)
def test_settings_that_no_run_can_have_are_refused(
    db: Session, made: Path, changes: dict[str, Any], reason: str
) -> None:
    _packed(made, _files(made.read_bytes()), **changes)
    with pytest.raises(StudioError) as refused:
        repetition.run_of(receipt_files.read(made), factories.base_model(db))
    assert reason in refused.value.message


@pytest.fixture
def made(db: Session, tmp_path: Path) -> Path:
    """A receipt of a run that was never trained, which is enough to be read."""
    figures = {
        "device": "CPU",
        "device_kind": "cpu",
        "precision": "float32",
        "threads": 1,
        "token_budget": 1024,
    }
    run = factories.tuned(db, figures=figures, step=3)
    with database.reading() as reading:
        contents = receipts.contents(reading, receipts.get(reading, run.id), data=True)
    path = tmp_path / "made.zip"
    path.write_bytes(b"".join(zips.stream(contents, compressed=True)))
    return path


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (b'{"input": "a"}\n', "output: Field required"),
        (b'{"input": "a", "output": 1}\n', "output: Input should be a valid string"),
        (b'["a", "b"]\n', "Input should be an object"),
        (b'{"input": "a", "output": "b"}\n', "another number of examples"),
    ],
)
def test_data_that_is_no_data_is_refused(made: Path, lines: bytes, reason: str) -> None:
    files = {**_files(made.read_bytes()), "examples.jsonl": lines}
    _packed(made, files, dataset__fingerprint=sha256(lines).hexdigest())
    with pytest.raises(Invalid) as refused:
        receipt_files.read(made)
    assert reason in refused.value.message


def test_nothing_of_a_receipt_gives_orders_to_the_terminal() -> None:
    assert verify.plain("a\x1b[2J\nb\x07") == "a\ufffd[2J\nb\ufffd"


def test_the_model_card(db: Session) -> None:
    of = factories.experiment(
        db,
        factories.base_model(db, source="hub", address="org/model", licence="Apache-2.0"),
        name="A `name` with | and <b> [x](y)",
        template="```\n{{input}}\n```",
    )
    run = factories.tuned(
        db,
        of,
        scores={"metrics": {"accuracy": 0.75, "macro_f1": 0.5}, "test_loss": 0.25, "num_test": 15},
        step=9,
        best_step=6,
    )
    card = model_cards.write(run, {"metrics": {"accuracy": 0.5}, "test_loss": 1.0})
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "org/model",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["tuning-studio", "lora", "classification"],
    }
    assert "# A \\`name\\` with \\| and \\<b\\> \\[x\\](y): LoRA" in text
    assert "````text\n```\n{{input}}\n```\n````" in text
    assert "| Accuracy | 50.0 % | 75.0 % |" in text
    assert "| Macro F1 | not measured | 50.0 % |" in text
    assert "| Loss (nats per token) | 1.0000 | 0.2500 |" in text
    assert "On 15 test examples" in text
    assert "step 6 of 9" in text
    factories.tuned(db, of, params=run.params | {"rank": 4})
    db.refresh(of)
    assert "\\<b\\> \\[x\\](y): LoRA · rank 16\n" in model_cards.write(run, {})
    found = dict(receipts.contents(db, run))
    assert json.loads(bytes(found["receipt.json"]))["run"]["name"] == "LoRA · rank 16"  # type: ignore[arg-type]


def test_other_hardware_is_named(made: Path) -> None:
    read = receipt_files.read(made)
    figures = read.receipt.figures.model_copy(update={"devices": 2})
    here = hardware.Hardware("cpu", "float32", "CPU", 1.0, 1)
    receipt = read.receipt.model_copy(update={"figures": figures, "versions": {"torch": "1"}})
    there = verify._others(read._replace(receipt=receipt), here, "")
    assert there[0] == "Trained on 2 devices; repeated on one."
    assert there[1].startswith("torch: 1 then, ")
    silent = read.receipt.model_copy(update={"versions": {}})
    assert (
        "does not say which versions" in verify._others(read._replace(receipt=silent), here, "")[0]
    )
    with pytest.raises(Conflict):
        with database.session() as db:
            receipts.get(db, factories.run(db, state="failed", finished_at=1.0, error="x").id)
