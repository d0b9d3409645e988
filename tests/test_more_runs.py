"""More runs in one experiment: copies, sweeps and seeds, their names, and what is refused."""

import re
from html import unescape
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy.orm import Session

from app import experiments, methods, more_runs, naming, runs
from app.comparison import spread
from app.errors import Conflict, Invalid, NotFound
from app.tables import Answer, BaseModel, Dataset, Experiment, Run, Sample, Vote
from app.web import forms
from tests import factories, web
from tests.test_web_forecast import ready as ready
from tests.test_web_forecast import worker

Ready = tuple[BaseModel, Dataset]


@pytest.fixture
def browser(db: Session) -> TestClient:
    return web.client()


def _names(db: Session, of: Experiment) -> list[str]:
    found = experiments.get(db, of.id).runs
    return sorted(naming.names(found).values())


# --- What is added ----------------------------------------------------------------------------


def test_a_copy_is_queued_with_what_differs(any_db: Session) -> None:
    of = factories.experiment(any_db)
    old = factories.tuned(any_db, of)
    [new] = more_runs.add(any_db, of.id, "lora", old.params | {"rank": 32}, copied_from=old.id)
    assert (new.state, new.method, new.copied_from) == ("queued", "lora", old.id)
    assert new.params == old.params | {"rank": 32}
    assert new.experiment_id == of.id
    assert _names(any_db, of) == ["LoRA · rank 16", "LoRA · rank 32"]


def test_a_sweep_leaves_out_what_is_there(db: Session) -> None:
    of = factories.experiment(db)
    old = factories.tuned(db, of)
    rates = [2e-4, 5e-4, 1e-3, 1e-3]
    made = more_runs.add(db, of.id, "lora", old.params, vary="learning_rate", values=rates)
    assert [run.params["learning_rate"] for run in made] == [2e-4, 1e-3]
    assert _names(db, of) == [
        f"LoRA · learning rate {rate}" for rate in ("0.0002", "0.0005", "0.001")
    ]


def test_several_seeds_and_the_experiments_own_is_one_of_them(db: Session) -> None:
    of = factories.experiment(db, seed=7)
    old = factories.tuned(db, of)
    made = more_runs.add(db, of.id, "lora", old.params, vary="seed", values=[7, 8, 9])
    assert [run.params["seed"] for run in made] == [8, 9]
    assert _names(db, of) == [f"LoRA · seed {seed}" for seed in (7, 8, 9)]
    with pytest.raises(Invalid, match="just these settings already"):
        more_runs.add(db, of.id, "lora", old.params, vary="seed", values=[7, 8, 9])


