"""Datasets: stored whole or not at all, looked at, split in a way that never changes."""

import hashlib
import json
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from app import datasets, prompts, storage
from app.errors import Invalid, NotFound
from app.examples import Example
from app.settings import settings
from app.tables import Dataset

PAIRS = [Example(f"text {number}", "even" if number % 2 == 0 else "odd") for number in range(60)]


def upload(pairs: list[Example], *, more: str = "") -> Path:
    path = storage.upload_file()
    path.write_text("".join(json.dumps(pair._asdict()) + "\n" for pair in pairs) + more)
    return path


def add(db: Session, pairs: list[Example] = PAIRS, name: str = "Numbers") -> Dataset:
    return datasets.add(db, name, "numbers.jsonl", upload(pairs))


def stored_files() -> list[Path]:
    return sorted(storage.dataset_file("x").parent.iterdir())


def test_a_dataset_is_stored_with_its_fingerprint(db: Session) -> None:
    dataset = add(db)
    file = storage.dataset_file(dataset.id)
    assert stored_files() == [file]
    assert dataset.fingerprint == hashlib.sha256(file.read_bytes()).hexdigest()
    assert dataset.num_bytes == file.stat().st_size
    assert dataset.num_examples == 60
    assert datasets.rows(dataset) == PAIRS
    assert datasets.preview(dataset, 3) == PAIRS[:3]
    assert datasets.get(db, dataset.id).name == "Numbers"
    assert [one.id for one in datasets.all(db)] == [dataset.id]


def test_the_same_examples_have_one_fingerprint_in_every_format(db: Session) -> None:
    pairs = [Example(f"“{pair.input}”\n\u2028 é", pair.output) for pair in PAIRS]
    lines = add(db, pairs)
    path = storage.upload_file()
    path.write_text(json.dumps([pair._asdict() for pair in pairs], indent=3))
    array = datasets.add(db, "", "My numbers.json", path)
    assert array.fingerprint == lines.fingerprint
    assert array.name == "My numbers"
    assert datasets.rows(array) == pairs


@pytest.mark.parametrize(
    ("pairs", "more", "name", "field", "reason"),
    [
        (PAIRS, "{}\n", "a", "file", "Line 61"),
        (PAIRS[:49], "", "a", "file", "holds 49 examples; at least 50"),
        (PAIRS * 200, "", "a", "file", "more than 10,000 examples"),
        ([], "{", "a", "file", "Line 1"),
        (PAIRS, "", "x" * 101, "name", "1 to 100"),
        (PAIRS, "", "a\x00b", "name", "printable"),
        (PAIRS, "", "a\ud800b", "name", "printable"),
    ],
)
def test_nothing_stays_of_a_refused_file(
    db: Session, pairs: list[Example], more: str, name: str, field: str, reason: str
) -> None:
    path = upload(pairs, more=more)
    with pytest.raises(Invalid) as refused:
        datasets.add(db, name, "a.jsonl", path)
    assert reason in refused.value.message
    assert refused.value.field == field
    assert stored_files() == []
    assert datasets.all(db) == []


def test_the_limits_are_settings(db: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "min_examples", 5)
    monkeypatch.setattr(settings, "max_examples", 8)
    assert add(db, PAIRS[:5]).num_examples == 5
    assert add(db, PAIRS[:8]).num_examples == 8
    with pytest.raises(Invalid, match="at least 5"):
        add(db, PAIRS[:4])
    with pytest.raises(Invalid, match="more than 8"):
        add(db, PAIRS[:9])


def test_the_report_counts_what_is_odd(db: Session) -> None:
    pairs = [*PAIRS, PAIRS[0], PAIRS[0], Example("text 1", "even"), Example("long" * 10, "odd")]
    report = add(db, pairs).report
    assert report["labels"] == {"even": 33, "odd": 31}
    assert report["duplicates"] == 2
    assert report["contradictions"] == 1
    assert (report["longest_input"], report["longest_output"]) == (40, 4)
    assert report["mean_input"] == round(sum(len(pair.input) for pair in pairs) / len(pairs), 1)
    assert report["mean_output"] == round(sum(len(pair.output) for pair in pairs) / len(pairs), 1)


