"""Notices: a webhook hears of every run that ends, sooner or later, and nothing waits for it."""

import hashlib
import hmac
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app import notices, runs, trash
from app.settings import Settings, settings
from app.tables import Experiment, Notice
from tests import factories
from tests.servers import free_port, wait_for
from worker.housekeeping import Housekeeping


class Hook(ThreadingHTTPServer):
    """A webhook's other side, which answers as told and keeps what it got."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answerer)
        self.answers: list[int] = []  # statuses to give first; then 204
        self.hang = threading.Event()
        self.hanging = False
        self.got: list[tuple[str, dict[str, str], bytes]] = []


class _Answerer(BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        content = self.rfile.read(length)
        self.server.got.append((self.path, dict(self.headers), content))
        if self.server.hanging:
            self.server.hang.wait(30)
        status = self.server.answers.pop(0) if self.server.answers else 204
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/elsewhere")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    """A server of this machine, to which the studio's settings point."""
    with Hook() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(notices, "TIMEOUT_SECONDS", 60.0)  # the tests' machine may be busy
        monkeypatch.setattr(settings, "webhook_url", f"http://127.0.0.1:{server.server_port}/hook")
        yield server
        server.hang.set()
        server.shutdown()


def _stored(db: Session) -> list[Notice]:
    db.rollback()
    return list(db.scalars(select(Notice).execution_options(populate_existing=True)))


def _at_once(db: Session) -> None:
    """The next try is due."""
    db.execute(update(Notice).values(next_at=time.time() - 1))
    db.commit()


def test_a_run_that_ends_is_told_of_with_what_came_of_it(
    any_db: Session, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "webhook_secret", "very secret")
    of = factories.experiment(any_db, name="Wäre «das» ok?")
    good = factories.run(any_db, of, state="running")
    waiting = factories.run(any_db, of, method="full")
    runs.finish(any_db, good.id, 1, scores={"metrics": {"accuracy": 0.5}}, best_loss=1.25)
    notices.send_due()
    runs.cancel(any_db, waiting.id)
    notices.send_due()
    (path, headers, content), (_, _, second) = hook.got
    assert path == "/hook"
    digest = hmac.new(b"very secret", content, hashlib.sha256).hexdigest()
    assert headers["X-Studio-Signature"] == f"sha256={digest}"
    assert "very secret" not in str(hook.got)
    body = json.loads(content)
    assert body["event"] == "run.ended"
    assert body["run"]["state"] == "succeeded"
    assert body["run"]["name"] == "LoRA"
    assert body["run"]["scores"] == {"accuracy": 0.5}
    assert (body["experiment"]["name"], body["experiment"]["ended"]) == (of.name, False)
    last = json.loads(second)
    assert (last["run"]["state"], last["experiment"]["ended"]) == ("cancelled", True)
    assert {run["state"] for run in last["experiment"]["runs"]} == {"succeeded", "cancelled"}
    assert {run["name"] for run in last["experiment"]["runs"]} == {"LoRA", "Full fine tuning"}
    assert {one.state for one in _stored(any_db)} == {"sent"}
    assert headers["X-Studio-Delivery"] == body["id"] != last["id"]


@pytest.mark.parametrize("state", ["failed", "cancelled", "paused"])
def test_every_end_is_told_of_and_nothing_else(db: Session, hook: Hook, state: str) -> None:
    run = factories.run(db, state="running")
    if state == "failed":
        runs.fail(db, run.id, 1, "No memory.")
    elif state == "cancelled":
        runs.cancel(db, run.id)
        runs.settle(db, run.id, 1, "")
    else:
        runs.pause(db, run.id)
        runs.settle(db, run.id, 1, "")
    notices.send_due()
    told = [json.loads(content)["run"]["state"] for _, _, content in hook.got]
    assert told == ([] if state == "paused" else [state])


def test_without_a_webhook_nothing_is_stored(db: Session) -> None:
    run = factories.run(db, state="running")
    runs.finish(db, run.id, 1)
    assert _stored(db) == []


def test_the_notice_stands_or_falls_with_the_end_of_the_run(
    db: Session, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = factories.run(db, state="running")

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "note", crash)
    with pytest.raises(KeyboardInterrupt):
        runs.finish(db, run.id, 1)
    assert _stored(db) == []
    assert runs.get(db, run.id).state == "running"


