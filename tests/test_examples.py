"""Example files: what is read, what is refused and in which words, and that nothing else comes out."""

import json
import random
import tracemalloc
from pathlib import Path

import pytest

from app import examples
from app.errors import Invalid, UnknownColumns
from app.example_columns import Columns, named
from app.example_lines import MOST_ROW_BYTES
from app.examples import Example

PAIRS = [Example(f"input {number}, “quoted” ✓", f"output {number}") for number in range(60)]


def read(tmp_path: Path, content: bytes | str, name: str) -> list[Example]:
    path = tmp_path / "upload"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(examples.read(path, name))


def jsonl(pairs: list[Example] = PAIRS) -> str:
    return "".join(json.dumps(pair._asdict()) + "\n" for pair in pairs)


def array(pairs: list[Example] = PAIRS, **options: int) -> str:
    return json.dumps([pair._asdict() for pair in pairs], **options)


def csv_text(pairs: list[Example] = PAIRS, comma: str = ",", end: str = "\r\n") -> str:
    quoted = [[f'"{text.replace(chr(34), chr(34) * 2)}"' for text in pair] for pair in pairs]
    return end.join(comma.join(row) for row in [["input", "output"], *quoted]) + end


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (jsonl(), "data.jsonl"),
        (jsonl(), "data.json"),
        (jsonl(), "data"),
        (jsonl().replace("\n", "\r\n"), "data.jsonl"),
        (jsonl().replace("\n", "\n\n  \n"), "data.ndjson"),
        (jsonl().rstrip("\n"), "data.jsonl"),
        (jsonl().encode("utf-8-sig"), "data.jsonl"),
        (array(), "data.json"),
        (array(indent=2), "data.json"),
        (array(indent=2), "data.jsonl"),
        (array(indent=2).encode("utf-8-sig"), "data"),
        ("\n \n" + array() + "\n \n", "data.json"),
        (csv_text(), "data.csv"),
        (csv_text(end="\n"), "data.csv"),
        (csv_text(comma=";"), "data.csv"),
        (csv_text(comma="\t"), "data.tsv"),
        (csv_text(), "DATA"),
        (csv_text().encode("utf-8-sig"), "data.csv"),
        ("\n\n" + csv_text(), "data.csv"),
        (csv_text() + "\r\n\r\n", "data.csv"),
    ],
)
def test_every_format_gives_the_same_examples(
    tmp_path: Path, content: bytes | str, name: str
) -> None:
    assert read(tmp_path, content, name) == PAIRS


def test_cells_may_hold_line_breaks_commas_and_quotes(tmp_path: Path) -> None:
    content = 'id,Output ,input\r\n1,"a, ""b""","first\r\nsecond"\r\n2,=1+1,plain\r\n'
    found = read(tmp_path, content, "data.csv")
    assert found == [Example("first\nsecond", 'a, "b"'), Example("plain", "=1+1")]


def test_numbers_are_taken_as_they_are_written(tmp_path: Path) -> None:
    content = '{"input": 1.50, "output": -3}\n{"output": 1e5, "input": "x", "more": [null]}\n'
    assert read(tmp_path, content, "d.jsonl") == [Example("1.50", "-3"), Example("x", "1e5")]


def test_texts_come_out_as_they_went_in(tmp_path: Path) -> None:
    odd = [Example("  spaces \t kept ", "emoji \U0001f600, bidi \u202e, control \x1b[31m")]
    assert read(tmp_path, jsonl(odd), "d.jsonl") == odd
    assert read(tmp_path, array(odd), "d.json") == odd


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("text", "label"),
        ("Question", "ANSWER"),
        ("prompt", "completion"),
        ("prompt", "response"),
        ("instruction", "output"),
        ("document", "summary"),
    ],
)
def test_usual_names_of_columns_are_known(tmp_path: Path, first: str, second: str) -> None:
    rows = [{"id": "7", second: "b", first: "a"}, {"id": "8", first: "c", second: "d"}]
    found = [Example("a", "b"), Example("c", "d")]
    assert read(tmp_path, "\n".join(map(json.dumps, rows)), "d.jsonl") == found
    assert read(tmp_path, json.dumps(rows), "d.json") == found
    assert read(tmp_path, f"id;{second} ;{first}\n7;b;a\n8;d;c\n", "d.csv") == found


def test_input_and_output_count_more_than_other_names(tmp_path: Path) -> None:
    row = {"text": "no", "label": "no", "input": "a", "output": "b"}
    assert read(tmp_path, json.dumps(row), "d.jsonl") == [Example("a", "b")]
    # What the first row has is meant in all others.
    with pytest.raises(Invalid, match='Line 2: there is no "input"'):
        read(tmp_path, json.dumps(row) + '\n{"text": "x", "label": "y"}', "d.jsonl")


