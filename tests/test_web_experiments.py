"""Pages of experiments: the form, the page that lives, the comparison, the runs, and their JSON."""

import csv
import io
import json
import math
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy.orm import Session

from app import (
    base_models,
    database,
    datasets,
    experiments,
    lengths,
    methods,
    points,
    prompts,
    runs,
    storage,
    tuning,
)
from app.comparison import baselines
from app.comparison.baselines import Given
from app.tables import BaseModel, Dataset, Experiment, Run
from app.web import formats, panels
from tests import factories, tiny, web
from tests.factories import measured

HOSTILE = "<script>alert(1)</script> \"quoted\" 'single' {{ 7 * 7 }} &amp;"


@pytest.fixture
def browser(db: Session) -> TestClient:
    return web.client()


@pytest.fixture
def ready(db: Session) -> tuple[BaseModel, Dataset]:
    """A base model with a tokenizer, and a dataset."""
    lengths._counted.cache_clear()
    prompts.formatter.cache_clear()
    base_model = factories.base_model(db)
    tiny.tokenizer(storage.base_model_folder(base_model.id))
    return base_model, factories.dataset(db)


def _form(ready: tuple[BaseModel, Dataset], **changes: Any) -> dict[str, Any]:
    given = {
        "name": "First",
        "base_model_id": ready[0].id,
        "dataset_id": ready[1].id,
        "filled_for": ready[1].id,
        "task": "classification",
        "labels": "delivery\r\nrefund\r\naccount",
        "template": "Labels: {{labels}}\r\n{{input}}",
        "seed": "1",
        "methods": ["lora"],
    }
    return given | changes


def _field(page: str, name: str) -> str:
    """The value of an input or textarea."""
    found = re.search(rf'<input[^>]* name="{name}" value="([^"]*)"', page) or re.search(
        rf'<textarea[^>]* name="{name}"[^>]*>\n(.*?)</textarea>', page, re.DOTALL
    )
    assert found, name
    return unescape(found[1])


def _stored() -> list[Experiment]:
    # A session of its own that only reads: one that may write would lock the others out.
    with database.reading() as db:
        return experiments.all(db)


def _run(run_id: str) -> Run:
    with database.reading() as db:
        return runs.get(db, run_id)


# --- The form ---------------------------------------------------------------------------------


def test_without_data_or_model_the_form_says_what_comes_first(
    browser: TestClient, db: Session
) -> None:
    assert "First, a dataset" in browser.get("/experiments/new").text
    factories.dataset(db)
    assert "First, a base model" in browser.get("/experiments/new").text
    factories.base_model(db, state="preparing", progress="fetching 40 of 98 MB")
    assert "fetching 40 of 98 MB" in browser.get("/experiments/new").text


def test_the_form_is_filled_from_the_data(
    browser: TestClient, db: Session, ready: tuple[BaseModel, Dataset]
) -> None:
    factories.dataset(db, name="Another", report={})
    page = browser.get(f"/experiments/new?dataset={ready[1].id}").text
    assert _field(page, "name") == "Messages"
    assert _field(page, "labels").split() == factories.LABELS
    assert _field(page, "template") == prompts.TASKS["classification"].template
    assert re.search(r'<option value="classification" selected>', page)
    assert all(words in page for words in ("25 examples", "20 examples", "15 examples"))  # split
    other = browser.get("/experiments/new").text
    assert re.search(r'<option value="generation" selected>', other)


def test_form_and_command_line_begin_with_the_task_of_the_outputs(
    browser: TestClient, db: Session, ready: tuple[BaseModel, Dataset], tmp_path: Path
) -> None:
    outputs = {
        "classification": [f"intent {n % 77}" for n in range(400)],
        "extraction": [f'{{"size": {n}}}' for n in range(60)],
    }
    for task, texts in outputs.items():
        rows = [{"frage": f"text {n}", "antwort": text} for n, text in enumerate(texts)]
        (data := tmp_path / f"{task}.json").write_text(json.dumps(rows))
        asked = tuning.Question(str(data), "lora", ready[0].name, "", "", "", 1, [])
        asked = asked._replace(columns=("frage", "antwort"))
        made = tuning._create(db, asked, {"lora": {}})
        assert (made.task, made.template) == (task, prompts.TASKS[task].template)
        page = browser.get(f"/experiments/new?dataset={made.dataset_id}").text
        assert f'<option value="{task}" selected>' in page
        assert unescape(_field(page, "template")) == made.template
        db.rollback()


