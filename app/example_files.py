"""Example files row by row: JSON, JSONL and CSV in, (line, value) pairs out, in bounded memory."""

import codecs
import csv
from collections.abc import Callable, Iterator
from functools import partial
from itertools import dropwhile
from typing import Any, BinaryIO

from app import example_json
from app.example_columns import Columns, recognized
from app.example_lines import (
    FIELDS,
    MOST_ROW_BYTES,
    SAVE_AS,
    Broken,
    Row,
    Unusable,
    lines,
    shown,
)
from app.storage import Path

_SIGNATURES = {
    b"PK\x03\x04": "a zip archive or an Excel workbook",
    b"\x1f\x8b": "a gzip archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"%PDF": "a PDF document",
    b"\xd0\xcf\x11\xe0": "an old Office document",
}
_UNQUOTED = "a quote that opens in this row is never closed, or the row is longer than 1 MB"

# The csv module's limit is the process's; its own (131,072) is less than a row may have here.
csv.field_size_limit(MOST_ROW_BYTES)


def rows(path: Path, filename: str, columns: Columns | None = None) -> Iterator[Row]:
    """The rows of the file in the format that its content shows, or else its name.

    `columns`: those that are wanted, if not those of the usual names. Raises Broken where reading
    cannot go on.
    """
    with path.open("rb") as file:
        yield from _reader(file, filename.lower(), columns)(file)


def _reader(
    file: BinaryIO, name: str, columns: Columns | None
) -> Callable[[BinaryIO], Iterator[Row]]:
    head = file.read(4096)
    file.seek(0)
    for signature, kind in _SIGNATURES.items():
        if head.startswith(signature):
            raise Broken(1, f"this is {kind}; the studio reads JSON, JSONL and CSV")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Broken(1, f"this is UTF-16 text. {SAVE_AS}")
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if not start and len(head) < 4096:
        raise Broken(1, "the file is empty; it needs examples with input and output")
    if start == b"[" and not name.endswith((".csv", ".tsv")):
        return example_json.array_rows
    if name.endswith((".csv", ".tsv")):
        return partial(_csv_rows, columns)
    if name.endswith((".json", ".jsonl", ".ndjson")) or start == b"{":
        return example_json.line_rows
    return partial(_csv_rows, columns)


def _csv_rows(columns: Columns | None, file: BinaryIO) -> Iterator[Row]:
    found = dropwhile(lambda pair: not (pair[1] or "").strip(), lines(file, skip_long=False))
    number, first = next(found, (1, ""))
    delimiter, width, places = _header(first or "", number, columns)
    start, size = number, 0

    def fed() -> Iterator[str]:
        nonlocal size
        for _, text in found:
            size += len(text or "")
            if size > 2 * MOST_ROW_BYTES:
                raise Broken(start, _UNQUOTED)
            yield text or ""

    reader = csv.reader(fed(), delimiter=delimiter, strict=True)
    while True:
        start, size = number + reader.line_num + 1, 0
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if "larger than" in str(error) or "end of data" in str(error):
                raise Broken(start, _UNQUOTED) from None
            yield start, Unusable(f"not valid CSV ({error})")
            continue
        if cells is None:
            return
        if len(cells) > 1 or "".join(cells).strip():
            yield start, _from_cells(cells, width, places)


def _header(line: str, number: int, columns: Columns | None) -> tuple[str, int, dict[str, int]]:
    """The delimiter (comma, semicolon or tab), how many columns, and where the fields stand."""
    most: list[str] = []
    for delimiter in ",;\t":
        try:
            names = next(csv.reader([line], delimiter=delimiter, strict=True), [])
        except csv.Error:
            continue
        most = max(most, names, key=len)
        tidy = [name.strip().casefold() for name in names]
        wanted = [name for name in columns or recognized(tidy) or () if name]
        same = [name.strip().casefold() for name in wanted]
        places = [tidy.index(name) for name in same if tidy.count(name) == 1]
        if wanted and len(places) == len(wanted):
            return delimiter, len(tidy), dict(zip(wanted, places, strict=True))
    first, second = (columns or FIELDS)[:2]
    raise Broken(
        number,
        f'the first row should name the columns, "{shown(first)}" and "{shown(second)}" once each, '
        f"but reads: {shown(line.strip())}",
        most if len(most) > 1 else (),
    )


def _from_cells(cells: list[str], width: int, places: dict[str, int]) -> Any:
    if len(cells) != width:
        return Unusable(
            f"row and header differ in their number of columns ({len(cells):,} and {width:,}); a "
            "text with a comma or a line break in it should stand in quotes"
        )
    return {field: cells[place].replace("\r\n", "\n") for field, place in places.items()}
