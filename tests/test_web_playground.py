"""The playground: what can be asked, asking, stopping, asking again; and the same as JSON."""

import re
from html import unescape
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy.orm import Session

from app import completions, database
from app.tables import Completion, Experiment, Run
from tests import factories, web

HOSTILE = "<script>alert(1)</script>\n{{ 7 * 7 }} \"q\" 'q'"


@pytest.fixture
def browser(db: Session) -> TestClient:
    return web.client()


@pytest.fixture
def tuned(db: Session) -> list[Run]:
    """Two tuned models of one experiment, and one of another experiment on the same base model."""
    of = factories.experiment(db)
    other = factories.experiment(db, of.base_model, name="Another", template="Else: {{input}}")
    made = [factories.tuned(db, of, method=key, finished_at=9e9) for key in ("full", "lora")]
    made.append(factories.tuned(db, other, method="qlora", finished_at=5.0))
    assert [run.experiment.base_model for run in made]  # read now, and not while others write
    db.commit()
    return made


def _ask(of: Experiment, chosen: list[str], **changes: Any) -> dict[str, Any]:
    given = {
        "base_model_id": of.base_model_id,
        "models": chosen,
        "input": "Where is it?",
        "applied": "on",
        "template": "Say: {{input}}",
        "labels": "a\nb",
        "temperature": "0",
        "max_tokens": "16",
    }
    return given | changes


def _asked(location: str) -> list[Completion]:
    with database.reading() as db:
        return completions.of(db, location.removeprefix("/playground?ask="))


def _ticked(page: str) -> list[str]:
    return re.findall(r'name="models" value="(\w+)" checked', page)


def _template(page: str) -> str:
    found = re.search(r'name="template"[^>]*>\n(.*?)</textarea>', page, re.DOTALL)
    assert found
    return unescape(found[1])


def test_without_a_base_model_it_says_where_to_look(browser: TestClient) -> None:
    assert "No base model is ready" in browser.get("/playground").text


def test_it_opens_on_the_newest_experiment_with_its_template(
    browser: TestClient, tuned: list[Run]
) -> None:
    page = browser.get("/playground").text
    assert _ticked(page) == ["base", tuned[1].id, tuned[0].id]
    assert _template(page) == factories.TEMPLATE
    assert 'name="applied" value="on" checked' in page
    assert f'value="{tuned[2].id}">' in page  # offered, not ticked


def test_an_experiment_brings_its_models_and_its_template(
    browser: TestClient, tuned: list[Run]
) -> None:
    page = browser.get(f"/playground?experiment={tuned[2].experiment_id}").text
    assert _ticked(page) == ["base", tuned[2].id]
    assert _template(page) == "Else: {{input}}"
    assert browser.get("/playground?experiment=nothing").status_code == 404


def test_a_base_model_without_tuned_ones_can_be_asked_alone(
    browser: TestClient, db: Session, tuned: list[Run]
) -> None:
    other = factories.base_model(db, name="Other", address="other")
    page = browser.get(f"/playground?base={other.id}").text
    assert _ticked(page) == ["base"]
    assert "No tuned model yet" in page
    assert f'/playground?base={other.id}" aria-current="true">Other' in page


def test_asking_puts_one_completion_for_each_model(browser: TestClient, tuned: list[Run]) -> None:
    of = tuned[0].experiment
    response = browser.post("/playground", data=_ask(of, ["base", tuned[1].id, tuned[2].id]))
    assert response.status_code == 303
    asked = _asked(response.headers["location"])
    assert [one.run_id for one in asked] == [None, tuned[1].id, tuned[2].id]
    assert {one.template for one in asked} == {"Say: {{input}}"}
    assert asked[0].settings == {
        "temperature": 0,
        "max_tokens": 16,
        "seed": 1,
        "labels": ["a", "b"],
    }
    page = browser.get(response.headers["location"]).text
    assert re.findall(r'class="answer edge method-(\w+)"', page) == ["base", "lora", "qlora"]
    assert page.count("Waiting for a generating worker") == 3
    assert f'data-stream="/completions/{asked[0].ask}/stream"' in page
    assert _ticked(page) == ["base", tuned[1].id, tuned[2].id]
    assert '<noscript><meta http-equiv="refresh"' in page


