"""Examples from a file: what its rows must be like, and which of them are not, by line."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from app import example_files
from app.errors import Invalid
from app.example_json import Number
from app.example_lines import FIELDS, Broken, Unusable, shown
from app.storage import Path

MOST_PROBLEMS = 20  # listed one by one; of the others only the number is told
MOST_COUNTED = 10_000  # then reading stops


class Example(NamedTuple):
    """One input and the output wanted for it."""

    input: str
    output: str


class _Bad(Exception):
    """Why one row cannot be used; reading can go on with the next one."""


def read(path: Path, filename: str) -> Iterator[Example]:
    """The file's examples, one at a time; the format follows its content, then its name.

    Raises Invalid after the last row if any cannot be used, or as soon as reading cannot go on;
    its message names the first bad rows by line, with the reason, and counts the others. Who
    stores what comes out must throw it away then.
    """
    problems: list[str] = []
    count = 0
    try:
        for line, value in example_files.rows(path, filename):
            try:
                yield _example(value)
            except _Bad as reason:
                count += 1
                if count <= MOST_PROBLEMS:
                    problems.append(f"Line {line}: {reason}.")
                if count >= MOST_COUNTED:
                    break
    except Broken as reason:
        count += 1
        problems.append(f"Line {reason.line}: {reason}. Nothing after it was read.")
    if count:
        raise Invalid(_message(problems, count), field="file")


def _message(problems: list[str], count: int) -> str:
    first = "There is a problem" if count == 1 else f"There are {count:,} problems"
    least = "at least " if count >= MOST_COUNTED else ""
    more = [f"... and {least}{count - len(problems):,} more."] if count > len(problems) else []
    return "\n".join([f"{first} in the file, so nothing of it was stored.", *problems, *more])


def _example(value: Any) -> Example:
    """The example that a row holds. Raises _Bad."""
    if isinstance(value, Unusable):
        raise _Bad(value.reason)
    if not isinstance(value, dict):
        raise _Bad(f"{_kind(value)} stands where an object with input and output should be")
    return Example(*(_text(field, _value(value, field)) for field in FIELDS))


def _value(row: dict[str, Any], field: str) -> str:
    if field not in row:
        names = ", ".join(shown(name) for name in list(row)[:5]) or "none"
        raise _Bad(f'there is no "{field}" (the fields are: {names})')
    value = row[field]
    if isinstance(value, Unusable):
        raise _Bad(f'"{field}" {value.reason}')
    if not isinstance(value, str):
        raise _Bad(f'"{field}" is {_kind(value)}, not text; put what you mean in quotes')
    return str(value)


def _text(field: str, text: str) -> str:
    if not text.strip():
        raise _Bad(f'"{field}" is empty')
    if "\0" in text:
        raise _Bad(f'"{field}" holds a NUL character (\\u0000); remove it')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        raise _Bad(
            f'"{field}" holds half a character (\\u{half:04x}, a lone surrogate); write the '
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
