"""Where an answer differs from what was expected, word by word."""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

MOST_WORDS = 400  # of a longer text nothing is marked: it would take too long
LEAST_ALIKE = 0.1  # share of words in common below which marks say nothing
_WORD = re.compile(r"\S+\s*|^\s+")


class Piece(NamedTuple):
    """A part of the text. Kind: same, ins (not expected), del (expected and missing)."""

    kind: str
    text: str


def marked(expected: str, answer: str) -> list[Piece]:
    """The answer in pieces, with what is missing from it; one plain piece where marks do not help."""
    plain = [Piece("same", answer)]
    if expected == answer or max(len(expected), len(answer)) > 20 * MOST_WORDS:
        return plain
    wanted, given = _WORD.findall(expected), _WORD.findall(answer)
    if max(len(wanted), len(given)) > MOST_WORDS:
        return plain
    bare = ([word.strip() for word in wanted], [word.strip() for word in given])
    matcher = SequenceMatcher(None, *bare, autojunk=False)
    if matcher.ratio() < LEAST_ALIKE:
        return plain
    pieces: list[Piece] = []
    for kind, low, high, start, end in matcher.get_opcodes():
        if kind == "equal":
            pieces += _piece("same", given[start:end])
            continue
        pieces += _piece("del", wanted[low:high])
        pieces += _piece("ins", given[start:end])
    return pieces


def _piece(kind: str, words: Sequence[str]) -> list[Piece]:
    return [Piece(kind, "".join(words))] if words else []