@pytest.mark.parametrize(
    ("outputs", "labels"),
    [
        (["b", "a", "b", "a"], ["a", "b"]),
        ([f"answer {number}" for number in range(60)], []),  # each but once: no labels
        ([f"label {number % 201}" for number in range(603)], []),
        (
            [f"label {number % 50}" for number in range(100)],
            sorted(f"label {n}" for n in range(50)),
        ),
        (["x" * 101, "y"] * 30, []),
        (["x\nz", "y"] * 30, []),  # a label is one line
    ],
)
def test_labels_are_few_short_outputs_that_come_again(
    db: Session, monkeypatch: pytest.MonkeyPatch, outputs: list[str], labels: list[str]
) -> None:
    monkeypatch.setattr(settings, "min_examples", 1)
    dataset = add(db, [Example(f"{number}", text) for number, text in enumerate(outputs)])
    assert datasets.labels(dataset) == labels


@pytest.mark.parametrize(
    ("outputs", "task"),
    [
        ([f"intent {number % 77}" for number in range(400)], "classification"),
        ([f"intent {number % 31}" for number in range(60)], "generation"),  # too few of each
        (["always the same"] * 60, "generation"),
        ([f"answer {number}" for number in range(60)], "generation"),
        ([f'{{"size": {number}}}' for number in range(60)], "extraction"),
        (['{"size": 1}', '{"size": 2}'] * 30, "extraction"),
        ([*(f'{{"size": {number}}}' for number in range(59)), "none"], "generation"),
        ([f"[{number}]" for number in range(60)], "generation"),
        ([f'{{"size": {number}' for number in range(60)], "generation"),
    ],
)
def test_the_task_is_told_from_the_outputs(db: Session, outputs: list[str], task: str) -> None:
    dataset = add(db, [Example(f"{number}", text) for number, text in enumerate(outputs)])
    assert datasets.task(dataset) == task


@pytest.mark.parametrize("key", datasets.EXAMPLES)
def test_the_shipped_examples_are_good_and_stored_once(db: Session, key: str) -> None:
    chosen = datasets.EXAMPLES[key]
    dataset = datasets.add_example(db, key)
    assert datasets.add_example(db, key).id == dataset.id
    assert 240 <= dataset.num_examples <= 300
    assert dataset.report["duplicates"] == dataset.report["contradictions"] == 0
    assert datasets.labels(dataset) == list(chosen.labels)
    assert prompts.check_template(chosen.template) == chosen.template
    assert chosen.task in prompts.TASKS
    assert storage.examples_file(chosen.file).is_file()
    assert len(stored_files()) == 1


def test_an_unknown_example_set_is_named(db: Session) -> None:
    with pytest.raises(NotFound, match="support_tickets"):
        datasets.add_example(db, "../x")


@pytest.mark.parametrize(
    ("num", "sizes"),
    [
        (50, (18, 20, 12)),
        (80, (40, 20, 20)),
        (100, (55, 20, 25)),
        (200, (130, 20, 50)),
        (260, (182, 26, 52)),
        (10_000, (7000, 1000, 2000)),
        (4, (2, 1, 1)),
    ],
)
def test_a_split_has_the_promised_sizes(num: int, sizes: tuple[int, int, int]) -> None:
    split = datasets.split(num, seed=3)
    assert tuple(len(split[part]) for part in ("train", "validation", "test")) == sizes
    assert sorted(row for part in split.values() for row in part) == list(range(num))
    assert all(part == sorted(part) for part in split.values())


def test_a_split_never_changes() -> None:
    split = datasets.split(60, seed=7)
    assert split["test"] == [3, 4, 7, 8, 12, 18, 20, 26, 27, 30, 33, 35, 45, 46, 59]
    assert split["validation"] == [
        *(2, 16, 17, 19, 21, 23, 29, 32, 34, 39),
        *(40, 41, 42, 44, 47, 50, 52, 53, 54, 58),
    ]
    assert datasets.split(60, seed=7) == split
    assert datasets.split(60, seed=8)["test"] != split["test"]


def test_a_split_takes_from_everywhere() -> None:
    test = datasets.split(10_000, seed=1)["test"]
    for start in range(0, 10_000, 1000):
        assert 150 < sum(start <= row < start + 1000 for row in test) < 250
