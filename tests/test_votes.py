"""The blind vote: no name on the page, one vote an example, and what the votes add up to."""

import re

import pytest
from fastapi.testclient import TestClient
from playwright.sync_api import expect
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app import experiments, trash
from app.comparison import baselines, explorer, votes
from app.comparison.baselines import Given
from app.comparison.intervals import wilson
from app.errors import Conflict, Invalid
from app.tables import Experiment, Run, Vote
from tests import factories, web
from tests.test_explorer import FIGURES, HOSTILE, SCORED
from tests.test_web_browser import opened

TEST = [10, 11, 12, 13]


@pytest.fixture
def browser(db: Session) -> TestClient:
    return web.client()


def _run(db: Session, of: Experiment, texts: list[str], method: str) -> Run:
    run = factories.tuned(db, of, scores=SCORED, figures=FIGURES, method=method)
    given = [Given(row, text, 0.5, 0.1) for row, text in zip(TEST, texts, strict=True)]
    baselines.store_answers(db, run.id, given)
    return run


Three = tuple[Experiment, Run, Run]


@pytest.fixture
def three(any_db: Session) -> Three:
    """Two runs and the base model; in the last example all say the same, in the first two of them."""
    split = {"train": [0], "validation": [1], "test": TEST}
    of = factories.experiment(any_db, split=split, task="summarization", labels=[])
    lora = _run(any_db, of, ["alpha ", "one", "uno", "same\n"], "lora")
    full = _run(any_db, of, ["alpha", "two", "due", "same"], "full")
    of = experiments.get(any_db, of.id)
    baselines.keep(any_db, of, "bfloat16", scores={"metrics": {}, "test_loss": 1.0})
    texts = zip(TEST, ["beta", "three", "tre", " same"], strict=True)
    given = [Given(row, text, 0.5, 0.1) for row, text in texts]
    baselines.store_answers(any_db, baselines.key(of, "bfloat16"), given)
    return experiments.get(any_db, of.id), lora, full


def _ballot(db: Session, of: Experiment) -> votes.Ballot | None:
    return votes.next_ballot(db, of, explorer.models(db, of), "")


def _vote(db: Session, of: Experiment, row: int, text: str | None) -> None:
    """For the answer with this text; None: for none."""
    asked = votes.ballot(db, of, explorer.models(db, of), row)
    choice = 0 if text is None else asked.answers.index(text) + 1
    votes.cast(db, of, row, choice, asked.mark)


# --- Ballots ----------------------------------------------------------------------------------


def test_equal_answers_are_one_and_what_all_say_is_not_asked(any_db: Session, three: Three) -> None:
    of, lora, full = three
    found = explorer.models(any_db, of)
    assert sorted(votes.rows(any_db, found)) == [10, 11, 12]
    asked = votes.ballot(any_db, of, found, 10)
    assert sorted(asked.answers) == ["alpha", "beta"]
    assert sorted(asked.owners, key=len) == [["base"], [lora.id, full.id]]
    assert votes.ballot(any_db, of, found, 10) == asked  # it must be the same when the vote comes


def test_places_say_nothing_of_the_model(db: Session) -> None:
    count = 200
    split = {"train": [0], "validation": [1], "test": list(range(10, 10 + count))}
    of = factories.experiment(db, data=factories.dataset(db, count=300), split=split)
    runs = [factories.tuned(db, of, method=key) for key in ("lora", "full")]
    for run in runs:
        rows = [Given(row, f"{run.method} {row}", 1.0, 0.1) for row in split["test"]]
        baselines.store_answers(db, run.id, rows)
    of = experiments.get(db, of.id)
    found = explorer.models(db, of)
    first = sum(votes.ballot(db, of, found, row).owners[0] == [runs[0].id] for row in split["test"])
    assert 70 < first < 130
    assert votes.rows(db, found) != split["test"]