def test_what_failed_may_be_asked_for_again(db: Session) -> None:
    of = factories.experiment(db)
    old = factories.run(db, of, state="failed", finished_at=1.0, error="No.")
    more_runs.add(db, of.id, "lora", old.params)
    assert _names(db, of) == ["LoRA", "LoRA (2)"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"params": {"rank": 0}}, "lora.rank"),
        ({"params": {"unheard": 1}}, "lora.unheard"),
        ({"vary": "rank", "values": [8, 9999]}, "values"),
        ({"vary": "rank", "values": []}, "values"),
        ({"vary": "rank", "values": list(range(1, 12))}, "values"),
        ({"vary": "target_modules", "values": ["a"]}, "vary"),
        ({"method": "magic"}, "method"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_stored(
    db: Session, changes: dict[str, Any], field: str
) -> None:
    of = factories.experiment(db)
    with pytest.raises(Invalid) as problem:
        more_runs.add(db, of.id, **{"method": "lora", "params": {}} | changes)
    assert problem.value.field == field
    assert experiments.get(db, of.id).runs == []


def test_layers_that_the_base_model_lacks_are_named_before_anything_is_stored(
    db: Session, ready: Ready
) -> None:
    of = factories.experiment(db, *ready)
    with pytest.raises(Invalid, match=r"no layers named query_proj\. Choose from: ") as problem:
        more_runs.add(db, of.id, "lora", {"target_modules": "q_proj, query_proj"})
    assert problem.value.field == "lora.target_modules"
    assert experiments.get(db, of.id).runs == []


def test_an_experiment_holds_so_many_runs(db: Session) -> None:
    of = factories.experiment(db)
    for seed in range(2, more_runs.MOST_RUNS):
        factories.run(db, of, params={"seed": seed})
    with pytest.raises(Invalid, match="at most 60"):
        more_runs.add(db, of.id, "lora", {}, vary="rank", values=[2, 4, 8])


def test_the_rules_of_admission_are_the_same(db: Session, ready: Ready) -> None:
    of = factories.experiment(db, *ready)
    worker(db, 300)
    with pytest.raises(Invalid, match="fits no tuning worker") as problem:
        more_runs.add(db, of.id, "lora", {})
    assert problem.value.field == "override"
    with pytest.raises(Invalid, match="LoRA · rank 64: it needs about"):
        more_runs.add(db, of.id, "lora", {}, vary="rank", values=[32, 64])
    [run] = more_runs.add(db, of.id, "lora", {}, override=True)
    assert run.forecast["override"]
    base = ready[0]
    base.state = "failed"
    db.commit()
    with pytest.raises(Conflict):
        more_runs.add(db, of.id, "lora", {"rank": 2}, override=True)


def test_what_is_in_the_trash_or_unknown_gets_none(db: Session) -> None:
    of, other = factories.experiment(db), factories.run(db)
    with pytest.raises(NotFound):
        more_runs.add(db, of.id, "lora", {}, copied_from=other.id)
    of.trashed_at = 1.0
    db.commit()
    with pytest.raises(NotFound):
        more_runs.add(db, of.id, "lora", {})


def test_suggestions_stay_in_range_and_hold_the_value() -> None:
    of = Experiment(seed=3)
    assert more_runs.suggested(of, "lora", "rank", 16) == [4, 8, 16, 32, 64]
    assert more_runs.suggested(of, "lora", "rank", 1) == [1, 2, 4]
    assert more_runs.suggested(of, "lora", "rank", 256) == [64, 128, 256]
    assert more_runs.suggested(of, "lora", "learning_rate", 5e-4) == [2.5e-4, 5e-4, 1e-3]
    assert more_runs.suggested(of, "lora", "seed", None) == [3, 4, 5]


# --- Names ------------------------------------------------------------------------------------


def test_names_tell_runs_apart_and_say_no_more(db: Session) -> None:
    of = factories.experiment(db)
    one = factories.run(db, of)
    assert naming.name(experiments.get(db, of.id).runs[0]) == "LoRA"
    factories.run(db, of, method="full")
    factories.run(db, of, params=one.params | {"rank": 32, "gradient_checkpointing": True})
    assert _names(db, of) == [
        "Full fine tuning",
        "LoRA · rank 16, activation checkpointing no",
        "LoRA · rank 32, activation checkpointing yes",
    ]


def test_parameters_of_an_older_version_count_as_the_defaults(db: Session) -> None:
    of = factories.experiment(db)
    one = factories.run(db, of)
    old = {name: value for name, value in one.params.items() if name not in ("seed", "rank")}
    factories.run(db, of, params=old)
    assert _names(db, of) == ["LoRA", "LoRA (2)"]


def test_every_place_names_the_run_and_not_its_method_alone(
    db: Session, browser: TestClient
) -> None:
    of = factories.experiment(db, watch=["Where is it?"])
    old = _scored(db, of, 0.5, rank=16)
    new = _scored(db, of, 0.75, rank=32)
    params = [methods.get("lora").schema(rank=rank).model_dump() for rank in (8, 4)]
    running = factories.run(db, of, params=params[0], state="running")
    queued = factories.run(db, of, params=params[1])
    db.add(Vote(experiment_id=of.id, row=of.split["test"][0], shown=[[old.id], [new.id]], choice=1))
    for run, text in ((old, "refund"), (new, "account")):
        db.add(Answer(owner=run.id, row=of.split["test"][0], text=text, score=1.0))
        db.add(Sample(run_id=run.id, step=0, place=0, attempt=1, text="In the post."))
    db.commit()
    one = f"/experiments/{of.id}"
    trained, at_work = {"LoRA · rank 16", "LoRA · rank 32"}, {"LoRA · rank 8", "LoRA · rank 4"}
    for path, names in {
        "/": {"LoRA · rank 32", "LoRA · rank 8"},  # the best one, and what runs
        "/queue": at_work,
        "/experiments": trained | at_work,
        "/tuned-models": trained,
        f"/tuned-models/{new.id}": {"LoRA · rank 32"},
        f"/runs/{new.id}": {"LoRA · rank 32"},
        f"/playground?experiment={of.id}": trained,
        one: trained | at_work,
        f"{one}/samples": trained | at_work,
        f"{one}/answers": trained,
        f"{one}/classes": trained,
        f"{one}/vote/result": trained,
        f"{one}/report": trained | at_work,
        f"/compare?runs={old.id},{new.id}": trained,
    }.items():
        page = _text(browser.get(path).text)
        assert not {name for name in names if name not in page}, path
        assert not re.search("LoRA(?! (·|with|keeps|trains))", page), path
    lines = browser.get("/api/queue").json()
    assert [line["name"] for line in lines["running"] + lines["queued"]] == [
        naming.name(run) for run in (running, queued)
    ]
    assert browser.get(f"/api/tuned-models/{new.id}").json()["name"] == "LoRA · rank 32"


# --- The luck of training ---------------------------------------------------------------------


def _scored(db: Session, of: Experiment, score: float, **params: Any) -> Run:
    full = methods.get("lora").schema(**params).model_dump()
    scores = {"metrics": {"accuracy": score}, "primary": "accuracy"}
    return factories.tuned(db, of, params=full, scores=scores)


def test_the_spread_of_seeds(db: Session, browser: TestClient) -> None:
    of = factories.experiment(db)
    for seed, score in ((None, 0.8), (2, 0.9), (3, 0.7)):
        _scored(db, of, score, seed=seed)
    for seed, score in ((None, 0.5), (2, 0.6)):
        _scored(db, of, score, seed=seed, rank=2)
    _scored(db, of, 0.1, rank=4)  # alone
    _scored(db, of, 0.1, rank=4, seed=1)  # the same seed, said otherwise
    three, two = spread.of(experiments.get(db, of.id))
    assert (three.label, three.seeds) == ("LoRA · rank 16", [1, 2, 3])
    assert (three.low, three.high) == (0.7, 0.9)
    assert three.mean == pytest.approx(0.8)
    assert three.deviation == pytest.approx(0.1)  # of a sample
    assert (two.label, two.seeds, two.deviation) == ("LoRA · rank 2", [1, 2], None)
    db.commit()
    page = _text(browser.get(f"/experiments/{of.id}").text)
    assert "LoRA · rank 16 1, 2, 3 80.0 % 70.0 % 90.0 % 10.0 points" in page
    assert "55.0 % 50.0 % 60.0 % needs three" in page
    told = browser.get(f"/api/experiments/{of.id}/comparison").json()["seeds"]
    assert [one["seeds"] for one in told] == [[1, 2, 3], [1, 2]]


# --- On the screen and for programs -----------------------------------------------------------


def _sent(run: Run, **changes: str) -> dict[str, str]:
    schema = methods.get(run.method).schema
    given = forms.sent(schema, run.method, schema.model_validate(run.params))
    return given | {"copied_from": run.id, "method": run.method} | changes


def _text(page: str) -> str:
    words = " ".join(unescape(re.sub("<[^>]+>", " ", page)).split())
    return re.sub(r" ([;,.])", r"\1", words)


def test_the_form_begins_with_the_runs_settings(browser: TestClient, db: Session) -> None:
    of = factories.experiment(db)
    run = factories.tuned(db, of, params={"rank": 5, "gradient_checkpointing": True})
    page = browser.get(f"/experiments/{of.id}/runs/new?copy={run.id}").text
    assert re.search(r'name="lora.rank" value="5"', page)
    assert re.search(r'name="lora.gradient_checkpointing" value="on" checked', page)
    assert "Is there already: LoRA" in _text(page)
    sweep = browser.get(f"/experiments/{of.id}/runs/new?copy={run.id}&vary=rank").text
    assert re.search(r'name="values" value="1, 2, 5, 10, 20"', sweep)
    assert "4 runs. Settings that differ from LoRA" in _text(sweep)
    assert "Rank 10 instead of 5" in _text(sweep)


def test_what_would_start_is_shown_before_it_does(
    browser: TestClient, db: Session, ready: Ready
) -> None:
    of = factories.experiment(db, *ready)
    run = factories.tuned(db, of)
    worker(db, 8000)
    sent = _sent(run, **{"lora.rank": "8", "vary": "seed", "values": "1, 2", "values_of": "seed"})
    page = browser.post(f"/experiments/{of.id}/runs/new", data=sent).text
    assert "Rank 8 instead of 16; Seed 2 instead of 1" in _text(page)
    assert page.count("badge-ready") == 2
    assert len(experiments.get(db, of.id).runs) == 1
    db.commit()  # a session that has read holds up who writes
    done = browser.post(f"/experiments/{of.id}/runs", data=sent)
    assert done.status_code == 303
    assert _names(db, of) == [
        "LoRA · rank 16, seed 1",
        "LoRA · rank 8, seed 1",
        "LoRA · rank 8, seed 2",
    ]
    new = experiments.get(db, of.id).runs[-1]
    about = _text(browser.get(f"/runs/{new.id}").text)
    assert "Copied from LoRA · rank 16, seed 1; differs in: Rank 8 instead of 16; Seed 2" in about
    on = _text(browser.get(f"/experiments/{of.id}").text)
    assert on.count("LoRA · rank 8, seed 2") >= 2  # its panel and the chart's legend


def test_the_form_says_what_is_wrong(browser: TestClient, db: Session) -> None:
    of = factories.experiment(db)
    run = factories.tuned(db, of)
    for changes, words in (
        ({"lora.rank": "none"}, "Rank: give a whole number"),
        ({"lora.seed": "-1"}, "Seed: give a whole number from 0"),
        ({"vary": "rank", "values": "8, x", "values_of": "rank"}, "Rank"),
        ({}, "just these settings already"),
    ):
        answer = browser.post(f"/experiments/{of.id}/runs", data=_sent(run, **changes))
        assert answer.status_code == 422
        assert words in _text(answer.text).partition("Nothing was started")[2]
    assert browser.get(f"/experiments/{of.id}/runs/new?copy=nothing").status_code == 404
    assert browser.get(f"/experiments/{of.id}/runs/new?method=magic").status_code == 422


def test_programs_add_runs(browser: TestClient, db: Session) -> None:
    of = factories.experiment(db)
    run = factories.tuned(db, of)
    wanted = {"copied_from": run.id, "params": {"num_epochs": 1}, "vary": "rank", "values": [4, 8]}
    answer = browser.post(f"/api/experiments/{of.id}/runs", json=wanted)
    assert answer.status_code == 201
    assert [one["params"]["rank"] for one in answer.json()] == [4, 8]
    assert {one["params"]["num_epochs"] for one in answer.json()} == {1}
    assert {one["copied_from"] for one in answer.json()} == {run.id}
    plain = browser.post(f"/api/experiments/{of.id}/runs", json={"method": "full"})
    assert [one["method"] for one in plain.json()] == ["full"]
    wrong = browser.post(
        f"/api/experiments/{of.id}/runs", json={"method": "full", "params": {"rank": 1}}
    )
    assert wrong.status_code == 422


def test_an_experiment_that_has_ended_goes_on(browser: TestClient, db: Session) -> None:
    of = factories.experiment(db)
    factories.tuned(db, of)
    assert "data-ended" in browser.get(f"/experiments/{of.id}").text
    [new] = more_runs.add(db, of.id, "lora", {"rank": 2})
    assert "data-ended" not in browser.get(f"/experiments/{of.id}").text
    assert runs.get(db, new.id).experiment.split == of.split