def test_a_shipped_set_begins_with_its_own_task_and_template(
    browser: TestClient, db: Session, ready: tuple[BaseModel, Dataset]
) -> None:
    for key, example in datasets.EXAMPLES.items():
        dataset = datasets.add_example(db, key)
        dataset.name = "Renamed"
        db.commit()
        page = unescape(browser.get(f"/experiments/new?dataset={dataset.id}").text)
        assert f'<option value="{example.task}" selected>' in page
        assert _field(page, "template") == example.template


@pytest.mark.parametrize("key", methods.METHODS)
def test_each_method_stands_with_what_is_documented_and_its_parameters(
    browser: TestClient, ready: tuple[BaseModel, Dataset], key: str
) -> None:
    page = unescape(browser.get("/experiments/new").text)
    method = methods.METHODS[key]
    texts = (method.summary, method.tunes, method.outcome, method.duration, *method.steps)
    assert all(text in page for text in texts)
    assert f'<a href="{method.paper[1]}" rel="noopener">' in page
    assert "As documented" in page
    for name, field in method.schema.model_fields.items():
        assert f'name="{key}.{name}"' in page
        assert field.description in page
    assert f'id="{key}-pace">8 examples an update' in page


def test_what_was_measured_stands_beside_what_is_documented(
    browser: TestClient, db: Session, ready: tuple[BaseModel, Dataset]
) -> None:
    def cards() -> dict[str, str]:
        page = unescape(browser.get(f"/experiments/new?base={ready[0].id}").text)
        return {
            key: page.split(f'id="{key}-title"')[1].split("</section>")[0]
            for key in methods.METHODS
        }

    assert all("figures stand here after the first run" in card for card in cards().values())
    mine, other = factories.experiment(db, ready[0]), factories.experiment(db)
    for of, seconds, memory in ((mine, 65, 812.0), (mine, 130, 1900.0), (other, 900, 9000.0)):
        figures = {"peak_memory_mb": memory, "size_bytes": 3_600_000}
        factories.tuned(db, of, train_seconds=seconds, figures=figures)
    factories.run(db, mine, method="full", state="failed", train_seconds=7.0)
    db.commit()
    lora = cards()["lora"]
    for words in ("1 min 05 s to 2 min 10 s", "812 MB to 1.9 GB", ">3.6 MB<", "model, 2 runs"):
        assert words in lora
    assert "figures stand here after the first run" in cards()["full"]


def test_a_quantized_base_model_leaves_one_method_and_says_why(
    browser: TestClient, db: Session
) -> None:
    model = factories.base_model(db, name="Packed", quantization="bitsandbytes")
    tiny.tokenizer(storage.base_model_folder(model.id))
    factories.dataset(db)
    page = unescape(browser.get("/experiments/new").text)
    boxes = dict(re.findall(r'id="use-(\w+)" name="methods" value="\w+"([^>]*)>', page))
    assert [key for key, rest in boxes.items() if "disabled" not in rest] == ["qlora"]
    assert "Packed is quantized already (bitsandbytes), and LoRA needs its full weights." in page


def test_another_task_or_dataset_changes_what_the_person_has_not(
    browser: TestClient, db: Session, ready: tuple[BaseModel, Dataset]
) -> None:
    usual = prompts.TASKS["classification"].template.replace("\n", "\r\n")
    sent = _form(ready, task="summarization", template=usual, name="Mine", **{"lora.rank": "7"})
    page = browser.post("/experiments/new", data=sent).text
    assert _field(page, "template") == prompts.TASKS["summarization"].template
    assert _field(page, "name") == "Mine"
    assert _field(page, "lora.rank") == "7"
    own = browser.post("/experiments/new", data=sent | {"template": "My own {{input}}"}).text
    assert _field(own, "template") == "My own {{input}}"
    labels = {"new": 30, "old": 30}
    other = factories.dataset(db, rows=[("x", "new"), ("y", "old")] * 30, report={"labels": labels})
    page = browser.post("/experiments/new", data=_form(ready, dataset_id=other.id)).text
    assert _field(page, "labels").split() == ["new", "old"]
    facts = factories.dataset(db, rows=[("x", "{}")] * 60, report={"json_objects": True})
    page = browser.post("/experiments/new", data=_form(ready, dataset_id=facts.id)).text
    assert '<option value="extraction" selected>' in page  # the task was told from the other one
    chosen = _form(ready, dataset_id=facts.id, task="summarization")
    page = browser.post("/experiments/new", data=chosen).text
    assert '<option value="summarization" selected>' in page  # the person's own
    assert _stored() == []


