"""The first page, and the pages and the API of base models and tuned models."""

import ast
import html
import io
import re
import time
import zipfile
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy.orm import Session

from app import methods, naming, runs, storage, workers
from app.comparison import baselines
from app.tables import Baseline, Worker
from tests import factories, web


@pytest.fixture
def browser(home: Path) -> TestClient:
    return web.client()


# --- The first page ---------------------------------------------------------------------------


def test_a_newcomer_is_offered_the_example_with_one_button(browser: TestClient) -> None:
    page = browser.get("/").text
    assert "<h1>Tune your first model</h1>" in page
    assert 'action="/experiments/example"' in page
    assert 'name="example" value="support_tickets" checked' in page
    assert "still being made ready" in page
    assert "studio worker tuner" in page  # nobody would take the run up
    for method in methods.METHODS.values():
        assert method.summary in page


def test_the_hints_go_when_their_reason_is_gone(browser: TestClient, db: Session) -> None:
    factories.base_model(db)
    workers.beat(db, Worker(id="w1", kind="tuner", host="here", pid=1))
    page = browser.get("/").text
    assert "still being made ready" not in page
    assert "studio worker tuner" not in page


def test_what_runs_is_shown_with_its_progress(browser: TestClient, db: Session) -> None:
    run = factories.run(db, state="running", method="qlora", step=30, num_steps=120)
    factories.run(db, run.experiment)
    workers.beat(db, Worker(id="w1", kind="tuner", host="box", pid=1, device="CPU, 2 threads"))
    for path in ("/", "/now"):
        page = browser.get(path).text
        assert 'value="30" max="120"' in page
        assert "30 of 120" in page
        assert "QLoRA" in page
        assert "1 waiting" in page
        assert "CPU, 2 threads" in page
    assert "<html" not in browser.get("/now").text


def test_a_queue_without_a_worker_says_how_to_start_one(browser: TestClient, db: Session) -> None:
    factories.run(db)
    page = browser.get("/now").text
    assert "1 run waits, but no tuning worker is running" in page
    assert "studio worker tuner" in page


def test_a_worker_that_fell_silent_is_not_counted(browser: TestClient, db: Session) -> None:
    factories.run(db)
    workers.beat(db, Worker(id="w1", kind="tuner", host="box", pid=1))
    db.get_one(Worker, "w1").beat_at = time.time() - workers.ALIVE_SECONDS - 1
    db.commit()
    assert "no tuning worker is running" in browser.get("/now").text


def test_an_experiment_shows_its_best_run_against_the_base(
    browser: TestClient, db: Session
) -> None:
    experiment = factories.experiment(db)
    for method, score in (("lora", 0.85), ("full", 0.925), ("qlora", 0.7)):
        factories.tuned(
            db,
            experiment,
            method=method,
            figures={"precision": "float32"},
            scores={"primary": "accuracy", "metrics": {"accuracy": score}, "num_test": 40},
        )
    db.refresh(experiment)
    key = baselines.key(experiment, "float32")
    db.add(Baseline(key=key, validation_loss=2.0, scores={"metrics": {"accuracy": 0.4}}))
    db.commit()
    page = browser.get("/").text
    assert "92.5 %" in page
    assert ">80.1 to 97.4<" in page  # Wilson's interval of 37 in 40
    assert "+52.5 points" in page
    assert "85.0 %" not in page


# --- Base models ------------------------------------------------------------------------------


def test_each_state_of_a_base_model_says_what_to_do(browser: TestClient, db: Session) -> None:
    ready = factories.base_model(db, name="Ready one", licence="Apache-2.0", note="Small.")
    factories.base_model(db, name="Waiting one", address="a/b", state="waiting")
    at_work = factories.base_model(
        db, name="Third", address="a/c", state="preparing", progress="312 of 988 MB"
    )
    failed = factories.base_model(
        db, name="Fourth", address="a/d", state="failed", error="It is gated.\nAsk for access."
    )
    page = browser.get("/base-models").text
    assert f'href="/experiments/new?base={ready.id}"' in page
    assert "Apache-2.0" in page
    assert "1,000,000" in page
    assert "studio worker generator" in page
    assert "312 of 988 MB" in page
    assert "It is gated.\nAsk for access." in page
    assert f'action="/base-models/{failed.id}/retry"' in page
    part = browser.get(f"/base-models/{at_work.id}/state").text
    assert f'hx-get="/base-models/{at_work.id}/state"' in part
    assert "hx-get" not in browser.get(f"/base-models/{ready.id}/state").text  # it is done


def test_a_base_model_is_added_from_the_hub(browser: TestClient) -> None:
    answer = browser.post("/base-models", data={"source": "hub", "address": " org/model "})
    assert answer.status_code == 303
    [added] = browser.get("/api/base-models").json()
    assert (added["address"], added["state"]) == ("org/model", "waiting")
    assert "org/model" in browser.get("/base-models").text