def test_what_an_instruction_is_about_goes_behind_it(tmp_path: Path) -> None:
    rows = [{"instruction": "Translate.", "input": text, "output": "b"} for text in ("a", "")]
    found = [Example("Translate.\n\na", "b"), Example("Translate.", "b")]
    assert read(tmp_path, json.dumps(rows), "d.json") == found
    content = "instruction,input,output\nTranslate.,a,b\nTranslate.,,b\n"
    assert read(tmp_path, content, "d.csv") == found


def test_a_conversation_is_what_was_asked_and_the_answer(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    system = {"role": "system", "content": "Be short."}
    rows = [{"messages": turns}, {"messages": [system, *turns]}]
    content = "\n".join(map(json.dumps, rows))
    assert read(tmp_path, content, "d.jsonl") == [Example("a", "b"), Example("Be short.\n\na", "b")]
    odd: list[object] = [turns[::-1], turns * 2, turns[:1], [], "text", True, None, [turns], 5]
    for bad in odd:
        row = "\n" + json.dumps({"messages": bad})
        with pytest.raises(Invalid, match='Line 3: "messages" should be a list of one message'):
            read(tmp_path, content + row, "d.jsonl")
    row = "\n" + json.dumps({"messages": [turns[0], {"role": "assistant", "content": " "}]})
    with pytest.raises(Invalid, match='Line 3: "content" is empty'):
        read(tmp_path, content + row, "d.jsonl")


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ('{"frage": "a", "antwort": "b"}\n{"frage": "c", "antwort": "d"}', "d.jsonl"),
        ('[{"frage": "a", "antwort": "b"}, {"frage": "c", "antwort": "d"}]', "d.json"),
        ("frage;antwort\na;b\nc;d\n", "d.csv"),
    ],
)
def test_unknown_columns_are_listed_and_can_be_chosen(
    tmp_path: Path, content: str, name: str
) -> None:
    with pytest.raises(UnknownColumns) as refused:
        read(tmp_path, content, name)
    assert refused.value.columns == ["frage", "antwort"]
    assert (refused.value.field, "antwort" in refused.value.message) == ("columns", True)
    assert refused.value.message.endswith("--output-column).")
    (path := tmp_path / "x").write_text(content)
    found = list(examples.read(path, name, Columns("antwort", "frage")))
    assert found == [Example("b", "a"), Example("d", "c")]


@pytest.mark.parametrize("pair", [("a", ""), ("", "b"), ("a", "a")])
def test_half_a_choice_of_columns_is_refused(pair: tuple[str, str]) -> None:
    with pytest.raises(Invalid, match="Name two columns") as refused:
        named(*pair)
    assert refused.value.field == "columns"


def good(line: int) -> str:
    return json.dumps({"input": f"line {line}", "output": "x"}) + "\n"


