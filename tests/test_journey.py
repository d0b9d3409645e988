"""The main job as a newcomer does it: real Valkey, workers, model and browser, start to end."""

import csv
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app import base_models, database, prompts, storage
from app.settings import settings

pytestmark = [pytest.mark.real, pytest.mark.browser, pytest.mark.timeout(840)]

METHODS = ("prompt_tuning", "lora", "qlora", "full")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
TOPICS = {
    "weather": [
        "Will it rain in {} on Sunday?",
        "How cold does {} get at night?",
        "Is {} windy now?",
    ],
    "music": ["Play something by {}.", "Put {} on, please.", "I want to hear {} again."],
    "travel": ["Find me a train to {}.", "How far is it to {}?", "Book two nights in {}."],
}
# 63 examples: 28 of them to train on.
NAMES = ["Oslo", "Lima", "Quito", "Turin", "Ghent", "Porto", "Riga"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Studio:
    """A studio started by its own command in a home folder of its own."""

    def __init__(self, home: Path) -> None:
        self.environment = os.environ | {
            "STUDIO_HOME": str(home),
            "STUDIO_PORT": str(free_port()),
            "STUDIO_TOKEN": "",
        }
        self.said = home.parent / "said.txt"
        self.link = ""

    def start(self) -> float:
        """Until the link is printed; how many seconds that took."""
        began = time.monotonic()
        with self.said.open("w") as file:
            self.process = subprocess.Popen(
                self.command("up"), env=self.environment, stdout=file, stderr=file
            )
        while not (found := re.search(r"http://\S+token=\S+", self.said.read_text())):
            assert self.process.poll() is None, self.said.read_text()
            assert time.monotonic() - began < 300, self.said.read_text()
            time.sleep(0.1)
        self.link = found[0]
        return time.monotonic() - began

    def stop(self) -> float:
        """As Ctrl-C does; how many seconds the end took."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        self.process.wait(timeout=60)
        return time.monotonic() - began

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-c", "from app.cli import main; main()", *arguments]

    def api(self) -> httpx.Client:
        address, token = self.link.split("/?token=")
        return httpx.Client(
            base_url=f"{address}/api", headers={"Authorization": f"Bearer {token}"}, timeout=30
        )


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    made = Studio(tmp_path_factory.mktemp("journey") / "home")
    made.start()
    yield made
    if made.process.poll() is None:
        made.stop()


@pytest.fixture(scope="module")
def page(studio: Studio) -> Iterator[Any]:
    if CHROMIUM is None:
        if os.environ.get("CI_ALL"):
            pytest.fail("Chromium is missing, and here no test may be left out.")
        pytest.skip("not run: Chromium is missing (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        opened = browser.new_page()
        opened.set_default_timeout(60_000)
        opened.errors = []
        opened.on("pageerror", lambda error: opened.errors.append(str(error)))
        opened.goto(studio.link)
        yield opened
        browser.close()


def dataset_csv() -> bytes:
    rows = [
        {"input": sentence.format(name), "output": topic}
        for name in NAMES
        for topic, sentences in TOPICS.items()
        for sentence in sentences
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["input", "output"])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def wait_for(what: str, check: Any, seconds: float) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := check():
            return found
        time.sleep(0.3)
    pytest.fail(f"Not within {seconds:.0f} s: {what}")


def test_first_page_offers_the_example(page: Any) -> None:
    assert page.get_by_text("Tune your first model").first.is_visible()
    assert "token" not in page.url  # the link's token is not left in the address


def test_upload_tune_watch_compare_prompt(page: Any, studio: Studio) -> None:
    page.goto(page.url.split("/?")[0] + "datasets" if page.url.endswith("/") else page.url)
    page.locator("input[type=file]").set_input_files(
        {"name": "topics.csv", "mimeType": "text/csv", "buffer": dataset_csv()}
    )
    page.locator("form:has(input[type=file]) button").last.click()
    page.get_by_role("link", name=re.compile("new experiment", re.I)).first.click()

    page.locator("#name").fill("Journey <script>alert(1)</script>")
    for key in METHODS:
        size = 16 if key == "full" else 8  # its steps take five times as long as the others'
        page.locator(f"#use-{key}").check()
        page.locator(f".method-{key} summary", has_text="Parameters").click()
        page.locator(f"[name='{key}.num_epochs']").fill("1")
        page.locator(f"[name='{key}.batch_size']").fill(str(size))
    assert "weather" in page.locator("#labels").input_value()
    page.get_by_role("button", name="Start tuning").click()
    page.wait_for_url(re.compile(r"/experiments/[0-9a-f]{12}$"))
    experiment = page.url.rsplit("/", 1)[1]
    assert page.locator("h1").inner_text() == "Journey <script>alert(1)</script>"

    seen = []
    while len(set(seen)) < 4:  # the steps that the page shows move by themselves
        text = page.locator("#runs").inner_text()
        seen += re.findall(r"(\d+) of \d+", text)
        page.wait_for_timeout(200)
        assert len(seen) < 5000

    with studio.api() as api:

        def ended() -> Any:
            states = [run["state"] for run in api.get(f"/experiments/{experiment}").json()["runs"]]
            return states if all(state in ("succeeded", "failed") for state in states) else None

        assert wait_for("all runs have ended", ended, 500) == ["succeeded"] * 4
        compared = api.get(f"/experiments/{experiment}/comparison").json()
    rows = {row["method"]: row for row in compared["rows"]}
    assert set(rows) == {"base", *METHODS}
    assert all(row["score"] is not None and row["validation_loss"] for row in rows.values())
    assert rows["lora"]["validation_loss"] < rows["base"]["validation_loss"]

    page.get_by_role("link", name=re.compile("side by side", re.I)).first.click()
    page.locator("#input").fill("Will it snow in Ghent tonight?")
    page.get_by_role("button", name="Ask side by side").click()
    page.wait_for_url(re.compile(r"ask=[0-9a-f]{12}"))
    ask = page.url.rsplit("ask=", 1)[1][:12]
    with studio.api() as api:
        done = wait_for(
            "five answers",
            lambda: [
                one
                for one in [api.get(f"/completions/{ask}").json()["completions"]]
                if all(answer["state"] == "done" for answer in one)
            ],
            120,
        )[0]
    assert len(done) == 5
    texts = {answer["text"] for answer in done}
    assert len(texts) > 1  # the tuned models do not all answer like the base
    for answer in done:
        page.get_by_text(answer["text"][:30], exact=False).first.wait_for()
    assert page.errors == []


def test_the_default_model_is_what_its_card_says(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the studio has fetched and converted it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with studio.api() as api:
        base_model_id = api.get("/base-models").json()[0]["id"]
    monkeypatch.setattr(settings, "home", studio.environment["STUDIO_HOME"])
    database.engine.cache_clear()
    with database.reading() as db:
        model = base_models.get(db, base_model_id)
    database.engine().dispose()
    database.engine.cache_clear()
    folder = storage.base_model_folder(model.id)
    assert set(os.listdir(folder)) == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert (model.architecture, model.has_chat) == ("LlamaForCausalLM", True)
    assert model.shapes["parameters"] == 134_515_008
    assert (model.shapes["tied"], model.shapes["dtype_bytes"]) == (True, 2)
    formatter = prompts.formatter(folder)
    shown = formatter.prompt("{{input}}", "Hi", [])
    assert shown == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert formatter.stop_ids == {2}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ("In 1984  we had\n   12 of 3.5", "é ✓ <b>\t\tx", "What is 7 x 8?"):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        assert formatter.prompt_ids("{{input}}", text, []) == ids
    # Digits stand alone, and the spaces before them are one token: as it was trained.
    assert formatter._tokenizer.encode("a   12").tokens == ["a", "\u0120\u0120\u0120", "1", "2"]
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert network.generation_config.eos_token_id == 2
    prompt = formatter.prompt_ids("{{input}}", "What is the capital of France?", [])
    out = network.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
    answer = out[0][len(prompt) :].tolist()
    assert formatter.decode(answer) == "The capital of France is Paris."
    assert answer[-1] == 2


def test_the_adapter_is_taken_away_and_loads(studio: Studio, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with studio.api() as api:
        models = api.get("/tuned-models").json()
        lora = next(model for model in models if model["method"] == "lora")
        archive = api.get(f"/tuned-models/{lora['id']}/files/tuned.zip")
        base_id = api.get("/base-models").json()[0]["id"]
    with zipfile.ZipFile(io.BytesIO(archive.content)) as opened:
        opened.extractall(tmp_path)
    folder = next(tmp_path.rglob("adapter_config.json")).parent
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "SmolLM2-135M-Instruct"
    base = Path(studio.environment["STUDIO_HOME"]) / "base_models" / base_id
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, trust_remote_code=False),
        folder,
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    assert len(tokenizer) == model.config.vocab_size


def test_ctrl_c_saves_the_run_and_the_next_start_goes_on(studio: Studio) -> None:
    with studio.api() as api:
        dataset = api.get("/datasets").json()[0]["id"]
        base = api.get("/base-models").json()[0]["id"]
        created = api.post(
            "/experiments",
            json={
                "name": "Interrupted",
                "base_model_id": base,
                "dataset_id": dataset,
                "task": "classification",  # the same question: the base model's figures are known
                "methods": {"lora": {"num_epochs": 2, "batch_size": 4}},
            },
        )
        assert created.status_code < 300, created.text
        experiment = created.json()["id"]

        def run() -> Any:
            return api.get(f"/experiments/{experiment}").json()["runs"][0]

        before = wait_for("three steps", lambda: run()["step"] >= 3 and run(), 120)
    assert studio.stop() < 33
    assert "saved first" in studio.said.read_text()
    assert studio.start() < 10
    with studio.api() as api:
        again = wait_for("it goes on", lambda: run_of(api, experiment, "running"), 60)
        assert again["step"] >= before["step"] - 1
        wait_for("it ends", lambda: run_of(api, experiment, "succeeded"), 240)
        curve = api.get(f"/runs/{again['id']}/points").json()
    steps = [point["step"] for point in curve if point["kind"] == "train"]
    assert steps == list(range(1, max(steps) + 1))


def run_of(api: httpx.Client, experiment: str, state: str) -> Any:
    run = api.get(f"/experiments/{experiment}").json()["runs"][0]
    return run if run["state"] == state else None


def test_tune_from_the_command_line(studio: Studio, tmp_path: Path) -> None:
    data = tmp_path / "topics.csv"
    data.write_bytes(dataset_csv())
    command = studio.command("tune", str(data), "--methods", "prompt_tuning", "--json")
    small = ["--set", "prompt_tuning.num_epochs=1", "--set", "prompt_tuning.batch_size=8"]
    ended = subprocess.run(
        command + small, env=studio.environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert [row["method"] for row in result["rows"]] == ["base", "prompt_tuning"]
    assert result["succeeded"] is True
