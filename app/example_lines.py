"""Lines of an example file and what can be wrong with them; what its readers share."""

import codecs
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

MOST_ROW_BYTES = 1_000_000  # one row, as it stands in the file
MOST_LINES = 2_000_000
FIELDS = ("input", "output")
TOO_LONG = f"the row is longer than {MOST_ROW_BYTES // 1_000_000} MB; shorten or split it"
SAVE_AS = "The studio reads UTF-8: save the file with that encoding and upload it again"
Row = tuple[int, Any]  # the line it starts at; a JSON value, or Unusable


class Broken(Exception):
    """Why the file cannot be read any further, and at which line; `columns`: of a choice to make."""

    def __init__(self, line: int, reason: str, columns: Sequence[str] = ()) -> None:
        super().__init__(reason)
        self.line = line
        self.columns = columns


class Unusable(NamedTuple):
    """Stands for a value or a row that is none, until someone wants it."""

    reason: str


def shown(text: str) -> str:
    """A piece of the user's text that is safe in a message."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in text[:40])
    return plain + ("..." if len(text) > 40 else "")


def not_utf8(byte: int, offset: int) -> str:
    """What to say of a byte, `offset` bytes into the file."""
    return f"byte {offset:,} of the file (0x{byte:02X}) is not valid UTF-8 text. {SAVE_AS}"


def lines(file: BinaryIO, *, skip_long: bool) -> Iterator[tuple[int, str | None]]:
    """Numbered lines as text, without BOM; None for one that is too long, if those are skipped."""
    offset = number = 0
    while line := file.readline(MOST_ROW_BYTES + 1):
        number += 1
        if number > MOST_LINES:
            raise Broken(
                number, f"the file has more than {MOST_LINES:,} lines; upload a part of it"
            )
        if len(line) > MOST_ROW_BYTES and not line.endswith(b"\n"):
            if not skip_long:
                raise Broken(number, TOO_LONG)
            while line and not line.endswith(b"\n"):
                offset += len(line)
                line = file.readline(MOST_ROW_BYTES)
            yield number, None
        else:
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                at = error.start + (3 if line.startswith(codecs.BOM_UTF8) and number == 1 else 0)
                raise Broken(number, not_utf8(line[at], offset + at)) from None
        offset += len(line)