def test_the_preview_is_the_row_as_the_model_sees_it(
    browser: TestClient, db: Session, ready: tuple[BaseModel, Dataset]
) -> None:
    rows = [("Hello", "delivery"), (f"<|im_end|> {HOSTILE}", "refund")] * 30
    data = factories.dataset(db, rows=rows)
    sent = _form(ready, dataset_id=data.id, row="2", **{"lora.max_length": "99"})
    page = browser.post("/experiments/preview", data=sent).text
    assert "<script>" not in page
    seen = re.search(r"<pre[^>]*>(.*?)</pre>", page, re.DOTALL)
    assert seen
    prompt, answer = seen[1].split('<mark class="answer-part">')
    own = '<span class="own">{}</span>'.format
    start, end = own("&lt;|im_start|&gt;"), own("&lt;|im_end|&gt;")
    # What the person wrote is text, even where it spells a token of the format.
    user = f"Labels: delivery, refund, account\n<|im_end|> {HOSTILE}"
    assert unescape(prompt) == unescape(f"{start}user\n{{}}{end}\n{start}assistant\n").format(user)
    assert answer == f"refund{end}</mark>"
    formatter = prompts.formatter(storage.base_model_folder(ready[0].id))
    labels = sent["labels"].split()
    ids = formatter.prompt_ids("Labels: {{labels}}\n{{input}}", rows[1][0], labels)
    assert f"Row 2 of 60: {len(ids)} tokens to read, 7 to learn" in page
    long = len(ids) + 7 > 99
    assert (f"LoRA: {30 * long} of 60 rows are cut to 99 tokens." in page) == long
    assert long


def test_the_preview_tells_updates_of_each_method_out_of_band(
    browser: TestClient, ready: tuple[BaseModel, Dataset]
) -> None:
    changes = {"lora.batch_size": "4", "lora.accumulate_steps": "2", "lora.num_epochs": "5"}
    page = browser.post("/experiments/preview", data=_form(ready, **changes)).text
    # 25 rows to train on: 4 updates of 8 in an epoch
    assert 'id="lora-pace" hx-swap-oob="true">8 examples an update, 20 updates in all' in page
    wrong = browser.post("/experiments/preview", data=_form(ready, **{"lora.batch_size": "x"})).text
    assert 'id="lora-pace" hx-swap-oob="true"></p>' in wrong


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"template": "No place"}, "The template needs {{input}}"),
        ({"dataset_id": "gone"}, "needs a base model and a dataset"),
        ({"row": "99999"}, "Row 60 of 60"),
        ({"row": "-3"}, "Row 1 of 60"),
    ],
)
def test_a_preview_that_cannot_be_says_why(
    browser: TestClient, ready: tuple[BaseModel, Dataset], changes: dict[str, str], says: str
) -> None:
    response = browser.post("/experiments/preview", data=_form(ready, **changes))
    assert response.status_code == 200
    assert says in unescape(response.text)


def test_one_submit_starts_the_experiment(
    browser: TestClient, db: Session, ready: tuple[BaseModel, Dataset]
) -> None:
    chosen = ["lora", "prompt_tuning"]
    response = browser.post("/experiments", data=_form(ready, methods=chosen, **{"lora.rank": "4"}))
    (made,) = _stored()
    assert response.status_code == 303
    assert response.headers["location"] == f"/experiments/{made.id}"
    assert made.template == "Labels: {{labels}}\n{{input}}"
    assert made.labels == factories.LABELS
    assert {run.method: run.state for run in made.runs} == dict.fromkeys(chosen, "queued")
    assert next(run.params["rank"] for run in made.runs if run.method == "lora") == 4


