"""The blind vote: no name on the page, one vote an example, and what the votes add up to."""

import re
from html import unescape

import pytest
from fastapi.testclient import TestClient
from playwright.sync_api import expect
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app import experiments, trash
from app.comparison import baselines, differences, explorer, tallies, votes
from app.comparison.baselines import Given
from app.comparison.intervals import wilson
from app.comparison.tallies import Voter
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


def _vote(db: Session, of: Experiment, row: int, text: str | None, voter: str = "") -> None:
    """For the answer with this text; None: for none."""
    asked = votes.ballot(db, of, explorer.models(db, of), row)
    choice = 0 if text is None else asked.answers.index(text) + 1
    votes.cast(db, of, row, choice, asked.mark, voter)


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
    found = tallies.result(any_db, of)
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


def test_pairs_are_judged_as_those_of_a_comparison(db: Session) -> None:
    test = list(range(10, 22))
    of = factories.experiment(db, split={"train": [0], "validation": [1], "test": test})
    for method in ("lora", "full", "qlora"):
        run = factories.tuned(db, of, scores=SCORED, figures=FIGURES, method=method)
        baselines.store_answers(db, run.id, [Given(row, f"{method} {row}", 1, 1) for row in test])
    of = experiments.get(db, of.id)
    for row in test:
        _vote(db, of, row, f"lora {row}" if row < 19 else f"full {row}" if row < 21 else None)
    found = tallies.result(db, of)
    names = {one.key: one.method for one in found.models}
    pairs = {tuple(sorted((names[one.first], names[one.second]))): one for one in found.pairs}
    p = [differences.mcnemar(9, 0), differences.mcnemar(9, 2), differences.mcnemar(2, 0)]
    two = [pairs["lora", "qlora"], pairs["full", "lora"], pairs["full", "qlora"]]
    assert [one.p_corrected for one in two] == pytest.approx(differences.holm(p))
    assert [one.seen for one in two] == [True, False, False]
    # Holm judged the first of the three at a third of 5 %, the others at half of it.
    assert {two[0].won, two[0].decided - two[0].won} == {9, 0}
    low = min(one for one in (two[0].low, 1 - two[0].high) if one > 0)
    assert low == pytest.approx(wilson(9, 9, 1 - 0.05 / 3).low)
    wide = wilson(9, 11, 1 - 0.05 / 2)
    assert two[1].high - two[1].low == pytest.approx(wide.high - wide.low)


def test_several_votes_on_one_example_are_no_more_sure_than_one(db: Session) -> None:
    of = factories.experiment(db, split={"train": [0], "validation": [1], "test": TEST})
    lora = _run(db, of, ["a", "b", "c", "d"], "lora")
    _run(db, of, ["e", "f", "g", "h"], "full")
    of = experiments.get(db, of.id)
    for name in ("Ann", "Ben", ""):
        for row, text in zip(TEST, "abcd", strict=True):
            _vote(db, of, row, text, name)
    found = tallies.result(db, of)
    assert found.voters == [Voter("", 4), Voter("Ann", 4), Voter("Ben", 4)]
    share = next(one for one in found.models if one.key == lora.id)
    assert (share.won, share.shown, (share.low, share.high)) == (12, 12, wilson(4, 4))
    assert (found.pairs[0].decided, found.pairs[0].seen) == (12, False)
    _vote(db, of, TEST[0], "e", "Cy")  # four votes on one example, three on each of the others
    share = next(one for one in tallies.result(db, of).models if one.key == lora.id)
    weight = 13**2 / (16 + 27)
    assert (share.low, share.high) == pytest.approx(wilson(12 / 13 * weight, weight))


def test_each_voter_has_ballots_and_an_undo_of_his_own(any_db: Session, three: Three) -> None:
    of = three[0]
    found = explorer.models(any_db, of)
    for row in (10, 11):
        _vote(any_db, of, row, None, "Ann")
    _vote(any_db, of, 10, None, "Ben")
    counted = [votes.progress(any_db, of, found, name).done for name in ("Ann", "Ben", "")]
    assert counted == [2, 1, 0]
    assert votes.undo(any_db, of, "Cy") is None
    assert votes.undo(any_db, of, "Ann") == 11  # and not the last one of all
    assert tallies.result(any_db, of).voters == [Voter("Ann", 1), Voter("Ben", 1)]


def test_a_name_is_short_and_has_no_invisible_letters() -> None:
    assert votes.voter("  Ann\t of\nthe\u202e left ") == "Ann of the left"
    assert votes.voter("u\u0308ber") == "über"
    assert votes.voter("x" * 40) == "x" * 40
    with pytest.raises(Invalid, match="at most 40"):
        votes.voter("x" * 41)


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
    assert "4 of 4 votes, 100.0 % (51.0 to 100.0 %): the votes do not tell them apart" in done
    told = browser.get(f"/api/experiments/{of.id}/votes").json()
    assert (told["votes"], told["ties"]) == (4, 0)
    assert [one["won"] for one in told["models"]] == [4, 0]
    assert told["pairs"][0]["decided"] == 4
    assert browser.post(f"{address}/undo").status_code == 303
    assert "3 of 4" in browser.get(address).text
    assert "Votes won" in browser.get(f"{address}/result").text
    assert browser.post(address, data=sent | {"choice": "7"}).status_code == 422


def test_voting_under_a_name(db: Session, browser: TestClient) -> None:
    split = {"train": [0], "validation": [1], "test": TEST}
    of = factories.experiment(db, split=split)
    _run(db, of, ["a", "b", "c", "d"], "lora")
    _run(db, of, ["e", "f", "g", "h"], "full")
    db.commit()
    address = f"/experiments/{of.id}/vote"

    def vote() -> str:
        page = browser.get(address).text
        sent = dict(re.findall(r'name="(row|mark|voter)" value="([^"]*)"', page.split("Input")[1]))
        sent["voter"] = unescape(sent["voter"])
        assert browser.post(address, data=sent | {"choice": "1"}).status_code == 303
        return browser.get(address).text

    assert "1 of 4" in vote()
    named = browser.post(f"{address}/name", data={"voter": HOSTILE[:40]})
    assert (named.status_code, named.headers["location"]) == (303, address)
    assert "HttpOnly" in named.headers["set-cookie"]
    page = browser.get(address).text
    assert HOSTILE[:9] not in page
    assert "0 of 4" in page
    assert "2 of 4" in (vote(), vote())[1]
    told = browser.get(f"/api/experiments/{of.id}/votes").json()
    assert told["voters"] == [{"name": HOSTILE[:40], "votes": 2}, {"name": "", "votes": 1}]
    result = browser.get(f"{address}/result").text
    assert "&#34;: 2, without a name: 1. Models" in result
    assert HOSTILE[:9] not in result
    browser.post(f"{address}/undo", data={"voter": HOSTILE[:40]})
    assert "1 of 4" in browser.get(address).text
    assert browser.post(f"{address}/name", data={"voter": "x" * 41}).status_code == 422
    assert browser.post("/experiments/none/vote/name", data={"voter": "x"}).status_code == 404
    browser.post(f"{address}/name", data={"voter": " "})
    page = browser.get(address).text
    assert "Vote under your name" in page
    assert "1 of 4" in page
    browser.cookies.set("studio-voter", "x" * 90)  # not written by us
    assert "0 of 4" not in browser.get(address).text


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
