"""The pages and the API of datasets."""

import json
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy.orm import Session

from app import datasets, storage
from tests import factories, web

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{7*7}} {% raw %}",
    "‮gnp.exe",  # a right-to-left override
    "שלום عالم",
    "=HYPERLINK(1)",
    "x" * 10_000,
    "javascript:alert(1)",
]


@pytest.fixture
def browser(home: Path) -> TestClient:
    return web.client()


def lines(count: int = 60, **changes: str) -> bytes:
    rows = [{"input": f"text {n}", "output": f"label {n % 3}"} | changes for n in range(count)]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def test_the_empty_list_offers_upload_and_the_shipped_sets(browser: TestClient) -> None:
    page = browser.get("/datasets")
    assert page.status_code == 200
    assert "No data yet" in page.text
    for key, example in datasets.EXAMPLES.items():
        assert example.title in page.text
        assert f'action="/datasets/examples/{key}"' in page.text


def test_a_shipped_set_is_added_with_one_click_and_only_once(browser: TestClient) -> None:
    first = browser.post("/datasets/examples/support_tickets")
    assert first.status_code == 303
    page = browser.get(first.headers["location"])
    assert "Support tickets by topic" in page.text
    assert "billing" in page.text
    again = browser.post("/datasets/examples/support_tickets")
    assert again.headers["location"] == first.headers["location"]
    assert browser.post("/datasets/examples/nothing").status_code == 404


def test_an_uploaded_file_becomes_a_dataset(browser: TestClient, home: Path) -> None:
    sent = {"file": ("my file.jsonl", lines(60))}
    answer = browser.post("/datasets", files=sent, data={"name": "Mine"})
    assert answer.status_code == 303
    page = browser.get(answer.headers["location"]).text
    assert "60 examples were added" in page
    assert "<h1>Mine</h1>" in page
    assert "text 19" in page
    assert "text 20" not in page  # a preview, not everything
    assert "Mine" in browser.get("/datasets").text
    stored = storage.dataset_file("x").parent
    assert [path.suffix for path in stored.iterdir()] == [".jsonl"]  # no upload left over


def test_every_reason_against_a_file_is_on_the_page(browser: TestClient) -> None:
    bad = lines(50) + b'{"input": "a"}\n' + lines(2) + b"nonsense\n"
    answer = browser.post("/datasets", files={"file": ("a.jsonl", bad)}, data={"name": "My <name>"})
    assert answer.status_code == 422
    assert "Line 51:" in answer.text
    assert "Line 54:" in answer.text
    assert 'value="My &lt;name&gt;"' in answer.text
    assert 'aria-invalid="true"' in answer.text
    assert browser.get("/api/datasets").json() == []
    assert list(storage.dataset_file("x").parent.iterdir()) == []


def test_columns_with_other_names_are_offered_and_chosen(browser: TestClient) -> None:
    rows = [{"frage": f"text {n}", "antwort": f"answer {n}", "id": "x"} for n in range(60)]
    sent = {"file": ("a.json", json.dumps(rows).encode())}
    refused = browser.post("/datasets", files=sent)
    assert refused.status_code == 422
    assert '<details class="fold" id="columns" open>' in refused.text
    for name in rows[0]:
        assert f'<option value="{name}">' in refused.text
    told = browser.post("/api/datasets", files=sent).json()["error"]
    assert told["columns"] == ["frage", "antwort", "id"]
    half = browser.post("/datasets", files=sent, data={"input_column": "frage"})
    assert "Name two columns" in half.text
    assert 'name="input_column" list="choices" maxlength="100" value="frage"' in half.text
    chosen = {"input_column": "frage", "output_column": "antwort"}
    added = browser.post("/datasets", files=sent, data=chosen)
    assert added.status_code == 303
    assert "answer 3" in browser.get(added.headers["location"]).text
    assert browser.post("/api/datasets", files=sent, data=chosen).status_code == 201
    assert '<details class="fold" id="columns">' in browser.get("/datasets").text