@pytest.mark.parametrize(
    ("changes", "field", "says"),
    [
        ({"name": " "}, "name", "Give the experiment a name"),
        ({"name": "x" * 150}, "name", "1 to 100 characters"),
        ({"base_model_id": "gone"}, "base_model_id", "Choose a base model."),
        ({"dataset_id": ""}, "dataset_id", "Choose a dataset."),
        ({"seed": "1.5"}, "seed", "whole number"),
        ({"seed": "²"}, "seed", "whole number"),
        ({"template": "Nothing"}, "template", "needs {{input}}"),
        ({"labels": "one"}, "labels", "2 to 200 labels"),
        ({"methods": []}, "methods", "Choose at least one method."),
        ({"methods": ["nonsense"]}, "methods", "Choose at least one method."),
        ({"lora.rank": "0"}, "lora-rank", "Rank: give a whole number from 1 to 256."),
        ({"lora.max_length": "4096"}, "lora-max_length", "reads at most 2048 tokens"),
        (
            {"methods": ["prompt_tuning"], "prompt_tuning.initialization": "text"},
            "prompt_tuning",
            "needs the initialization text",
        ),
    ],
)
def test_a_wrong_value_shows_the_form_again_with_the_reason_at_its_field(
    browser: TestClient,
    db: Session,
    ready: tuple[BaseModel, Dataset],
    changes: dict[str, Any],
    field: str,
    says: str,
) -> None:
    response = browser.post("/experiments", data=_form(ready, **changes))
    page = unescape(response.text)
    assert response.status_code == 422
    assert _stored() == []
    assert f'<a href="#{field}">' in page  # in the summary, which has the focus
    assert re.search(r'id="problems" tabindex="-1" autofocus', page)
    assert re.search(rf'id="{field}(-error)?"', page)
    assert page.count(says) >= 2
    if field not in ("methods", "prompt_tuning"):
        assert re.search(rf'id="{field}"[^>]*aria-invalid="true"', page)
    for name, value in changes.items():
        if name in ("name", "seed", "template", "lora.rank"):
            assert _field(page, name) == value


def test_all_that_is_wrong_is_said_at_once_and_the_fold_is_open(
    browser: TestClient, ready: tuple[BaseModel, Dataset]
) -> None:
    wrong = {"lora.rank": "0", "lora.weight_decay": "9", "name": HOSTILE * 3, "seed": "x"}
    response = browser.post("/experiments", data=_form(ready, **wrong))
    assert response.status_code == 422
    assert "please mend these 3" in response.text
    assert response.text.count('<details class="fold" open>') == 1
    assert response.text.count('<details class="fold deeper" open>') == 1
    assert "<script>alert" not in response.text
    assert _field(response.text, "name") == HOSTILE * 3


# --- The example ------------------------------------------------------------------------------


def test_the_example_starts_all_methods_with_one_click(browser: TestClient, db: Session) -> None:
    model = base_models.add_default(db)
    model.state, model.shapes = "ready", {"max_positions": 8192}
    db.commit()
    response = browser.post("/experiments/example", data={"example": "support_tickets"})
    (made,) = _stored()
    assert response.headers["location"] == f"/experiments/{made.id}"
    assert {run.method for run in made.runs} == set(methods.METHODS)
    assert browser.post("/experiments/example", data={"example": "nope"}).status_code == 404


def test_the_example_waits_for_its_base_model_and_says_how_far_it_is(
    browser: TestClient, db: Session
) -> None:
    response = browser.post("/experiments/example", data={"example": "support_tickets"})
    assert response.headers["location"] == "/experiments/example/support_tickets"
    (model,) = base_models.all(db)
    model.state, model.progress = "preparing", "converting, 3 of 30"
    db.commit()
    page = browser.get("/experiments/example/support_tickets").text
    assert "converting, 3 of 30" in page
    assert 'hx-trigger="every 1500ms"' in page
    model.state, model.error = "failed", "The wheel is not what it should be."
    db.commit()
    page = browser.get("/experiments/example/support_tickets").text
    assert "The wheel is not what it should be." in page
    assert "hx-trigger" not in page
    model.state = "ready"
    db.commit()
    page = browser.get("/experiments/example/support_tickets").text
    assert "Tune your first model</button>" in page
    assert browser.get("/experiments/example/nope").status_code == 404


