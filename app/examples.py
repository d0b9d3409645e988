"""Examples from a file: what its rows must be like, and which of them are not, by line."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from app import example_files
from app.errors import Invalid, UnknownColumns
from app.example_columns import Columns, choosable, recognized
from app.example_json import Number
from app.example_lines import FIELDS, Broken, Unusable, shown
from app.storage import Path

MOST_PROBLEMS = 20  # listed one by one; of the others only the number is told
MOST_COUNTED = 10_000  # then reading stops
CHOOSE = (
    "Choose the column of the inputs and that of the outputs (in a terminal: --input-column and "
    "--output-column)."
)


class Example(NamedTuple):
    """One input and the output wanted for it."""

    input: str
    output: str


class _Bad(Exception):
    """Why one row cannot be used; reading can go on with the next one."""


def read(path: Path, filename: str, columns: Columns | None = None) -> Iterator[Example]:
    """The file's examples, one at a time; the format follows its content, then its name.

    `columns`: those with input and output, if not those of the usual names. Raises Invalid after the
    last row if any cannot be used, or as soon as reading cannot go on; its message names the first
    bad rows by line, with the reason, and counts the others. UnknownColumns: none were found. Who
    stores what comes out must throw it away then.
    """
    problems: list[str] = []
    count = 0
    offered: Sequence[str] = ()  # columns to choose from, while none were found
    try:
        for line, value in example_files.rows(path, filename, columns):
            if columns is None and isinstance(value, dict):
                columns = recognized(value)
                offered = () if columns else offered or [*value]
            try:
                yield _example(value, columns or Columns(*FIELDS))
            except _Bad as reason:
                count += 1
                if count <= MOST_PROBLEMS:
                    problems.append(f"Line {line}: {reason}.")
                if count >= MOST_COUNTED:
                    break
    except Broken as reason:
        count += 1
        problems.append(f"Line {reason.line}: {reason}. Nothing after it was read.")
        offered = reason.columns
    if len(offered) > 1:
        raise UnknownColumns(_message([f"{problems[0]} {CHOOSE}"], 1), choosable(offered))
    if count:
        raise Invalid(_message(problems, count), field="file")


def _message(problems: list[str], count: int) -> str:
    first = "There is a problem" if count == 1 else f"There are {count:,} problems"
    least = "at least " if count >= MOST_COUNTED else ""
    more = [f"... and {least}{count - len(problems):,} more."] if count > len(problems) else []
    return "\n".join([f"{first} in the file, so nothing of it was stored.", *problems, *more])


def _example(value: Any, columns: Columns) -> Example:
    """The example that a row holds. Raises _Bad."""
    if isinstance(value, Unusable):
        raise _Bad(value.reason)
    if not isinstance(value, dict):
        raise _Bad(f"{_kind(value)} stands where an object with input and output should be")
    if columns.input == columns.output:
        return _turns(columns.input, value.get(columns.input))
    input, output = (_text(field, _value(value, field)) for field in columns[:2])
    more = _value(value, columns.more) if columns.more and value.get(columns.more) else ""
    return Example(f"{input}\n\n{_text(columns.more, more)}" if more.strip() else input, output)


def _turns(field: str, turns: Any) -> Example:
    """Of a conversation in one turn: what is asked, with the system's words before it, and the answer."""
    found = turns if isinstance(turns, list) else []
    roles = [one.get("role") if isinstance(one, dict) else None for one in found]
    if roles[-2:] != ["user", "assistant"] or roles[:-2] not in ([], ["system"]):
        raise _Bad(
            f'"{field}" should be a list of one message of the user and one of the assistant, after '
            "one of the system if there is one"
        )
    texts = [_text("content", _value(one, "content")) for one in found]
    return Example("\n\n".join(texts[:-1]), texts[-1])


def _value(row: dict[str, Any], field: str) -> str:
    if field not in row:
        names = ", ".join(shown(name) for name in list(row)[:5]) or "none"
        raise _Bad(f'there is no "{shown(field)}" (the fields are: {names})')
    value = row[field]
    if isinstance(value, Unusable):
        raise _Bad(f'"{shown(field)}" {value.reason}')
    if not isinstance(value, str):
        raise _Bad(f'"{shown(field)}" is {_kind(value)}, not text; put what you mean in quotes')
    return str(value)


def _text(field: str, text: str) -> str:
    if not text.strip():
        raise _Bad(f'"{shown(field)}" is empty')
    if "\0" in text:
        raise _Bad(f'"{shown(field)}" holds a NUL character (\\u0000); remove it')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        raise _Bad(
            f'"{shown(field)}" holds half a character (\\u{half:04x}, a lone surrogate); write the '
            "whole character or remove it"
        ) from None
    return text


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds: dict[type, str] = {
        dict: "an object",
        list: "a list",
        bool: "true or false",
        str: "a text",
        Number: "a number",
    }
    return kinds.get(type(value), "a value")