@pytest.mark.parametrize("address", ["", "../../etc", "http://169.254.169.254/a", "a/b/c", "/etc"])
def test_an_address_that_is_no_model_is_refused_at_its_field(
    browser: TestClient, address: str
) -> None:
    answer = browser.post("/base-models", data={"source": "hub", "address": address})
    assert answer.status_code == 422
    assert 'aria-invalid="true"' in answer.text
    assert f'value="{address}"' in answer.text
    told = browser.post("/api/base-models", json={"source": "hub", "address": address})
    assert told.status_code == 422
    assert told.json()["error"]["field"] == "address"
    assert browser.get("/api/base-models").json() == []


def test_folders_of_ones_own_are_offered_and_no_others(browser: TestClient) -> None:
    (storage.models_folder() / "mine").mkdir()
    (storage.models_folder() / "link").symlink_to("/etc")
    page = browser.get("/base-models").text
    assert 'name="address" value="mine"' in page
    assert "link" not in [line.strip() for line in page.splitlines()]
    assert (
        browser.post("/base-models", data={"source": "folder", "address": "mine"}).status_code
        == 303
    )
    for address in ("link", "/etc", "..", "mine/.."):
        sent = {"source": "folder", "address": address}
        assert browser.post("/base-models", data=sent).status_code == 422
    assert (
        browser.post("/base-models", data={"source": "wheel", "address": "x==1"}).status_code == 422
    )


def test_a_failed_base_model_can_be_tried_again(browser: TestClient, db: Session) -> None:
    failed = factories.base_model(db, state="failed", error="No network.")
    assert browser.post(f"/base-models/{failed.id}/retry").status_code == 303
    assert browser.get(f"/api/base-models/{failed.id}").json()["state"] == "waiting"
    assert browser.post(f"/base-models/{failed.id}/retry").status_code == 409
    assert browser.post(f"/api/base-models/{failed.id}/retry").status_code == 409


def test_a_base_model_in_use_stays_and_another_goes(browser: TestClient, db: Session) -> None:
    used = factories.experiment(db).base_model_id
    spare = factories.base_model(db).id
    assert browser.post(f"/base-models/{used}/delete").status_code == 409
    assert browser.delete(f"/api/base-models/{used}").status_code == 409
    assert browser.post(f"/base-models/{spare}/delete").status_code == 303
    assert [one["id"] for one in browser.get("/api/base-models").json()] == [used]
    assert browser.get(f"/api/base-models/{spare}").status_code == 404


# --- Tuned models -----------------------------------------------------------------------------


@pytest.fixture
def adapter(db: Session, browser: TestClient, tiny_model: Path) -> str:
    """A LoRA run's tuned model on a base model whose folder is there; the run's id."""
    base = factories.base_model(db)
    storage.base_model_folder(base.id).parent.mkdir(parents=True, exist_ok=True)
    storage.base_model_folder(base.id).symlink_to(tiny_model)
    return str(
        factories.tuned(
            db,
            factories.experiment(db, base, name="Très <b>long</b> name"),
            best_step=7,
            step=9,
            figures={"size_bytes": 19_500_000, "trainable_parameters": 1234},
            scores={"primary": "accuracy", "metrics": {"accuracy": 0.875, "macro_f1": 0.5}},
        ).id
    )


def test_without_a_finished_run_the_list_says_what_comes_here(browser: TestClient) -> None:
    page = browser.get("/tuned-models").text
    assert "No run has finished yet" in page
    assert 'href="/experiments/new"' in page


def test_the_list_and_the_page_show_what_was_measured(browser: TestClient, adapter: str) -> None:
    for path in ("/tuned-models", f"/tuned-models/{adapter}"):
        page = browser.get(path).text
        assert "Très &lt;b&gt;long&lt;/b&gt; name" in page
        assert "87.5 %" in page
        assert "19.5 MB" in page
        assert f'href="/tuned-models/{adapter}/files/tuned.zip"' in page
    assert "1,234" in page
    assert "0.0005" in page  # the learning rate it was tuned with
    assert re.findall(r"<dt>Seed</dt><dd[^>]*>([^<]*)", page) == ["1"]


def test_a_run_with_a_seed_of_its_own_shows_that_one(browser: TestClient, db: Session) -> None:
    params = methods.get("lora").schema(seed=7).model_dump()
    run = factories.tuned(db, params=params)
    page = browser.get(f"/tuned-models/{run.id}").text
    assert re.findall(r"<dt>Seed</dt><dd[^>]*>([^<]*)", page) == ["7"]


