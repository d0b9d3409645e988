"""Answers while a run learns: taken beside the training, which they change in nothing."""

import random
import re
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from app import database, experiments, invariants, methods, points, questions, runs, samples, trash
from app.errors import Invalid, LostClaim
from app.settings import settings
from app.tables import Experiment, Run, Sample
from tests import factories, tiny, web
from tests.faults import small
from tests.test_resume import attempt, kill, stop
from worker import hardware
from worker import run as worker_run
from worker import samples as worker_samples

WATCHED = ["1 a", "What is it?\nTell me.", "7 b"]

LONG = pytest.mark.faults


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model(tmp_path_factory.mktemp("samples") / "llama", initializer_range=0.15)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every step, no answers to score, and time for every sample."""
    monkeypatch.setattr(settings, "checkpoint_seconds", 1e-9)
    monkeypatch.setattr(settings, "disk_reserve_mb", 0)
    monkeypatch.setattr(settings, "checkpoint_share", 1.0)
    monkeypatch.setattr(worker_samples, "FREE_SECONDS", 1000.0)
    monkeypatch.setattr(worker_run.scoring, "look_at_base", lambda job, model: None)
    monkeypatch.setattr(worker_run.scoring, "score_run", lambda job: {})
    monkeypatch.setattr(worker_run.scoring, "score_base", lambda job: None)


def _watching(db: Session, model: Path, watched: list[str] = WATCHED) -> Experiment:
    of = small.experiment(db, model)
    of.watch = watched
    db.commit()
    return of


def _frames(run_id: str) -> list[samples.Frame]:
    with database.reading() as db:
        return samples.frames(db, runs.get(db, run_id))


def _looks(run_id: str) -> list[int]:
    return [step for kind, step, *_ in small.curve(run_id) if kind == "validation"]  # type: ignore[misc]


def _check() -> None:
    with database.reading() as db:
        assert invariants.check(db) == []


@pytest.mark.parametrize(
    ("method", "dtype"), [*((key, "float32") for key in methods.METHODS), ("lora", "bfloat16")]
)
def test_the_training_is_the_same_with_and_without(
    db: Session, model: Path, method: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = hardware.Hardware("cpu", dtype, "test", 8000.0, 1)
    monkeypatch.setattr(worker_run.hardware, "find", lambda *sharing: machine)
    params: dict[str, Any] = {"dropout": 0.2} if "lora" in method else {}
    params |= {"gradient_checkpointing": True} if method == "full" else {}
    of = _watching(db, model)
    with_samples = small.run(db, of, method, **params)
    attempt(with_samples.id)
    of.watch = []
    db.commit()
    without = small.run(db, of, method, **params)
    attempt(without.id)
    assert small.now(with_samples.id).state == "succeeded", small.said(with_samples.id)
    assert small.curve(with_samples.id) == small.curve(without.id)
    assert small.left(with_samples.id) == small.left(without.id)
    assert _frames(without.id) == []
    of.watch = WATCHED
    db.commit()
    found = _frames(with_samples.id)
    assert [frame.step for frame in found] == [0, *_looks(with_samples.id)]
    assert all(len(frame.texts) == 3 and None not in frame.texts for frame in found)
    assert found[0].texts != found[-1].texts  # it has learned something
    _check()


def test_answers_are_those_of_the_state_that_was_saved(
    db: Session, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last answers are what the last state answers when it is loaded anew."""
    from app import files, prompts, storage
    from worker import backbones, generate

    # In bf16 a word of this small model may turn on a rounding.
    machine = hardware.find()._replace(dtype=hardware.FLOAT32, products="")
    monkeypatch.setattr(hardware, "find", lambda *_: machine)
    run = small.run(db, _watching(db, model), "lora", num_epochs=3)
    attempt(run.id)
    now = small.now(run.id)
    method = methods.get("lora")
    folder = files.base_model(now.experiment.base_model_id)
    tuned, _ = backbones.load_tuned(
        method,
        method.schema.model_validate(now.params),
        folder,
        storage.last_model_folder(run.id),
        machine,
    )
    formatter = prompts.formatter(folder)
    expected = []
    for watched in WATCHED:
        ids = formatter.prompt_ids("{{input}}", watched, [])
        tokens = generate.stream(
            tuned, None, ids, formatter.stop_ids, temperature=0, max_tokens=64, seed=0
        )
        expected.append(formatter.decode(list(tokens)))
    last = _frames(run.id)[-1]
    for text, whole in zip(last.texts, expected, strict=True):
        assert text is not None
        assert whole.startswith(text)
        assert len(text) <= len("delivery") + 8 + 10  # as long as the longest answer, and some


