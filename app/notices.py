"""Notices: tells a webhook of each run that has ended, at least once, or says why it could not."""

import asyncio
import hashlib
import hmac
import json
import logging
import time
from typing import Any

import httpx
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app import database, naming, runs
from app.settings import settings
from app.tables import Experiment, Notice, Run

TIMEOUT_SECONDS = 5.0  # for the whole of one try
FIRST_WAIT, LONGEST_WAIT = 10.0, 3600.0  # seconds until the next try: doubled each time
GIVE_UP_SECONDS = 86400.0

logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs addresses, and these hold secrets


def due() -> bool:
    """Whether there is something to send just now."""
    wanted = select(Notice.id).where(Notice.state == "waiting", Notice.next_at <= time.time())
    with database.reading() as db:
        return db.scalar(wanted.limit(1)) is not None


def send_due() -> None:
    """Send all that is due. Takes seconds where the other side is slow: give it its own thread."""
    while True:
        with database.session() as db:
            notice = _take(db)
            if notice is None:
                return
            body = json.dumps(_body(db, notice), ensure_ascii=False).encode()
            db.commit()  # nothing is held while the other side takes its time
        error = asyncio.run(_post(notice.id, body))
        with database.session() as db:
            _settle(db, notice, error)


def _take(db: Session) -> Notice | None:
    """The next that is due, its next try put off: of several senders one takes it, and one that
    dies in the middle loses nothing.
    """
    now = time.time()
    query = select(Notice).where(Notice.state == "waiting", Notice.next_at <= now)
    notice = db.scalar(query.order_by(Notice.next_at).limit(1))
    if notice is None:
        db.rollback()
        return None
    later = now + TIMEOUT_SECONDS + min(FIRST_WAIT * 2**notice.tries, LONGEST_WAIT)
    mine = (Notice.id == notice.id, Notice.state == "waiting", Notice.tries == notice.tries)
    taken = db.execute(
        update(Notice)
        .where(*mine)
        .values(tries=Notice.tries + 1, next_at=later)
        .execution_options(synchronize_session=False)
    )
    db.commit()
    db.refresh(notice)
    return notice if taken.rowcount else _take(db)  # type: ignore[attr-defined]


def _body(db: Session, notice: Notice) -> dict[str, Any]:
    """What is sent: the run, and how its experiment stands."""
    run = db.get_one(Run, notice.run_id)
    return {
        "event": "run.ended",
        "id": notice.id,
        "at": run.finished_at,
        "run": {
            "id": run.id,
            "method": run.method,
            "name": naming.name(run),
            "state": run.state,
            "error": run.error,
            "started_at": run.started_at,
            "finished_at": run.finished_at,
            "train_seconds": run.train_seconds,
            "best_loss": run.best_loss,
            "scores": run.scores.get("metrics", {}),
        },
        "experiment": _experiment(run.experiment, run),
    }


def _experiment(experiment: Experiment, run: Run) -> dict[str, Any]:
    """`ended` is said with the last of its runs, and only then."""
    last = max(experiment.runs, key=lambda one: (one.finished_at or 0.0, one.id))
    names = naming.names(experiment.runs)
    over = all(one.state in runs.FINAL for one in experiment.runs)
    return {
        "id": experiment.id,
        "name": experiment.name,
        "ended": over and last.id == run.id,
        "runs": [
            {"id": one.id, "method": one.method, "name": names[one.id], "state": one.state}
            for one in experiment.runs
        ],
    }


async def _post(notice_id: str, body: bytes) -> str | None:
    """Send it; what went wrong, if anything. The answer's text is not read."""
    headers = {"Content-Type": "application/json", "X-Studio-Delivery": notice_id}
    if settings.webhook_secret:
        digest = hmac.new(settings.webhook_secret.encode(), body, hashlib.sha256).hexdigest()
        headers["X-Studio-Signature"] = f"sha256={digest}"
    try:
        async with (
            httpx.AsyncClient(follow_redirects=False, timeout=None) as client,
            asyncio.timeout(TIMEOUT_SECONDS),
            client.stream("POST", settings.webhook_url, content=body, headers=headers) as answer,
        ):
            return None if answer.is_success else f"it answered with status {answer.status_code}"
    except TimeoutError:
        return f"it did not answer within {TIMEOUT_SECONDS:.0f} seconds"
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        return f"it cannot be reached ({str(error)[:200] or type(error).__name__})"


def _settle(db: Session, notice: Notice, error: str | None) -> None:
    """Write down how it went; the run's history hears of the first failure and of the end."""
    run = db.get(Run, notice.run_id)
    if run is None:  # deleted for good meanwhile, and its notices with it
        db.rollback()
        return
    tries = f"{notice.tries} tries" if notice.tries > 1 else "1 try"
    state, line, level = "waiting", "", "info"
    if error is None:
        state = "sent"
        if notice.tries > 1:
            line = f"The webhook was told that this run has ended, after {tries}."
    elif notice.next_at > notice.created_at + GIVE_UP_SECONDS:
        state, level = "failed", "error"
        line = f"The webhook was not told that this run has ended: {error}, {tries}."
    elif notice.tries == 1:
        line, level = f"The webhook could not be told yet: {error}. It is tried again.", "warning"
    if line:
        runs.note(db, run.id, run.attempt, line, level)
    mine = update(Notice).where(Notice.id == notice.id)
    db.execute(mine.values(state=state, error=error))
    db.commit()