@pytest.mark.parametrize("method", methods.METHODS)
def test_the_shown_code_is_python_with_the_exact_prompt(
    browser: TestClient, db: Session, adapter: str, method: str
) -> None:
    run = factories.tuned(db, runs.get(db, adapter).experiment, method=method)
    page = browser.get(f"/tuned-models/{run.id}").text
    code = html.unescape(page.split('<pre class="text" tabindex="0">')[1].split("</pre>")[0])
    names = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    assert ("PeftModel" in names) == methods.get(method).frozen_base
    assert ("BitsAndBytesConfig" in names) == methods.get(method).quantizes
    [prompt] = [
        node.value.value  # type: ignore[attr-defined]
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Assign) and node.targets[0].id == "prompt"  # type: ignore[attr-defined]
    ]
    assert prompt.startswith("<|im_start|>user\nClassify as one of delivery")
    assert prompt.endswith("<|im_start|>assistant\n")


def test_a_download_is_an_archive_with_plain_names(browser: TestClient, adapter: str) -> None:
    for path in (f"/tuned-models/{adapter}", f"/api/tuned-models/{adapter}"):
        answer = browser.get(f"{path}/files/tuned.zip")
        assert answer.status_code == 200
        name = answer.headers["Content-Disposition"].removeprefix("attachment; filename=")
        assert name == f'"tr-s-b-long-b-name-lora-tuned-{adapter[:6]}.zip"'
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            assert archive.testzip() is None
            folder = name.strip('"').removesuffix(".zip")
            assert archive.namelist() == [
                f"{folder}/adapter_config.json",
                f"{folder}/adapter_model.safetensors",
                f"{folder}/README.md",
            ]
            assert archive.read(f"{folder}/adapter_model.safetensors") == b"\0" * 100


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("source", ["hub", "folder"])
def test_a_download_says_what_it_is_and_how_to_load_and_prompt_it(
    browser: TestClient, db: Session, adapter: str, method: str, source: str
) -> None:
    of = runs.get(db, adapter).experiment
    of.base_model.source = source
    run = factories.tuned(db, of, method=method)
    (folder := storage.whole_model_folder(run.id)).mkdir()
    (folder / "model.safetensors").write_bytes(b"\1" * 10)
    run.whole_state = "ready"
    db.commit()
    for which in ("tuned", "whole"):
        sent = browser.get(f"/tuned-models/{run.id}/files/{which}.zip")
        with zipfile.ZipFile(io.BytesIO(sent.content)) as archive:
            [name] = [name for name in archive.namelist() if name.endswith("/README.md")]
            text = archive.read(name).decode()
        assert of.template in text
        assert f": {naming.name(run)}\n" in text
        assert "| Learning rate |" in text
        assert "{{input}}" in text.partition("## How a prompt is put together")[2]
        code = text.partition("```python\n")[2].partition("```")[0]
        names = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
        with_base = methods.get(method).frozen_base and which == "tuned"
        assert ("PeftModel" in names) == with_base
        assert ("base_models/" in text) == (with_base and source != "hub")
        assert f"./{name.partition('/')[0]}" in code
        assert str(storage.home()) not in text  # nothing of this machine


@pytest.mark.parametrize(("which", "status"), [("last", 404), ("whole", 409), ("x", 422)])
def test_what_is_not_there_cannot_be_downloaded(
    browser: TestClient, adapter: str, which: str, status: int
) -> None:
    assert browser.get(f"/tuned-models/{adapter}/files/{which}.zip").status_code == status


def test_a_whole_model_is_asked_for_followed_and_downloaded(
    browser: TestClient, db: Session, adapter: str
) -> None:
    address = f"/tuned-models/{adapter}"
    assert browser.post(f"{address}/whole").status_code == 303
    part = browser.get(f"{address}/whole").text
    assert "Waiting for a generating worker" in part
    assert f'hx-get="{address}/whole"' in part
    run = runs.get(db, adapter)
    run.whole_state = "ready"
    db.commit()
    folder = storage.whole_model_folder(adapter)
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"\1" * 10)
    part = browser.get(f"{address}/whole").text
    assert "hx-get" not in part
    archive = browser.get(f"{address}/files/whole.zip").content
    assert zipfile.ZipFile(io.BytesIO(archive)).namelist()[0].endswith("/model.safetensors")


def test_a_prompt_vector_offers_no_whole_model(browser: TestClient, db: Session) -> None:
    run = factories.tuned(db, method="prompt_tuning", figures={"num_virtual_tokens": 20})
    page = browser.get(f"/tuned-models/{run.id}").text
    assert "Prompt vector" in page
    assert "/whole" not in page
    assert browser.post(f"/tuned-models/{run.id}/whole").status_code == 409


def test_deleting_takes_the_files_and_leaves_the_run(
    browser: TestClient, db: Session, adapter: str
) -> None:
    other = factories.tuned(db, runs.get(db, adapter).experiment, method="full").id
    assert browser.post(f"/tuned-models/{adapter}/delete").headers["location"] == "/tuned-models"
    assert browser.delete(f"/api/tuned-models/{other}").status_code == 204
    assert browser.get("/api/tuned-models").json() == []
    assert browser.get(f"/tuned-models/{adapter}").status_code == 404
    assert storage.tuned_model_folder(adapter).exists()  # for a day
    assert runs.get(db, adapter).scores["metrics"]["accuracy"] == 0.875