@pytest.mark.parametrize("method", ["lora", pytest.param("prompt_tuning", marks=LONG)])
def test_after_any_number_of_kills_the_same_samples(db: Session, model: Path, method: str) -> None:
    of = _watching(db, model)
    undisturbed = small.run(db, of, method, num_epochs=2)
    attempt(undisturbed.id)
    expected = _frames(undisturbed.id)
    assert len(expected) > 8
    run = small.run(db, of, method, num_epochs=2)
    draw = random.Random(method)
    kills = 0
    while small.now(run.id).state == "queued":
        how = draw.choice([kill, stop("ending")])
        # Each answer looks once a token: late enough for every attempt to get on by a step.
        attempt(run.id, {draw.randint(12, 90): how})
        kills += 1
        _check()
    assert small.now(run.id).state == "succeeded", small.said(run.id)
    assert kills >= 3
    assert _frames(run.id) == expected
    assert small.curve(run.id) == small.curve(undisturbed.id)


def test_a_stop_between_a_look_and_its_answers_loses_none(
    db: Session, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small.run(db, _watching(db, model), "lora", validation_interval=2)
    real = worker_samples.Samples._answer
    seen: list[int] = []

    def answer(self: Any) -> None:
        seen.append(self.state.step)
        if seen.count(4) == 1 and seen[-1] == 4:
            stop("ending")()
        real(self)

    monkeypatch.setattr(worker_samples.Samples, "_answer", answer)
    attempt(run.id)
    assert [frame.step for frame in _frames(run.id)] == [0, 2]
    attempt(run.id)
    assert small.now(run.id).state == "succeeded", small.said(run.id)
    assert [frame.step for frame in _frames(run.id)] == [0, *_looks(run.id)]
    assert seen.count(4) == 2
    assert seen.count(0) == 1


def test_what_takes_too_long_is_left_out_and_that_is_said(
    db: Session, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_samples, "FREE_SECONDS", -1000.0)
    run = small.run(db, _watching(db, model), "lora")
    attempt(run.id)
    assert [frame.step for frame in _frames(run.id)] == [0, _looks(run.id)[-1]]
    (line,) = [line for line in small.said(run.id) if "inputs to watch" in line]
    assert "more than 3% of the training so far" in line


def test_an_input_longer_than_the_model_reads_is_cut(db: Session, model: Path) -> None:
    run = small.run(db, _watching(db, model, ["long " * 700, "1 a"]), "prompt_tuning", num_epochs=1)
    attempt(run.id)
    assert small.now(run.id).state == "succeeded", small.said(run.id)
    assert None not in _frames(run.id)[-1].texts


def test_recording_is_fenced_and_can_be_done_twice(any_db: Session) -> None:
    run = factories.run(any_db, factories.experiment(any_db, watch=["a", "b"]), state="running")
    for _ in range(2):
        samples.record(any_db, run.id, 1, 4, ["one", "two"])
    assert [(s.place, s.text) for s in any_db.scalars(select(Sample))] == [(0, "one"), (1, "two")]
    assert samples.has(any_db, run.id, 4)
    assert not samples.has(any_db, run.id, 5)
    with pytest.raises(LostClaim):
        samples.record(any_db, run.id, 2, 5, ["one", "two"])
    assert not samples.has(any_db, run.id, 5)


@pytest.mark.parametrize(
    ("step", "looked", "left"),
    [(5, 4, [0, 4]), (5, 2, [0]), (5, -1, [0]), (0, -1, [0]), (8, 8, [0, 4, 8])],
)
def test_a_rewind_takes_back_what_is_answered_again(
    db: Session, step: int, looked: int, left: list[int]
) -> None:
    of = factories.experiment(db, watch=["a"])
    run = factories.run(db, of, state="running", step=9)
    for at in (0, 4, 8):
        samples.record(db, run.id, 1, at, ["x"])
    points.rewind(db, run.id, 1, step, looked=looked)
    assert [frame.step for frame in samples.frames(db, run)] == left


def test_they_go_with_their_experiment(db: Session) -> None:
    of = factories.experiment(db, watch=["a"])
    run = factories.run(db, of, state="running")
    samples.record(db, run.id, 1, 0, ["x"])
    runs.cancel(db, run.id)
    runs.settle(db, run.id, 1, "")
    trash.throw_away(db, "experiment", of.id)
    trash.purge(db, "experiment", of.id)
    assert db.scalars(select(Sample)).all() == []


@pytest.mark.parametrize(("step", "place"), [(7, 0), (3, 1)])
def test_a_sample_that_does_not_fit_its_run_is_found(db: Session, step: int, place: int) -> None:
    run = factories.run(db, factories.experiment(db, watch=["a"]), step=5)
    db.add(Sample(run_id=run.id, step=step, place=place, attempt=1, text="x"))
    db.commit()
    assert "samples_fit_their_run" in [found.rule for found in invariants.check(db)]


# --- What may be asked ------------------------------------------------------------------------


def test_which_inputs_can_be_watched() -> None:
    assert questions.watch([" a", "", "b", "  ", " a"]) == [" a", "b"]
    for wrong, reason in (
        (list("abcdef"), "At most 5"),
        (["x" * 4001], "4,000 characters"),
        (["a\0"], "no text"),
        (["\ud800"], "no text"),
    ):
        with pytest.raises(Invalid, match=reason) as refused:
            questions.watch(wrong)
        assert refused.value.field == "watch"


def _form(db: Session, watch: str) -> dict[str, str]:
    return {
        "name": "Watched",
        "base_model_id": factories.base_model(db).id,
        "dataset_id": factories.dataset(db).id,
        "task": "classification",
        "template": "{{input}}",
        "labels": "delivery\nrefund",
        "seed": "1",
        "methods": "lora",
        "override": "on",
        "watch": watch,
    }


def test_the_form_the_api_and_the_pages(db: Session) -> None:
    with web.client() as client:
        sent = _form(db, "Where is it?\r\n\r\n<b>Why</b>\r\n")
        assert 'name="watch"' in client.get("/experiments/new").text
        answer = client.post("/experiments", data=sent)
        assert answer.status_code == 303, answer.text
        key = answer.headers["location"].rpartition("/")[2]
        made = experiments.get(db, key)
        assert made.watch == ["Where is it?", "<b>Why</b>"]
        refused = client.post("/experiments", data=_form(db, "\n".join("abcdef")))
        assert refused.status_code == 422
        assert "At most 5 inputs can be watched." in refused.text
        assert "a\nb\nc\nd\ne\nf</textarea>" in refused.text

        run = made.runs[0]
        assert "No answers yet" in client.get(f"/runs/{run.id}").text
        db.add_all(
            Sample(run_id=run.id, step=step, place=place, attempt=1, text=f"<i>{step} {place}")
            for step in (0, 10)
            for place in (0, 1)
        )
        found = db.get(Run, run.id)
        assert found
        found.step, found.num_steps = 10, 20
        db.commit()
        page = client.get(f"/runs/{run.id}").text
        for text in ("&lt;b&gt;Why", "&lt;i&gt;10 1", "Step 0", "Step 10"):
            assert text in page
        assert f'href="/experiments/{key}/samples"' in client.get(f"/experiments/{key}").text
        page = client.get(f"/experiments/{key}/samples").text
        for text in ("&lt;b&gt;Why", "&lt;i&gt;10 1", "50 %", "LoRA"):
            assert text in page
        for path in (f"/runs/{run.id}", f"/experiments/{key}/samples"):
            again = re.findall(r'hx-get="([^"]+seen=[^"]+)"', client.get(path).text)
            assert [client.get(one).status_code for one in again] == [204]
            assert "&lt;i&gt;10 1" in client.get(again[0].partition("?")[0]).text
        assert client.get(f"/api/runs/{run.id}/samples").json() == [
            {"step": 0, "texts": ["<i>0 0", "<i>0 1"]},
            {"step": 10, "texts": ["<i>10 0", "<i>10 1"]},
        ]
        assert client.get(f"/api/experiments/{key}").json()["watch"] == made.watch
        plain = factories.run(db)
        assert "nswers while it learn" not in client.get(f"/runs/{plain.id}").text
        asked = {
            name: made_of
            for name, made_of in sent.items()
            if name in ("name", "base_model_id", "dataset_id")
        } | {"methods": {"lora": {}}, "override": True, "watch": ["One\nTwo"]}
        answer = client.post("/api/experiments", json=asked)
        assert answer.json()["watch"] == ["One\nTwo"]
        assert client.post("/api/experiments/forecast", json=asked).status_code == 200