def test_one_vote_an_example_and_undo(any_db: Session, three: Three) -> None:
    of, *_ = three
    seen = []
    while asked := _ballot(any_db, of):
        seen.append(asked.row)
        votes.cast(any_db, of, asked.row, 1, asked.mark)
        votes.cast(any_db, of, asked.row, 2, asked.mark)  # a key pressed twice: the first stands
    assert sorted(seen) == [10, 11, 12]
    assert list(any_db.scalars(select(Vote.choice))) == [1, 1, 1]
    assert votes.progress(any_db, of, explorer.models(any_db, of), "") == (3, 3)
    assert votes.undo(any_db, of) == seen[-1]
    again = _ballot(any_db, of)
    assert again is not None
    assert again.row == seen[-1]
    assert votes.undo(any_db, of) == seen[-2]
    assert votes.undo(any_db, of) == seen[-3]
    assert votes.undo(any_db, of) is None


def test_what_is_no_vote_is_refused(db: Session) -> None:
    split = {"train": [0], "validation": [1], "test": TEST}
    of = factories.experiment(db, split=split)
    _run(db, of, ["a", "b", "c", "d"], "lora")
    _run(db, of, ["e", "f", "g", "h"], "full")
    of = experiments.get(db, of.id)
    asked = _ballot(db, of)
    assert asked is not None
    for row, choice, mark, error in (
        (0, 1, asked.mark, Invalid),
        (asked.row, 3, asked.mark, Invalid),
        (asked.row, -1, asked.mark, Invalid),
        (asked.row, 1, "other", Conflict),
    ):
        with pytest.raises(error):
            votes.cast(db, of, row, choice, mark)
    _run(db, of, ["i", "j", "k", "l"], "qlora")
    with pytest.raises(Conflict, match="Another model has answered"):
        votes.cast(db, experiments.get(db, of.id), asked.row, 1, asked.mark)
    assert db.scalar(select(func.count()).select_from(Vote)) == 0


# --- What they add up to ----------------------------------------------------------------------


def test_the_result(any_db: Session, three: Three) -> None:
    of, lora, full = three
    _vote(any_db, of, 10, "alpha")  # both runs, against the base model
    _vote(any_db, of, 11, "one")  # LoRA
    _vote(any_db, of, 12, None)
    found = votes.result(any_db, of)
    assert (found.votes, found.ties, found.total) == (3, 1, 3)
    won = {one.key: (one.won, one.shown) for one in found.models}
    assert won == {"base": (0, 3), lora.id: (2, 3), full.id: (1, 3)}
    lora_share = next(one for one in found.models if one.key == lora.id)
    assert (lora_share.low, lora_share.high) == wilson(2, 3)
    pairs = {(one.first, one.second): (one.won, one.decided) for one in found.pairs}
    assert pairs == {
        ("base", lora.id): (0, 2),
        ("base", full.id): (0, 1),
        (lora.id, full.id): (1, 1),
    }


def test_votes_go_with_the_experiment(db: Session, browser: TestClient) -> None:
    split = {"train": [0], "validation": [1], "test": TEST}
    of = factories.experiment(db, split=split)
    _run(db, of, ["a", "b", "c", "d"], "lora")
    _run(db, of, ["e", "f", "g", "h"], "full")
    _vote(db, experiments.get(db, of.id), 10, "a")
    trash.throw_away(db, "experiment", of.id)
    trash.purge(db, "experiment", of.id)
    assert db.scalar(select(func.count()).select_from(Vote)) == 0


# --- On the screen and for programs -----------------------------------------------------------


def test_the_ballot_does_not_betray_who_answered(db: Session, browser: TestClient) -> None:
    split = {"train": [0], "validation": [1], "test": TEST}
    of = factories.experiment(db, split=split, name="Which one")
    runs = [
        _run(db, of, [f"{key} {n}" for n in range(4)], method)
        for key, method in (("alpha", "lora"), ("beta", "full"), ("gamma", "prompt_tuning"))
    ]
    db.commit()
    page = browser.get(f"/experiments/{of.id}/vote").text
    main = page.partition("<main")[2]
    for run in runs:
        assert run.id not in page
    for name in ("LoRA", "Full", "Prompt tuning", "Base model", "method-", "lora", "qlora"):
        assert name not in main
    assert "0 of 4" in main
    assert [int(key) for key in re.findall(r'data-key="(\d)"', main)] == [1, 2, 3, 0]