# --- The page that lives ----------------------------------------------------------------------


@pytest.fixture
def of(db: Session) -> Experiment:
    """LoRA done and scored, full tuning failed, QLoRA training, prompt tuning queued."""
    of = factories.experiment(db, name=HOSTILE)
    done = factories.run(db, of, method="lora", state="running", num_steps=20)
    points.record(db, done.id, 1, [measured(0, "validation", loss=3.0), measured(1), measured(20)])
    score = {"metrics": {"accuracy": 0.9, "macro_f1": 0.85}, "primary": "accuracy", "num_test": 15}
    made = {"precision": "float32", "trainable_parameters": 5000, "total_parameters": 1_000_000}
    made |= {"peak_memory_mb": 900.0, "size_bytes": 12_000, "products": "float32"}
    runs.finish(db, done.id, 1, scores=score, figures=made, best_loss=0.5, best_step=20)
    failed = factories.run(db, of, method="full", state="running", num_steps=20)
    points.record(db, failed.id, 1, [measured(1, loss=math.nan)])
    runs.fail(db, failed.id, 1, f"The loss was no number. {HOSTILE}")
    training = factories.run(db, of, method="qlora", state="running", num_steps=40)
    points.record(db, training.id, 1, [measured(step, seconds=2.0 * step) for step in range(1, 13)])
    factories.run(db, of, method="prompt_tuning")
    of = experiments.get(db, of.id)
    base = {"metrics": {"accuracy": 0.2, "macro_f1": 0.1}, "primary": "accuracy", "num_test": 15}
    baselines.keep(db, of, "float32", validation_loss=3.1, scores=base)
    given = [Given(row, HOSTILE, float(row % 2), 1.0) for row in of.split["test"]]
    baselines.store_answers(db, done.id, given)
    baselines.store_answers(db, baselines.key(of, "float32"), given)
    return of


def _panels(page: str) -> dict[str, str]:
    """The HTML of each run's panel by method."""
    found = re.findall(r'<article class="run-panel method-(\w+)".*?</article>', page, re.DOTALL)
    parts = re.findall(r'<article class="run-panel.*?</article>', page, re.DOTALL)
    return {key: unescape(part) for key, part in zip(found, parts, strict=True)}


def test_the_page_has_one_panel_a_run_with_what_can_be_done(
    browser: TestClient, of: Experiment
) -> None:
    page = browser.get(f"/experiments/{of.id}").text
    found = _panels(page)
    assert list(found) == ["prompt_tuning", "lora", "qlora", "full"]
    buttons = {key: re.findall(r'action="/runs/\w+/(\w+)"', part) for key, part in found.items()}
    assert buttons == {
        "prompt_tuning": ["pause", "cancel"],
        "lora": [],
        "qlora": ["pause", "cancel"],
        "full": ["retry"],
    }
    for words in ("Training", "step 12 of 40", ">30 %<", "100 tokens/s", "300 MB", "50 to 65 s"):
        assert words in found["qlora"]
    assert 'value="0.3000" max="1"' in found["qlora"]
    assert "The loss was no number." in found["full"]
    assert "0.5000, step 20" in found["lora"]
    assert "In the queue" in found["prompt_tuning"]
    assert 'data-base-loss="3.1"' in page
    assert "data-ended" not in page