BAD_ROWS = [
    ('{"input": "x"}', 'there is no "output" (the fields are: input)'),
    ('{"Input": "x", "Output": "y"}', "the fields are: Input, Output"),
    ("{}", "the fields are: none"),
    ('{"input": null, "output": "y"}', '"input" is null'),
    ('{"input": "x", "output": " \\n"}', '"output" is empty'),
    ('{"input": true, "output": "y"}', '"input" is true or false'),
    ('{"input": "x", "output": {"a": 1}}', '"output" is an object'),
    ('{"input": ["x"], "output": "y"}', '"input" is a list'),
    ('{"input": "x\\u0000", "output": "y"}', "NUL"),
    ('{"input": "x", "output": "\\ud800"}', "half a character (\\ud800"),
    ('{"input": NaN, "output": "y"}', "is NaN"),
    ('{"input": "x", "output": -Infinity}', "is -Infinity"),
    ('{"input": "x", "output": ' + "9" * 5000 + "}", "5,000 digits"),
    ('{"input": "x", "input": "z", "output": "y"}', '"input" is given twice'),
    ('["x", "y"]', "a list stands where an object"),
    ('"x"', "a text stands where an object"),
    ("17", "a number stands where an object"),
    ("null", "null stands where an object"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, row: str, reason: str) -> None:
    with pytest.raises(Invalid) as refused:
        read(tmp_path, good(1) + good(2) + row + "\n" + good(4), "data.jsonl")
    assert f"Line 3: {reason}" in refused.value.message or (
        "Line 3: " in refused.value.message and reason in refused.value.message
    )
    assert "nothing of it was stored" in refused.value.message
    assert refused.value.field == "file"
    with pytest.raises(Invalid) as refused:
        read(tmp_path, "[\n" + good(1) + ",\n\n" + row + ",\n" + good(4) + "]", "data.json")
    assert "Line 5: " in refused.value.message
    assert reason in refused.value.message


BAD_FILES: list[tuple[bytes, str, int, str]] = [
    (b"", "a.jsonl", 1, "empty"),
    (b" \n\n", "a.csv", 1, "empty"),
    (b"PK\x03\x04rest", "a.json", 1, "zip archive or an Excel"),
    (b"\x1f\x8b\x08", "a.jsonl", 1, "gzip"),
    (b"PAR1....", "a.csv", 1, "Parquet"),
    (jsonl().encode("utf-16"), "a.jsonl", 1, "UTF-16"),
    (csv_text().encode("utf-16-be"), "a.csv", 1, "the first row should name"),
    (good(1).encode() + b'{"input": "caf\xe9", "output": "y"}', "a.jsonl", 2, "byte 49 of the"),
    (b"input,output\r\ncaf\xe9,y\r\n", "a.csv", 2, "byte 17 of the file (0xE9)"),
    (b'[\n{"input": "caf\xe9", "output": "y"}]', "a.json", 2, "byte 16 of the file (0xE9)"),
    (b"\xef\xbb\xbf\xe9", "a.jsonl", 1, "byte 3 of the file"),
    (b'{"input": "x", "output": "\xe2\x82', "a.jsonl", 1, "byte 26 of the file"),
    (b'[{"input": "x", "output": "\xe2\x82', "a.json", 1, "byte 27 of the file"),
    (b'{"input": "x", "outp', "a.jsonl", 1, "not valid JSON at column 16"),
    (b'{"input": "x", "output": "y"} extra', "a.jsonl", 1, "Extra data"),
    (b"[" * 100_000, "a.jsonl", 1, "nested too deeply"),
    (b"{" + b'"a":{' * 50_000, "a.jsonl", 1, "nested too deeply"),
    (b'[\n{"input": "x", "output": "y"', "a.json", 2, "the file ends inside the array"),
    (b'[{"input": "x", "output": "y"}\n', "a.json", 2, "the file ends inside the array"),
    (b'[{"input": "x", "output": "y"},\n', "a.json", 2, "the file ends inside the array"),
    (b'[{"input": "x", "output": "y"},\n]', "a.json", 2, "a comma before the closing bracket"),
    (b'[{"input": "x", "output": "y"}\n{"', "a.json", 2, "no comma"),
    (b'[{"input": "x", "output": "y"}]\n[', "a.json", 2, "more follows"),
    (b"[\n\n{'input': 'x'}]", "a.json", 3, "not valid JSON (Expecting"),
    (b'{\n"data": []\n}', "a.json", 1, "or the whole file an array"),
    (b"frage,antwort\r\nx,y\r\n", "a.csv", 1, "reads: frage,antwort"),
    (b"input,output,input\r\nx,y,z\r\n", "a.csv", 1, "once each"),
    (b"x" * 100 + b"," * 100_000, "a.csv", 1, "the first row should name"),
    (b'input,output\r\na,b\r\nx,"y\r\nz,w\r\n', "a.csv", 3, "never closed"),
    (b'input,output\na,b\nx,"y' + b"\nz,w" * 600_000, "a.csv", 3, "never closed"),
    (b"input,output\r\na,b\r\nx\r\n", "a.csv", 3, "number of columns (1 and 2)"),
    (b'input,output\r\n"a\r\nb",c\r\nx,y,z\r\n', "a.csv", 4, "number of columns (3 and 2)"),
    (b'input,output\r\na,"b"c\r\n', "a.csv", 2, "not valid CSV"),
    (b"input,output\r\na,\r\n", "a.csv", 2, '"output" is empty'),
    (b"input,output\r\na,b\0\r\n", "a.csv", 2, "NUL"),
    (b"input,output\ra,b\rc,d\r", "a.csv", 1, "the first row should name"),
    (
        good(1).encode() + b'{"input": "' + b"x" * 4_000_000 + b'"}\n',
        "a.jsonl",
        2,
        "longer than 1 MB",
    ),
    (b"input,output\n" + b"x" * 4_000_000 + b",y", "a.csv", 2, "longer than 1 MB"),
    (b'[{"input": "' + b"x" * 4_000_000 + b'", "output": "y"}]', "a.json", 1, "longer than 1 MB"),
    (b'[{"input": "' + b"x" * 1_500_000 + b'", "output": "y"}]', "a.json", 1, "longer than 1 MB"),
]


@pytest.mark.parametrize(("content", "name", "line", "reason"), BAD_FILES)
def test_a_bad_file_is_refused_in_words(
    tmp_path: Path, content: bytes, name: str, line: int, reason: str
) -> None:
    with pytest.raises(Invalid) as refused:
        read(tmp_path, content, name)
    assert f"\nLine {line}: " in refused.value.message
    assert reason in refused.value.message
    assert len(refused.value.message) < 1000
    refused.value.message.encode()


def test_a_long_line_does_not_hide_the_next_bad_row(tmp_path: Path) -> None:
    content = "x" * 3_000_000 + "\n" + good(2) + "{}\n"
    with pytest.raises(Invalid, match=r"There are 2 problems") as refused:
        read(tmp_path, content, "data.jsonl")
    assert "Line 1: the row is longer" in refused.value.message
    assert "Line 3: there is no" in refused.value.message


def test_byte_offsets_count_the_long_lines_too(tmp_path: Path) -> None:
    content = b"x" * 3_000_000 + b"\n" + b'{"input": "\xe9'
    with pytest.raises(Invalid, match=r"Line 2: byte 3,000,012 of the file \(0xE9\)"):
        read(tmp_path, content, "data.jsonl")


def test_twenty_problems_are_listed_and_the_others_counted(tmp_path: Path) -> None:
    with pytest.raises(Invalid) as refused:
        read(tmp_path, good(1) + "{}\n" * 45, "data.jsonl")
    lines = refused.value.message.splitlines()
    assert lines[0].startswith("There are 45 problems in the file")
    assert [line.split(":")[0] for line in lines[1:21]] == [f"Line {n}" for n in range(2, 22)]
    assert lines[21:] == ["... and 25 more."]


def test_reading_stops_when_there_is_nothing_to_hope_for(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match=r"10,000 problems.*") as refused:
        read(tmp_path, "{}\n" * 1_000_000, "data.jsonl")
    assert refused.value.message.endswith("... and at least 9,980 more.")
    with pytest.raises(Invalid, match="more than 2,000,000 lines"):
        read(tmp_path, "\n" * 2_000_001 + "{}", "data.jsonl")


def test_names_from_the_file_are_shown_safely(tmp_path: Path) -> None:
    row = json.dumps({"\x1b[2J\ud800\nfake: line": 1, "y" * 1000: 2})
    with pytest.raises(Invalid) as refused:
        read(tmp_path, row, "data.jsonl")
    message = refused.value.message
    message.encode()
    assert "\x1b" not in message
    assert len(message.splitlines()) == 2
    assert len(message) < 400


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.csv"])
def test_a_large_file_is_read_in_little_memory(tmp_path: Path, name: str) -> None:
    many = [Example("long text " * 100, str(number)) for number in range(16_000)]
    make = {"data.json": array, "data.jsonl": jsonl, "data.csv": csv_text}[name]
    path = tmp_path / name
    path.write_text(make(many))
    assert path.stat().st_size > 16 * MOST_ROW_BYTES
    tracemalloc.start()
    count = sum(1 for _ in examples.read(path, name))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == len(many)
    assert peak < 12 * MOST_ROW_BYTES


PIECES = [
    *(bytes([byte]) for byte in b"\"[]{},\n\r\0\\-'\x1a\xff\x80"),
    *(
        b"\xe2\x82",
        b"\\ud800",
        b"NaN",
        b"1e999",
        b"9" * 6000,
        b"null",
        b'"input":',
        b"\xef\xbb\xbf",
    ),
    *(b"[" * 3000, b'{"a":' * 3000, b",,,,", b'""', b"input,output\n"),
]


def mutated(content: bytes, chance: random.Random) -> bytes:
    made = bytearray(content)
    for _ in range(chance.randint(1, 6)):
        place = chance.randrange(len(made) + 1)
        piece = chance.choice(PIECES)
        action = chance.randrange(4)
        if action == 0:
            made[place:place] = piece
        elif action == 1:
            made[place : place + len(piece)] = piece
        elif action == 2:
            del made[place : place + chance.randint(1, 80)]
        else:
            made[place:] = piece
    return bytes(made)


def test_whatever_a_file_holds_only_invalid_comes_out(tmp_path: Path) -> None:
    chance = random.Random(20)
    seeds = [jsonl(PAIRS[:6]), array(PAIRS[:6], indent=1), csv_text(PAIRS[:6])]
    refused = 0
    for _ in range(600):
        content = mutated(chance.choice(seeds).encode(), chance)
        name = chance.choice(["a.json", "a.jsonl", "a.csv", "a.tsv", "a", "a.txt"])
        messages, found = [], []
        try:
            found = read(tmp_path, content, name)
        except Invalid as error:
            messages = [error.message]
        refused += len(messages)
        assert all("\nLine " in message for message in messages)
        assert all(text.strip() and "\0" not in text for pair in found for text in pair)
        "".join([*messages, *(text for pair in found for text in pair)]).encode()
    assert 300 < refused < 600