def test_voting_on_the_page(db: Session, browser: TestClient) -> None:
    split = {"train": [0], "validation": [1], "test": TEST}
    of = factories.experiment(db, split=split)
    _run(db, of, [HOSTILE] * 4, "lora")
    _run(db, of, ["e", "f", "g", ""], "full")
    db.commit()
    address = f"/experiments/{of.id}/vote"
    for number in range(4):
        page = browser.get(address).text
        assert f"{number} of 4" in page
        assert "<script>alert" not in page
        assert "Votes won" not in page
        sent = {
            name: re.search(f'name="{name}" value="([^"]+)"', page)[1] for name in ("row", "mark")
        }  # type: ignore[index]
        place = re.findall(r'id="answer-(\d)">(.)', page)
        choice = next(place for place, letter in place if letter == "&")  # the hostile one
        answer = browser.post(address, data=sent | {"choice": choice})
        assert (answer.status_code, answer.headers["location"]) == (303, address)
    done = browser.get(address).text
    assert "Votes won" in done
    assert "100.0 % (51.0 to 100.0 %)" in done
    assert "4 of 4 votes, 100.0 % (51.0 to 100.0 %): is preferred" in done
    told = browser.get(f"/api/experiments/{of.id}/votes").json()
    assert (told["votes"], told["ties"]) == (4, 0)
    assert [one["won"] for one in told["models"]] == [4, 0]
    assert told["pairs"][0]["decided"] == 4
    assert browser.post(f"{address}/undo").status_code == 303
    assert "3 of 4" in browser.get(address).text
    assert "Votes won" in browser.get(f"{address}/result").text
    assert browser.post(address, data=sent | {"choice": "7"}).status_code == 422


def test_without_answers_there_is_nothing_to_vote_on(db: Session, browser: TestClient) -> None:
    of = factories.experiment(db)
    assert "Nothing to vote on" in browser.get(f"/experiments/{of.id}/vote").text
    assert "Nothing to vote on" in browser.get(f"/experiments/{of.id}/vote/result").text
    assert browser.get("/experiments/none/vote").status_code == 404


@pytest.mark.browser
def test_keys_vote_and_step(db: Session) -> None:
    split = {"train": [0], "validation": [1], "test": TEST}
    of = factories.experiment(db, split=split)
    _run(db, of, ["a", "b", "c", "d"], "lora")
    _run(db, of, ["e", "f", "g", "h"], "full")
    db.commit()
    with web.chromium() as chromium, web.served() as address:
        page, complaints = opened(chromium.new_context(base_url=address), address)
        page.goto(f"/experiments/{of.id}/vote")
        for key, done in (("1", "1 of 4"), ("0", "2 of 4"), ("u", "1 of 4")):
            page.keyboard.press(key)
            expect(page.locator(".page-head .fig")).to_have_text(done)
            page.wait_for_load_state()  # the next page is there before its keys are
        page.keyboard.press("9")  # there is no such answer
        expect(page.locator(".page-head .fig")).to_have_text("1 of 4")
        page.goto(f"/experiments/{of.id}/answers")
        for key, row in (("j", 10), ("j", 11), ("k", 10)):
            page.keyboard.press(key)
            expect(page.locator(f"#row-{row}")).to_be_focused()
        page.select_option("#show", "all_wrong")
        expect(page).to_have_url(re.compile("show=all_wrong"))
        expect(page.locator("#explored h2")).to_have_text("4 examples")
        page.fill("#q", "nothing like it")
        expect(page.locator("#explored")).to_contain_text("No example is like that")
        assert complaints == []