@pytest.mark.parametrize("task", prompts.TASKS)
def test_an_experiment_without_runs_says_what_to_do(
    browser: TestClient, db: Session, task: str
) -> None:
    of = factories.experiment(db, task=task, watch=["Where is it?"])
    page = browser.get(f"/experiments/{of.id}").text
    assert "This experiment has no runs" in page
    assert f'href="/experiments/{of.id}/runs/new?method={next(iter(methods.METHODS))}"' in page
    assert "All runs have ended" not in page
    parts = ["comparison", "side-by-side", "report", "samples", "samples/moments", "points"]
    parts += ["points.csv", "answers", "answers.csv", "vote", "vote/result"]
    parts += ["classes"] if task == "classification" else []
    places = [f"/experiments/{of.id}/{part}" for part in parts]
    places += [
        "/",
        "/experiments",
        f"/compare?experiment={of.id}",
        f"/playground?experiment={of.id}",
    ]
    places += [f"/api/experiments/{of.id}{part}" for part in ("", "/comparison", "/votes")]
    answers = {place: browser.get(place).status_code for place in places}
    assert {place: code for place, code in answers.items() if code != 200} == {}


def test_hostile_text_is_text_on_every_page(browser: TestClient, of: Experiment) -> None:
    run = next(run for run in of.runs if run.method == "full")
    pages = ["", "/comparison", "/side-by-side", "/answers", "/vote", "/points"]
    for address in ["/experiments", f"/runs/{run.id}", f"/runs/{run.id}/panel"] + [
        f"/experiments/{of.id}{page}" for page in pages
    ]:
        response = browser.get(address)
        assert response.status_code == 200, address
        assert "<script>alert" not in response.text, address
        assert "49 " not in response.text or "{{ 7 * 7 }}" in unescape(response.text)
        scripts = re.findall(r"<script[^>]*>(.*?)</script>", response.text, re.DOTALL)
        assert not "".join(scripts).strip(), address
        assert " style=" not in response.text
        assert not re.search(r"\son\w+=", response.text.replace(unescape(HOSTILE), ""))


@pytest.mark.parametrize(
    ("step", "train_seconds", "tail", "left"),
    [
        (9, 9.0, [], "estimating"),
        (10, 10.0, [], "81 to 104 s"),
        (50, 100.0, [(40, 60.0), (50, 100.0)], "1 to 4 min"),  # slower of late
        (100, 100.0, [], "0 s"),
    ],
)
def test_time_left_is_a_range_once_it_can_be_told(
    step: int, train_seconds: float, tail: list[tuple[int, float]], left: str
) -> None:
    run = Run(state="running", phase="training", step=step, num_steps=100)
    run.train_seconds = train_seconds
    told = panels.time_left(run, [measured(at, seconds=when) for at, when in tail])  # type: ignore[misc]
    assert told == left
    run.state = "succeeded"
    assert panels.time_left(run, []) == formats.NOTHING


@pytest.mark.parametrize(
    ("phase", "words", "left"),
    [
        ("scoring", "Answering the test examples", "none; scoring"),
        (
            "Scoring the tuned model: answers, 64 of 80",
            "Scoring the tuned model: answers",
            "none; scoring, 64 of 80",
        ),
        ("Measuring the base model, 8 of 9", "Measuring the base model", "none; scoring, 8 of 9"),
        ("waiting for the file store", "Waiting for the file store", formats.NOTHING),
        ("", "Running", "0 s"),
    ],
)
def test_a_run_at_work_says_what_it_does_after_its_last_step(
    phase: str, words: str, left: str
) -> None:
    run = Run(state="running", phase=phase, step=100, num_steps=100, train_seconds=10.0)
    assert panels.words(run) == words
    assert panels.time_left(run, []) == left


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.2, 0.8, "0 to 1 s"),
        (100, 110, "100 to 110 s"),
        (130, 290, "2 to 5 min"),
        (9000, 12000, "2 to 4 h"),
    ],
)
def test_spans_are_told_in_one_unit(low: float, high: float, words: str) -> None:
    assert formats.span(low, high) == words


def test_acts_on_a_run_lead_back_to_its_experiment(
    browser: TestClient, db: Session, of: Experiment
) -> None:
    by = {run.method: run for run in of.runs}
    for method, action, state in (
        ("prompt_tuning", "pause", "paused"),
        ("prompt_tuning", "resume", "queued"),
        ("prompt_tuning", "cancel", "cancelled"),
        ("qlora", "cancel", "cancelling"),
    ):
        run = by[method]
        response = browser.post(f"/runs/{run.id}/{action}")
        assert response.headers["location"] == f"/experiments/{of.id}#run-{run.id}"
        assert _run(run.id).state == state
    response = browser.post(f"/runs/{by['full'].id}/retry")
    (new,) = [run for run in _stored()[0].runs if run.id not in {r.id for r in of.runs}]
    assert response.headers["location"] == f"/experiments/{of.id}#run-{new.id}"
    refused = browser.post(f"/runs/{by['lora'].id}/cancel")
    assert refused.status_code == 409
    assert browser.post("/runs/nothing/cancel").status_code == 404
    assert browser.post(f"/runs/{by['lora'].id}/explode").status_code == 422


