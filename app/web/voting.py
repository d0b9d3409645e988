"""The page of the blind vote: a ballot without names, or what the votes add up to; and who votes."""

from typing import Any
from urllib.parse import quote, unquote

from fastapi import Request
from fastapi.responses import Response
from sqlalchemy.orm import Session

from app.comparison import explorer, tallies, votes
from app.comparison.tallies import Result
from app.errors import Invalid
from app.tables import Experiment
from app.web import formats, pages

_VOTER = "studio-voter"  # cookie: the name that this browser's person votes under


def voter(request: Request) -> str:
    """The name that was given in this browser, if one was."""
    try:
        return votes.voter(unquote(request.cookies.get(_VOTER, "")))
    except Invalid:  # not written by us
        return ""


def remember(to: str, name: str) -> Response:
    """Keep the name in this browser, and go on."""
    response = pages.redirect(to)
    value = quote(votes.voter(name), safe="")
    response.set_cookie(_VOTER, value, max_age=10**8, httponly=True, samesite="lax")
    return response


def page(db: Session, experiment: Experiment, name: str, *, result: bool = False) -> dict[str, Any]:
    """The voter's next ballot; the result once there is none left, or if it is asked for."""
    found = explorer.models(db, experiment)
    ballot = None if result else votes.next_ballot(db, experiment, found, name)
    told = tallies.result(db, experiment) if ballot is None else None
    return {
        "experiment": experiment,
        "voter": name,
        "longest": votes.MOST_NAME,
        "ballot": ballot,
        "progress": votes.progress(db, experiment, found, name),
        "result": told,
        "shares": [(one, _said(one.won, one.shown, one.low, one.high)) for one in told.models]
        if told
        else [],
        "pairs": _pairs(told) if told else [],
    }


def _said(won: int, total: int, low: float, high: float) -> str:
    """72.0 % (50.1 to 86.3 %)."""
    if not total:
        return formats.NOTHING
    return f"{formats.percent(won / total)} ({low * 100:.1f} to {high * 100:.1f} %)"


def _pairs(told: Result) -> list[tuple[str, str]]:
    """Of each two models, both named, what the deciding votes say, in words."""
    names = {one.key: one.label for one in told.models}
    lines = []
    for pair in told.pairs:
        first, second = names[pair.first], names[pair.second]
        if not pair.decided:
            lines.append((f"{first} and {second}", "no vote has decided between them"))
            continue
        if pair.won * 2 < pair.decided:  # the better one first
            first, second = second, first
            pair = pair._replace(won=pair.decided - pair.won, low=1 - pair.high, high=1 - pair.low)
        names_both = f"{first} {'and' if pair.won * 2 == pair.decided else 'over'} {second}"
        clear = "is preferred" if pair.seen else "the votes do not tell them apart"
        share = _said(pair.won, pair.decided, pair.low, pair.high)
        lines.append((names_both, f"{pair.won} of {pair.decided} votes, {share}: {clear}"))
    return lines
