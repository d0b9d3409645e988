"""Readers of example files: JSON, JSONL and CSV in, examples out; bad rows named by their line."""

import csv
import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

from app.errors import Invalid
from app.storage import Path

MOST_PROBLEMS = 20  # listed one by one; of the others only the number is told
MOST_ROW_BYTES = 1_000_000  # one example, as it stands in the file
_FIELDS = ("input", "output")
_SIGNATURES = {
    b"PK\x03\x04": "a zip archive or an Excel workbook",
    b"\x1f\x8b": "a gzip archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"%PDF": "a PDF document",
    b"\xd0\xcf\x11\xe0": "an old Office document",
}
_UTF8 = "The studio reads UTF-8: save the file with that encoding and upload it again"

# The csv module's limit is the process's; its own (131,072) is less than a row may have here.
csv.field_size_limit(MOST_ROW_BYTES)


class Example(NamedTuple):
    """One input and the output wanted for it."""

    input: str
    output: str


class _Bad(Exception):
    """Why one row cannot be used; reading can go on with the next one."""


class _Broken(Exception):
    """Why the file cannot be read any further, and at which line."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"Line {line}: {reason}")


class _Unusable(NamedTuple):
    """A JSON value that is none: stands in for it until a field turns out to hold it."""

    reason: str


def read(path: Path, filename: str) -> Iterator[Example]:
    """The file's examples, one at a time; the format follows its content, then its name.

    Raises Invalid after the last row if any cannot be used, or as soon as reading cannot go on;
    its message names the first bad rows by line, with the reason, and counts the others. Who
    stores what comes out must throw it away then.
    """
    problems: list[str] = []
    count = 0
    try:
        with path.open("rb") as file:
            for line, make in _reader(file, filename)(file):
                try:
                    yield make()
                except _Bad as reason:
                    count += 1
                    if count <= MOST_PROBLEMS:
                        problems.append(f"Line {line}: {reason}.")
    except _Broken as reason:
        problems.append(f"{reason}. The rest of the file was not read.")
        count += 1
    if count:
        raise Invalid(_message(problems, count), field="file")


def _message(problems: list[str], count: int) -> str:
    rows = "1 row cannot" if count == 1 else f"{count:,} rows cannot"
    more = [f"... and {count - len(problems):,} more."] if count > len(problems) else []
    return "\n".join([f"{rows} be used, so nothing was stored:", *problems, *more])


# A row: the line it starts at, and what makes it an example (or raises _Bad).
Row = tuple[int, Callable[[], Example]]


def _reader(file: BinaryIO, filename: str) -> Callable[[BinaryIO], Iterator[Row]]:
    head = file.read(4096)
    file.seek(0)
    for signature, kind in _SIGNATURES.items():
        if head.startswith(signature):
            raise _Broken(1, f"this is {kind}; the studio reads JSON, JSONL and CSV")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _Broken(1, f"this is UTF-16 text. {_UTF8}")
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    name = filename.lower()
    if not start and len(head) < 4096:
        raise _Broken(1, "the file is empty; it needs examples with input and output")
    if start == b"[":
        return _json_rows
    if name.endswith((".jsonl", ".ndjson", ".json")):
        return _jsonl_rows
    if name.endswith((".csv", ".tsv")) or start != b"{":
        return _csv_rows
    return _jsonl_rows


def _lines(file: BinaryIO, *, skip_long: bool) -> Iterator[tuple[int, str | None]]:
    """Numbered lines as text, without BOM; None for one that is too long, if those are skipped."""
    offset = number = 0
    while line := file.readline(MOST_ROW_BYTES + 1):
        number += 1
        if len(line) > MOST_ROW_BYTES and not line.endswith(b"\n"):
            if not skip_long:
                raise _Broken(number, _too_long())
            while line and not line.endswith(b"\n"):
                offset += len(line)
                line = file.readline(MOST_ROW_BYTES)
            offset += len(line)
            yield number, None
            continue
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _Broken(number, _not_utf8(line[error.start], offset + error.start)) from None
        offset += len(line)


def _not_utf8(byte: int, offset: int) -> str:
    return f"byte {offset:,} of the file (0x{byte:02X}) is not valid UTF-8 text. {_UTF8}"


def _too_long() -> str:
    return f"the row is longer than {MOST_ROW_BYTES // 1_000_000} MB; shorten or split it"


# --- JSON -------------------------------------------------------------------------------------


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        for field in _FIELDS:
            if names.count(field) > 1:
                found[field] = _Unusable("is given twice")
    return found


def _number(text: str) -> Any:
    # Kept as it is written, which is what a person who wrote 1.50 wants to see in a text.
    return _Number(text) if len(text) <= 100 else _Unusable(f"is a number of {len(text):,} digits")


class _Number(str):
    """A JSON number as it is written."""


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_int=_number,
    parse_float=_number,
    parse_constant=lambda name: _Unusable(f"is {name}, which is no text"),
)


def _jsonl_rows(file: BinaryIO) -> Iterator[Row]:
    for line, text in _lines(file, skip_long=True):
        if text is None or text.strip():
            yield line, lambda text=text: _from_line(text)  # type: ignore[misc]


def _from_line(text: str | None) -> Example:
    if text is None:
        raise _Bad(_too_long())
    try:
        return _example(_DECODER.decode(text.strip()))
    except json.JSONDecodeError as error:
        raise _Bad(
            f'not valid JSON at column {error.colno}: {error.msg}. Each line must be like {{"input": '
            '"...", "output": "..."}, or the whole file an array of such objects'
        ) from None
    except RecursionError:
        raise _Bad("brackets are nested too deeply") from None


class _Window:
    """A moving window over a JSON file's text: always more than one row ahead, until the end."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.text = ""
        self.place = 0  # in the text
        self.line = 1  # of that place
        self.offset = 0  # bytes decoded so far
        self.rest = b""  # of a character whose other bytes come with the next piece
        self.ended = False

    def fill(self) -> None:
        """Read on until a row of full length is in sight."""
        while not self.ended and len(self.text) - self.place <= MOST_ROW_BYTES:
            piece = self.file.read(2 * MOST_ROW_BYTES)
            self.ended = not piece
            self.text = self.text[self.place :] + self._decoded(self.rest + piece)
            self.place = 0

    def _decoded(self, data: bytes) -> str:
        cut = len(data)
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            if self.ended or error.end < len(data) or len(data) - error.start > 3:
                before = data[: error.start]
                line = self.line + self.text.count("\n", self.place) + before.count(b"\n")
                byte, offset = data[error.start], self.offset + error.start
                raise _Broken(line, _not_utf8(byte, offset)) from None
            cut = error.start
            text = data[:cut].decode()
        first = self.offset == 0
        self.offset += cut
        self.rest = data[cut:]
        return text.removeprefix("\ufeff") if first else text

    def next(self) -> str:
        """Go to the next character that is no white space; empty at the end."""
        while True:
            self.fill()
            for place in range(self.place, len(self.text)):
                if self.text[place] not in " \t\r\n":
                    self.move(place)
                    return self.text[place]
            self.move(len(self.text))
            if self.ended:
                return ""

    def move(self, place: int) -> None:
        """Go to a place further on, counting lines."""
        self.line += self.text.count("\n", self.place, place)
        self.place = place