def test_a_server_that_fails_twice_is_told_the_third_time(any_db: Session, hook: Hook) -> None:
    hook.answers = [500, 302]  # a redirect is not followed
    run = factories.run(any_db, state="running")
    runs.finish(any_db, run.id, 1)
    for tries in range(3):
        begun = time.time()
        notices.send_due()
        notices.send_due()  # nothing is due yet
        later = notices.TIMEOUT_SECONDS + notices.FIRST_WAIT * 2**tries
        assert begun + later <= _stored(any_db)[0].next_at <= time.time() + later
        _at_once(any_db)
    assert [path for path, _, _ in hook.got] == ["/hook"] * 3
    assert [one.state for one in _stored(any_db)] == ["sent"]
    assert [(event.level, event.message) for event in runs.history(any_db, run.id)] == [
        ("info", "Finished."),
        (
            "warning",
            "The webhook could not be told yet: it answered with status 500. It is tried again.",
        ),
        ("info", "The webhook was told that this run has ended, after 3 tries."),
    ]


def test_after_a_day_it_is_given_up_and_said(
    db: Session, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "webhook_url", f"http://127.0.0.1:{free_port()}/")
    run = factories.run(db, state="running")
    runs.finish(db, run.id, 1)
    for _ in range(15):
        notices.send_due()
        _at_once(db)
    assert [one.state for one in _stored(db)] == ["waiting"]
    db.execute(update(Notice).values(created_at=time.time() - 86400))
    db.commit()
    notices.send_due()
    (notice,) = _stored(db)
    assert (notice.state, notice.tries) == ("failed", 16)
    told = runs.history(db, run.id)[-1]
    assert told.level == "error"
    assert "cannot be reached" in told.message
    assert "16 tries" in told.message
    assert not notices.due()


def test_a_server_that_hangs_holds_up_nobody(db: Session, hook: Hook) -> None:
    hook.hanging = True
    run = factories.run(db, state="running")
    runs.finish(db, run.id, 1)
    house = Housekeeping()
    for _ in range(20):
        house.look()
    assert house.thread
    assert house.thread.is_alive()
    assert wait_for(lambda: hook.got, 50)
    assert house.thread.is_alive()
    assert len(hook.got) == 1  # one at a time
    hook.hang.set()
    house.thread.join(50)
    assert [one.state for one in _stored(db)] == ["sent"]


def test_a_try_ends_in_time(db: Session, hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "TIMEOUT_SECONDS", 1.0)
    hook.hanging = True
    run = factories.run(db, state="running")
    runs.finish(db, run.id, 1)
    notices.send_due()
    assert not hook.hang.is_set()
    (notice,) = _stored(db)
    assert (notice.state, notice.error) == ("waiting", "it did not answer within 1 seconds")


def test_of_several_senders_one_tells(any_db: Session, hook: Hook) -> None:
    of = factories.experiment(any_db)
    for _ in range(10):
        run = factories.run(any_db, of, state="running")
        runs.finish(any_db, run.id, 1)
    senders = [threading.Thread(target=notices.send_due) for _ in range(4)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    told = [json.loads(content)["id"] for _, _, content in hook.got]
    assert len(told) == len(set(told)) == 10
    ended = [json.loads(content)["experiment"]["ended"] for _, _, content in hook.got]
    assert ended.count(True) == 1


def test_a_sender_that_dies_leaves_the_notice_for_later(
    db: Session, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = factories.run(db, state="running")
    runs.finish(db, run.id, 1)

    async def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(notices, "_post", crash)
        with pytest.raises(KeyboardInterrupt):
            notices.send_due()
    _at_once(db)
    assert notices.due()
    notices.send_due()
    assert [one.state for one in _stored(db)] == ["sent"]


def test_only_web_addresses_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("file:///etc/passwd", "ftp://host/x", "host/x"):
        monkeypatch.setenv("STUDIO_WEBHOOK_URL", url)
        with pytest.raises(ValidationError):
            Settings()
    monkeypatch.setenv("STUDIO_WEBHOOK_URL", "https://host/x")
    assert Settings().webhook_url


def test_a_generating_worker_keeps_house(db: Session, hook: Hook) -> None:
    thrown, run = factories.tuned(db), factories.run(db, state="running")
    trash.throw_away(db, "experiment", thrown.experiment_id)
    db.execute(update(Experiment).where(Experiment.trashed_at.is_not(None)).values(trashed_at=1.0))
    db.commit()
    runs.finish(db, run.id, 1)
    house = Housekeeping()
    house.look()
    assert house.thread
    house.thread.join(20)
    assert trash.all(db) == []
    assert [one.state for one in _stored(db)] == ["sent"]


def test_an_error_in_it_stops_nothing(
    db: Session, hook: Hook, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def crash(_db: object) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(trash, "sweep", crash)
    run = factories.run(db, state="running")
    runs.finish(db, run.id, 1)
    house = Housekeeping()
    for _ in range(2):  # the trash goes wrong, and at the next look the notice is sent
        house.look()
        assert house.thread
        house.thread.join(20)
    assert "no luck" in caplog.text
    assert [one.state for one in _stored(db)] == ["sent"]