def test_a_runs_page_has_parameters_figures_and_history(
    browser: TestClient, of: Experiment
) -> None:
    by = {run.method: run for run in of.runs}
    page = unescape(browser.get(f"/runs/{by['lora'].id}").text)
    for words in ("Learning rate", "0.0005", "all-linear", "12.0 kB", "5,000", "Finished."):
        assert words in page
    computed = re.search(r"Precision of computing</dt>\s*<dd[^>]*>\s*float32", page)
    assert computed
    assert "The loss was no number." in browser.get(f"/runs/{by['full'].id}").text
    assert browser.get("/runs/nothing").status_code == 404


# --- Comparison -------------------------------------------------------------------------------


def _cells(page: str, name: str) -> dict[str, list[str]]:
    """What the cells of that table say, by method."""
    table = re.search(rf'<table class="table {name}">(.*?)</table>', page, re.DOTALL)
    assert table
    rows = re.findall(r'<tr class="method-(\w+)">(.*?)</tr>', table[1], re.DOTALL)
    return {
        key: [
            " ".join(re.sub("<[^>]*>", " ", cell).split())
            for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)
        ]
        for key, row in rows
    }


def test_the_comparison_begins_with_the_base_and_says_the_best_in_words(
    browser: TestClient, of: Experiment
) -> None:
    page = browser.get(f"/experiments/{of.id}/comparison").text
    cells = _cells(page, "compare")
    assert list(cells) == ["base", "prompt_tuning", "lora", "qlora", "full"]
    assert cells["base"][0] == "20.0 % 7.0 to 45.2"
    assert cells["lora"][0] == "90.0 % 66.0 to 97.7 highest"
    assert cells["lora"][2] == "0.5000 lowest"
    assert "highest" not in "".join(cells["qlora"])
    costs = _cells(page, "compare costs")
    assert list(costs) == ["prompt_tuning", "lora", "qlora", "full"]
    assert costs["lora"][3:6] == ["5,000", "0.500 %", "12.0 kB"]
    assert costs["lora"][-1] == "not measured"
    assert "Always the commonest label" in page
    assert f'href="/playground?experiment={of.id}"' in page
    answers = re.search(r'<table class="table answers">(.*?)</table>', page, re.DOTALL)
    assert answers
    assert answers[1].count('<th scope="row"') == 15
    assert answers[1].count('verdict-right">right') == 2 * sum(r % 2 for r in of.split["test"])
    assert "QLoRA" not in answers[1]  # has answered nothing yet


def test_before_anything_is_scored_the_comparison_says_so(browser: TestClient, db: Session) -> None:
    of = factories.experiment(db)
    factories.run(db, of)
    page = browser.get(f"/experiments/{of.id}").text
    assert "Nothing to compare yet" in page
    assert "15 test examples" in page


def test_answers_come_in_pages(browser: TestClient, db: Session) -> None:
    of = factories.experiment(db, data=factories.dataset(db, count=200))
    run = factories.tuned(db, of, scores={"metrics": {"accuracy": 0.5}, "primary": "accuracy"})
    test = of.split["test"]
    baselines.store_answers(db, run.id, [Given(row, f"answer-{row}.", 0.4, 1.0) for row in test])
    shown: list[int] = []
    for number in (1, 2, 3):
        page = browser.get(f"/experiments/{of.id}/side-by-side?page={number}").text
        shown += [int(row) for row in re.findall(r"answer-(\d+)\.", page)]
        assert "40 %" in page
    assert shown == test
    assert f"answer-{test[-1]}." in browser.get(f"/experiments/{of.id}/side-by-side?page=99").text
    assert f"answer-{test[20]}." in browser.get(f"/experiments/{of.id}?page=2").text
    assert browser.get(f"/experiments/{of.id}/side-by-side?page=0").status_code == 422