def test_without_the_template_the_models_read_the_prompt_alone(
    browser: TestClient, tuned: list[Run]
) -> None:
    sent = _ask(tuned[0].experiment, ["base"])
    del sent["applied"]
    location = browser.post("/playground", data=sent).headers["location"]
    assert _asked(location)[0].template == "{{input}}"
    page = browser.get(location).text
    assert "Asked without a template." in page
    assert 'name="applied" value="on" data-applied' in page


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"input": "  "}, "Write something"),
        ({"models": []}, "Choose 1 to 8 models"),
        ({"models": ["gone"]}, "There is no such tuned model."),
        ({"base_model_id": "gone"}, "There is no such base model."),
        ({"template": "nothing"}, "The template needs {{input}}"),
        ({"temperature": "hot"}, "Give a number, 0 to 2."),
        ({"temperature": "nan"}, "Give a number, 0 to 2."),
        ({"max_tokens": "0"}, "Give a number, 1 to 2048."),
    ],
)
def test_a_wrong_question_is_shown_again_with_the_reason(
    browser: TestClient, db: Session, tuned: list[Run], changes: dict[str, Any], says: str
) -> None:
    response = browser.post("/playground", data=_ask(tuned[0].experiment, ["base"], **changes))
    page = unescape(response.text)
    assert response.status_code == 422
    problems = re.search(r'<div id="ask-problems">(.*?)</ul>', page, re.DOTALL)
    assert problems
    assert says in problems[1]
    assert completions.recent(db) == []
    for name, value in changes.items():
        if isinstance(value, str) and name not in ("input", "base_model_id"):
            assert value in page


def test_answers_are_text_whatever_they_say(
    browser: TestClient, db: Session, tuned: list[Run]
) -> None:
    of = tuned[0].experiment
    ask = completions.ask(
        db,
        base_model_id=of.base_model_id,
        run_ids=[None, tuned[0].id],
        input=HOSTILE,
        template="{{input}}",
        labels=[HOSTILE],
    )
    for one in completions.claim_ask(db, "w1"):
        completions.write(db, one, text=HOSTILE, num_tokens=3, tokens_per_second=12.5)
        completions.end(db, one, None if one.run_id else HOSTILE)
    page = browser.get(f"/playground?ask={ask}").text
    assert "<script>alert" not in page
    assert unescape(page).count("{{ 7 * 7 }}") >= 6
    assert "12.5 tokens/s" in page
    assert "data-stream" not in page  # nothing left to wait for
    assert "http-equiv" not in page
    assert f'<a href="/playground?ask={ask}">' in page  # among what was asked before


def test_an_answer_of_a_deleted_model_is_still_shown(
    browser: TestClient, db: Session, tuned: list[Run]
) -> None:
    location = browser.post("/playground", data=_ask(tuned[0].experiment, [tuned[0].id])).headers[
        "location"
    ]
    run = db.get(Run, tuned[0].id)
    assert run
    run.deleted_at = 1.0
    db.commit()
    page = browser.get(location)
    assert page.status_code == 200
    assert "A deleted model" in page.text


def test_stopping_stops_all_answers(browser: TestClient, tuned: list[Run]) -> None:
    location = browser.post("/playground", data=_ask(tuned[0].experiment, ["base"])).headers[
        "location"
    ]
    ask = _asked(location)[0].ask
    assert browser.post(f"/playground/{ask}/stop").headers["location"] == location
    assert [one.state for one in _asked(location)] == ["stopped"]
    assert browser.post("/playground/nothing/stop").status_code == 404
    assert browser.get("/playground?ask=nothing").status_code == 404


def test_the_same_as_json(browser: TestClient, tuned: list[Run]) -> None:
    of = tuned[0].experiment
    wanted = {
        "base_model_id": of.base_model_id,
        "run_ids": [None, tuned[0].id],
        "input": "Hi",
        "sampling": {"temperature": 0.5, "max_tokens": 7},
    }
    made = browser.post("/api/completions", json=wanted)
    assert made.status_code == 202
    body = made.json()
    assert body["template"] == "{{input}}"
    assert body["settings"]["max_tokens"] == 7
    assert [one["run_id"] for one in body["completions"]] == [None, tuned[0].id]
    assert browser.get(f"/api/completions/{body['id']}").json() == body
    stopped = browser.post(f"/api/completions/{body['id']}/stop").json()
    assert {one["state"] for one in stopped["completions"]} == {"stopped"}
    assert browser.get(body["stream"]).status_code == 200
    for wrong in ({"input": ""}, {"run_ids": []}, {"sampling": {"temperature": 9}}):
        assert browser.post("/api/completions", json=wanted | wrong).status_code == 422
    assert browser.get("/api/completions/nothing").status_code == 404
