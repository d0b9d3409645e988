"""Examples as JSON: a line each, or an array read item by item in bounded memory."""

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO

from app.example_lines import (
    MOST_ROW_BYTES,
    TOO_LONG,
    Broken,
    Row,
    Unusable,
    lines,
    not_utf8,
)

_UNCLOSED = "the file ends inside the array; its closing bracket is missing"
_SHOULD_BE = (
    'each line should be like {"input": "...", "output": "..."}, or the whole file an array, in '
    "square brackets, of such objects"
)
_NO_SPACE = re.compile(r"[^ \t\r\n]")


class Number(str):
    """A JSON number as it is written: 1.50 stays 1.50."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        found |= {name: Unusable("is given twice") for name in counts if counts[name] > 1}
    return found


def _number(text: str) -> Any:
    if len(text) > 100:
        return Unusable(f"is a number of {len(text):,} digits; write it as text, in quotes")
    return Number(text)


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_int=_number,
    parse_float=_number,
    parse_constant=lambda name: Unusable(f"is {name}, which is neither text nor a number"),
)


def line_rows(file: BinaryIO) -> Iterator[Row]:
    """The rows of a JSONL file; empty lines are passed over."""
    for line, text in lines(file, skip_long=True):
        if text is None:
            yield line, Unusable(TOO_LONG)
        elif text.strip():
            yield line, _from_line(text)


def _from_line(text: str) -> Any:
    try:
        return _DECODER.decode(text.rstrip())
    except json.JSONDecodeError as error:
        return Unusable(f"not valid JSON at column {error.colno} ({error.msg}); {_SHOULD_BE}")
    except RecursionError:
        return Unusable("its brackets are nested too deeply")


class _Window:
    """A moving window over a JSON file's text: always more than one row ahead, until the end."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text = ""
        self.place = 0  # in the text
        self.line = 1  # of that place
        self.num_bytes = 0  # read so far
        self.ended = False

    def next(self) -> str:
        """Go to the next character that is no white space; empty at the end."""
        while True:
            self._fill()
            found = _NO_SPACE.search(self.text, self.place)
            self.move(found.start() if found else len(self.text))
            if found or self.ended:
                return found[0] if found else ""

    def move(self, place: int) -> None:
        """Go to a place further on, counting lines."""
        self.line += self.text.count("\n", self.place, place)
        self.place = place

    def _fill(self) -> None:
        while not self.ended and len(self.text) - self.place <= MOST_ROW_BYTES:
            piece = self.file.read(2 * MOST_ROW_BYTES)
            self.ended = not piece
            self.text = self.text[self.place :] + self._decoded(piece)
            self.place = 0

    def _decoded(self, piece: bytes) -> str:
        waiting = len(self.decoder.getstate()[0])  # bytes of a character that is not whole yet
        try:
            text = self.decoder.decode(piece, final=self.ended)
        except UnicodeDecodeError as error:
            before = error.object[: error.start].count(b"\n")
            line = self.line + self.text.count("\n", self.place) + before
            offset = self.num_bytes - waiting + error.start
            raise Broken(line, not_utf8(error.object[error.start], offset)) from None
        self.num_bytes += len(piece)
        return text


def array_rows(file: BinaryIO) -> Iterator[Row]:
    """The items of a file that is one JSON array. Raises Broken where JSON ends."""
    window = _Window(file)
    window.next()
    window.move(window.place + 1)  # the bracket that opens the array
    character = window.next()
    while character != "]":
        line = window.line
        yield line, _item(window)
        character = window.next()
        if character == ",":
            window.move(window.place + 1)
            if window.next() == "]":
                raise Broken(window.line, "not valid JSON: a comma before the closing bracket")
        elif character != "]":
            raise Broken(window.line, _UNCLOSED if not character else "not valid JSON: no comma")
    window.move(window.place + 1)
    if window.next():
        raise Broken(window.line, "more follows after the bracket that closes the array")


def _item(window: _Window) -> Any:
    """The array's item at the window's place. A malformed one ends the reading."""
    if not window.next():
        raise Broken(window.line, _UNCLOSED)
    try:
        value, end = _DECODER.raw_decode(window.text, window.place)
    except json.JSONDecodeError as error:
        line = window.line + window.text.count("\n", window.place, error.pos)
        if error.msg.startswith("Unterminated") or error.pos >= len(window.text):
            raise Broken(line, _UNCLOSED if window.ended else TOO_LONG) from None
        raise Broken(line, f"not valid JSON ({error.msg})") from None
    except RecursionError:
        raise Broken(window.line, "its brackets are nested too deeply") from None
    if end - window.place > MOST_ROW_BYTES:
        value = Unusable(TOO_LONG)
    window.move(end)
    return value