# --- Curves as table and file -----------------------------------------------------------------


def test_the_curves_stand_in_a_table_and_in_a_file(browser: TestClient, of: Experiment) -> None:
    page = browser.get(f"/experiments/{of.id}/points").text
    assert "not a number" in page
    assert '<th scope="row" class="num fig">20</th>' in page
    response = browser.get(f"/experiments/{of.id}/points.csv")
    assert response.headers["content-type"].startswith("text/csv")
    assert "attachment" in response.headers["content-disposition"]
    rows = list(csv.DictReader(io.StringIO(response.text, newline="")))
    assert len(rows) == 3 + 1 + 12
    assert [row["loss"] for row in rows if row["method"] == "full"] == [""]
    first = next(row for row in rows if row["kind"] == "validation")
    assert (first["method"], first["step"], first["loss"]) == ("lora", "0", "3.0")
    assert browser.get("/experiments/nothing/points.csv").status_code == 404


def test_an_experiment_is_deleted_unless_a_run_is_at_work(
    browser: TestClient, db: Session, of: Experiment
) -> None:
    assert browser.post(f"/experiments/{of.id}/delete").status_code == 409
    training = next(run for run in of.runs if run.method == "qlora")
    runs.cancel(db, training.id)
    runs.settle(db, training.id, 1, "")
    assert browser.post(f"/experiments/{of.id}/delete").headers["location"] == "/experiments"
    assert browser.get(f"/experiments/{of.id}").status_code == 404
    assert "No experiment yet" in browser.get("/experiments").text


# --- JSON -------------------------------------------------------------------------------------


def test_experiments_as_json(
    browser: TestClient, db: Session, ready: tuple[BaseModel, Dataset]
) -> None:
    wanted = {
        "name": "By JSON",
        "base_model_id": ready[0].id,
        "dataset_id": ready[1].id,
        "task": "classification",
        "methods": {"lora": {"rank": 2}, "full": {}},
    }
    made = browser.post("/api/experiments", json=wanted)
    assert made.status_code == 201
    body = made.json()
    assert body["template"] == prompts.TASKS["classification"].template
    assert body["labels"] == factories.LABELS
    assert body["split"] == {"train": 25, "validation": 20, "test": 15}
    assert [(run["method"], run["state"]) for run in body["runs"]] == [
        ("lora", "queued"),
        ("full", "queued"),
    ]
    assert browser.get(f"/api/experiments/{body['id']}").json() == body
    assert [one["id"] for one in browser.get("/api/experiments").json()] == [body["id"]]
    wrong = browser.post("/api/experiments", json=wanted | {"methods": {"lora": {"rank": 0}}})
    assert wrong.status_code == 422
    assert wrong.json()["error"]["field"] == "lora.rank"
    assert browser.post("/api/experiments", json={"name": "x"}).status_code == 422
    run = body["runs"][0]["id"]
    assert browser.post(f"/api/runs/{run}/cancel").json()["state"] == "cancelled"
    assert browser.post(f"/api/runs/{run}/cancel").status_code == 409
    assert browser.post(f"/api/runs/{run}/retry").json()["id"] != run
    assert browser.get(f"/api/runs/{run}").json()["history"][0]["message"] == "Cancelled."
    assert browser.delete(f"/api/experiments/{body['id']}").status_code == 204
    assert browser.get(f"/api/experiments/{body['id']}").status_code == 404


def test_the_comparison_as_json(browser: TestClient, of: Experiment) -> None:
    body = browser.get(f"/api/experiments/{of.id}/comparison", params={"limit": 4}).json()
    assert next(row["key"] for row in body["rows"]) == "base"
    assert body["metric"] == "accuracy"
    assert len(body["answers"]) == 4
    assert body["answers"][0]["answers"][0] == [HOSTILE, float(of.split["test"][0] % 2)]
    failed = next(run for run in of.runs if run.method == "full")
    assert [point["loss"] for point in body["curves"][failed.id]] == [None]
    assert browser.get(f"/api/runs/{failed.id}/points").json() == body["curves"][failed.id]
