"""Datasets: examples that were checked once and never change, with what a look at them found."""

import json
from collections.abc import Container, Iterable, Iterator
from functools import cache
from hashlib import sha256
from itertools import islice
from typing import NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import example_columns, examples, files, prompts, storage
from app.crashpoints import crashpoint
from app.errors import InTrash, Invalid, NotFound, Unavailable
from app.examples import Example
from app.inspection import Inspection
from app.settings import settings
from app.storage import Path
from app.tables import Dataset, new_id

LEAST_VALIDATION, LEAST_TEST = 20, 50


class ExampleSet(NamedTuple):
    """A set of examples that comes with the studio, and the experiment that suits it."""

    title: str
    file: str
    task: str
    labels: tuple[str, ...]
    template: str


EXAMPLES = {
    "support_tickets": ExampleSet(
        "Support tickets by topic",
        "support_tickets.jsonl",
        "classification",
        ("account", "billing", "delivery", "returns", "sales", "technical"),
        prompts.TASKS["classification"].template,
    ),
    "service_reports": ExampleSet(
        "Facts from service reports",
        "service_reports.jsonl",
        "extraction",
        (),
        "Extract site, equipment, fault and urgency (low, normal or high) from the report. Answer "
        'with one line of JSON, such as {"site": "...", "equipment": "...", "fault": "...", '
        '"urgency": "low"}.\n\nReport: {{input}}',
    ),
}


def add(
    db: Session, name: str, filename: str, upload: Path, columns: tuple[str, str] = ("", "")
) -> Dataset:
    """Check the uploaded file, store its examples, and remove the file, whatever comes of it.

    `columns`: what holds inputs and outputs, if their names do not say it. Raises Invalid with the
    reason, field "file", "name" or "columns", and stores nothing.
    """
    stored = storage.upload_file()
    try:
        tidy = _checked_name(name or filename.rsplit(".", 1)[0])
        seen, chosen = Inspection(), example_columns.named(*columns)
        with stored.open("xb") as file:
            fingerprint = sha256()
            for line in lines(seen.follow(examples.read(upload, filename, chosen))):
                file.write(line)
                fingerprint.update(line)
        storage.sync(stored)  # whole on the disk before a row says that it is there
        _check_count(seen.count)
        dataset = Dataset(
            id=new_id(),
            name=tidy,
            fingerprint=fingerprint.hexdigest(),
            num_examples=seen.count,
            num_bytes=storage.size(stored),
            report=seen.report(),
        )
        storage.put(stored, place := storage.dataset_file(dataset.id))
        crashpoint("dataset.placed")
        files.publish(place)
        db.add(dataset)
        db.commit()
        crashpoint("dataset.committed")
        return dataset
    except Unavailable:  # the file store: the studio keeps nothing that only this machine has
        storage.remove(place)
        raise
    finally:
        storage.remove(stored)
        storage.remove(upload)


def lines(found: Iterable[Example]) -> Iterator[bytes]:
    """The form in which examples are stored: one JSON object a line, always written alike."""
    for example in found:
        yield json.dumps(example._asdict(), ensure_ascii=False).encode() + b"\n"


def _checked_name(name: str) -> str:
    tidy = " ".join(name.split())
    if not 1 <= len(tidy) <= 100 or not tidy.isprintable():
        raise Invalid("Give the dataset a name of 1 to 100 printable characters.", field="name")
    return tidy


def _check_count(count: int) -> None:
    if count < settings.min_examples:
        raise Invalid(
            f"The file holds {count:,} examples; at least {settings.min_examples:,} are needed. "
            "Nothing was stored: add more and upload it again.",
            field="file",
        )


@cache
def _canonical(key: str) -> bytes:
    chosen = EXAMPLES[key]
    return b"".join(lines(examples.read(storage.examples_file(chosen.file), chosen.file)))


def shipped(dataset: Dataset) -> ExampleSet | None:
    """The shipped set that the dataset is, whatever its name, if it is one."""
    prints = {sha256(_canonical(key)).hexdigest(): one for key, one in EXAMPLES.items()}
    return prints.get(dataset.fingerprint)


def add_example(db: Session, key: str) -> Dataset:
    """One of the shipped sets; the one already stored if it is. Raises NotFound."""
    if key not in EXAMPLES:
        raise NotFound(f"There is no example set {key!r}. Choose from: {', '.join(EXAMPLES)}.")
    chosen, canonical = EXAMPLES[key], _canonical(key)
    fingerprint = sha256(canonical).hexdigest()
    stored = db.scalar(select(Dataset).where(Dataset.fingerprint == fingerprint).limit(1))
    if stored:
        stored.trashed_at = None
        db.commit()
        return stored
    copy = storage.upload_file()
    copy.write_bytes(canonical)
    return add(db, chosen.title, chosen.file, copy)


def get(db: Session, dataset_id: str) -> Dataset:
    """The dataset, read afresh. Raises NotFound."""
    dataset = db.get(Dataset, dataset_id, populate_existing=True)
    if dataset is None:
        raise NotFound("There is no such dataset. It may have been deleted.")
    if dataset.trashed_at:
        raise InTrash("dataset", dataset.id, dataset.name, dataset.trashed_at)
    return dataset


def all(db: Session) -> list[Dataset]:
    """The newest first."""
    query = select(Dataset).where(Dataset.trashed_at.is_(None))
    return list(db.scalars(query.order_by(Dataset.created_at.desc(), Dataset.id)))


def _read(dataset: Dataset, places: Container[int] | None = None) -> Iterator[Example]:
    with files.dataset(dataset.id).open("rb") as file:
        for place, line in enumerate(file):
            if places is None or place in places:
                yield Example(**json.loads(line))


def rows(dataset: Dataset, places: Container[int] | None = None) -> list[Example]:
    """Every example, or those in these places, as the file has them; a split's numbers are places."""
    return list(_read(dataset, places))


def preview(dataset: Dataset, limit: int = 20) -> list[Example]:
    """The first few examples."""
    return list(islice(_read(dataset), limit))


def labels(dataset: Dataset) -> list[str]:
    """The distinct outputs, where they are few and short enough to be labels; else empty."""
    return list(dataset.report.get("labels", {}))


def task(dataset: Dataset) -> str:
    """The task that its outputs look like, to begin with: a shipped set knows its own; JSON objects
    hold what was extracted; few short outputs that come again and again are labels.
    """
    if known := shipped(dataset):
        return known.task
    if dataset.report.get("json_objects"):
        return "extraction"
    return "classification" if len(labels(dataset)) > 1 else "generation"


def template(dataset: Dataset, task: str) -> str:
    """The task's own, or the one written for a shipped set."""
    known = shipped(dataset)
    return known.template if known and known.task == task else prompts.TASKS[task].template


def split(
    num_examples: int, seed: int, validation_share: float = 0.1, test_share: float = 0.2
) -> dict[str, list[int]]:
    """Row numbers for train, validation and test, each in ascending order.

    Test gets its share, at least 50 rows, at most a quarter; validation its share, at least 20, at
    most two fifths. SHA-256 of seed and row number says which: the same in every version.
    """
    order = sorted(range(num_examples), key=lambda row: sha256(f"{seed}:{row}".encode()).digest())
    test = min(max(LEAST_TEST, round(num_examples * test_share)), num_examples // 4)
    validation = max(LEAST_VALIDATION, round(num_examples * validation_share))
    end = test + min(validation, num_examples * 2 // 5)
    return {
        "train": sorted(order[end:]),
        "validation": sorted(order[test:end]),
        "test": sorted(order[:test]),
    }