def _json_rows(file: BinaryIO) -> Iterator[Row]:
    window = _Window(file)
    window.next()
    window.move(window.place + 1)  # the bracket that opens the array
    wanted = "]"  # what may come instead of an item: only in an empty array
    while (character := window.next()) != wanted:
        line = window.line
        value = _item(window, character)
        yield line, lambda value=value: _example(value)  # type: ignore[misc]
        character = window.next()
        if character == "]":
            break
        if character != ",":
            raise _Broken(window.line, _expected("a comma or the closing bracket", character))
        window.move(window.place + 1)
        wanted = ""
        if not window.next():
            break
    else:
        character = wanted
    if character != "]":
        raise _Broken(window.line, "the file ends inside the array; its closing bracket is missing")
    window.move(window.place + 1)
    if extra := window.next():
        raise _Broken(window.line, _expected("nothing more after the array", extra))


def _expected(what: str, found: str) -> str:
    return f"not valid JSON: expected {what}, found {found!r}" if found else f"expected {what}"


def _item(window: _Window, character: str) -> Any:
    if not character:
        raise _Broken(window.line, "the file ends inside the array; its closing bracket is missing")
    try:
        value, end = _DECODER.raw_decode(window.text, window.place)
    except json.JSONDecodeError as error:
        line = window.line + window.text.count("\n", window.place, error.pos)
        if error.pos - window.place > MOST_ROW_BYTES:
            raise _Broken(window.line, _too_long()) from None
        raise _Broken(line, f"not valid JSON: {error.msg}") from None
    except RecursionError:
        raise _Broken(window.line, "brackets are nested too deeply") from None
    if end - window.place > MOST_ROW_BYTES:
        value = _Unusable(_too_long())
    window.move(end)
    return value