def test_a_bad_name_is_said_at_the_name(browser: TestClient) -> None:
    answer = browser.post("/datasets", files={"file": ("a.jsonl", lines())}, data={"name": "a\0b"})
    assert answer.status_code == 422
    assert "name" in answer.text
    told = browser.post(
        "/api/datasets", files={"file": ("a.jsonl", lines())}, data={"name": "\n\0"}
    )
    assert told.json()["error"]["field"] == "name"


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b\\c.jsonl", "..", "CON", "$(id).jsonl"])
def test_a_files_name_is_a_label_only(browser: TestClient, home: Path, name: str) -> None:
    told = browser.post("/api/datasets", files={"file": (name, lines())}, data={"name": name})
    assert told.status_code == 201
    [stored] = storage.dataset_file("x").parent.iterdir()
    assert stored.name == f"{told.json()['id']}.jsonl"


def test_no_file_is_a_sentence(browser: TestClient) -> None:
    answer = browser.post("/datasets", files={"file": ("", b"")}, data={"name": "x"})
    assert answer.status_code == 422
    assert "Traceback" not in answer.text


def test_the_page_tells_what_was_noticed(browser: TestClient, db: Session) -> None:
    report = {"labels": {"a": 4, "b": 2}, "duplicates": 3, "contradictions": 1}
    made = factories.dataset(db, report=report | {"mean_input": 12.5, "longest_input": 99})
    page = browser.get(f"/datasets/{made.id}").text
    assert "1 input has more than one output" in page
    assert "3 examples stand in the file more than once" in page
    assert 'value="4" max="4"' in page  # the commonest label fills its bar
    assert f'href="/experiments/new?dataset={made.id}"' in page


def test_a_dataset_in_use_names_its_user_and_stays(browser: TestClient, db: Session) -> None:
    experiment = factories.experiment(db, name="Which is which")
    address = f"/datasets/{experiment.dataset_id}"
    assert "Which is which" in browser.get(address).text
    refused = browser.post(f"{address}/delete")
    assert refused.status_code == 409
    assert "Which is which" in refused.text
    assert browser.delete(f"/api{address}").status_code == 409
    assert browser.get(address).status_code == 200


def test_a_dataset_that_nobody_uses_can_be_deleted(browser: TestClient, db: Session) -> None:
    for way in ("page", "api"):
        made = factories.dataset(db)
        if way == "page":
            assert browser.post(f"/datasets/{made.id}/delete").headers["location"] == "/datasets"
        else:
            assert browser.delete(f"/api/datasets/{made.id}").status_code == 204
        assert browser.get(f"/datasets/{made.id}").status_code == 404
        assert storage.dataset_file(made.id).exists()  # for a day


def test_the_api_tells_what_the_page_shows(browser: TestClient, db: Session) -> None:
    made = factories.dataset(db, count=60)
    assert [one["id"] for one in browser.get("/api/datasets").json()] == [made.id]
    told = browser.get(f"/api/datasets/{made.id}").json()
    assert told["num_examples"] == 60
    assert told["examples"][0] == {"input": "Message 0 about my order", "output": "delivery"}


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:12])
def test_text_from_users_is_shown_as_text(browser: TestClient, db: Session, text: str) -> None:
    rows = [(text, text)] * 3
    made = factories.dataset(db, rows, name=text, report={"labels": {text: 3}})
    experiment = factories.experiment(db, data=made, name=text, labels=[text])
    for path in ("/datasets", f"/datasets/{made.id}", "/"):
        page = browser.get(path)
        assert page.status_code == 200
        assert "<script>alert" not in page.text
        assert "<img src=x" not in page.text
        assert "49 " not in page.text
        assert text[:4].replace("<", "&lt;").replace('"', "&#34;").replace(">", "&gt;") in page.text
    assert experiment.name == text


def test_no_text_of_a_user_becomes_a_link(browser: TestClient, db: Session) -> None:
    made = factories.dataset(db, [("javascript:alert(1)", "//evil")], name="javascript:alert(1)")
    page = browser.get(f"/datasets/{made.id}").text
    assert 'href="javascript' not in page
    assert 'href="//evil' not in page
