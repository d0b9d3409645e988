"""What is measured: data sets, methods and seeds, and the very tokens that both sides train on."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from app import methods, pace, prompts
from app.examples import Example
from benchmarks import sets
from worker import packing
from worker.packing import Row

TRAINED, BATCH = 64, 16  # examples of a pair and of a step; as many are held out
# Where the peer takes minutes for so many: as many steps of 8, 96 examples in three pairs.
FEWER, SMALLER = 32, 8
SEEDS = (1, 2, 3)  # one of each pair
UNCOUNTED = 1  # first steps, which warm caches and allocators up on both sides
DATA = Path("../shared/data")


class Set(NamedTuple):
    """A data set: its reader, where it lies, how it is asked; then what is trained on in each pair."""

    reader: str
    folder: str
    template: str
    max_length: int = 512  # the studio's default
    trained: int = TRAINED
    batch: int = BATCH


SETS = {
    "banking77": Set(
        "banking77", "banking77", "Name the intent of the message.\n\nMessage: {{input}}"
    ),
    "snips-nlu": Set(
        "snips-slots",
        "snips-nlu",
        "Extract the facts from the request. Answer with one line of JSON.\n\nRequest: {{input}}",
        trained=FEWER,
        batch=SMALLER,
    ),
    "disfl-qa": Set(
        "disfl-qa",
        "disfl-qa",
        "Rewrite the question as it was meant.\n\nQuestion: {{input}}",
        trained=FEWER,
        batch=SMALLER,
    ),
    "mts-dialog": Set(
        "mts-dialog",
        "mts-dialog",
        "Summarize the dialogue as a section of the clinical note.\n\n{{input}}",
        trained=24,  # three steps, 72 examples in three pairs
        batch=SMALLER,
    ),
}
# What differs from the methods' defaults; no look in between, which the peer does not take either.
CHANGES: dict[str, dict[str, Any]] = {
    "lora": {},
    "qlora": {},
    "prompt_tuning": {"num_virtual_tokens": 100},
    "full": {},
}


class Case(NamedTuple):
    """One data set, tuned by one method."""

    data: str
    method: str

    @property
    def name(self) -> str:
        """As it is chosen: `banking77/lora`."""
        return f"{self.data}/{self.method}"


CASES = [Case(data, method) for method in CHANGES for data in SETS]


def chosen(pattern: str) -> list[Case]:
    """The cases that a pattern names: all, a case, a data set, or a method. Raises SystemExit."""
    found = [case for case in CASES if pattern in ("", case.name, case.data, case.method)]
    if not found:
        raise SystemExit(
            f"There is no case {pattern!r}. Choose DATA/METHOD, DATA or METHOD, of "
            f"{', '.join(SETS)} and {', '.join(CHANGES)}."
        )
    return found


class Job(NamedTuple):
    """All that a measuring process is told; `steps` below the whole epoch ends it early."""

    method: str
    params: dict[str, Any]
    seed: int
    model: str  # folder
    train: list[Row]
    held_out: list[Row]
    checkpointing: bool = False  # the peer's; the studio's is a parameter
    measure_products: bool = False
    shapes: dict[str, Any] = {}  # noqa: RUF012 - never changed

    @property
    def settings(self) -> Any:
        """The method's parameters, checked."""
        return methods.get(self.method).schema.model_validate(self.params)

    def ordered(self) -> list[Row]:
        """The examples as the studio takes them in the first epoch."""
        return [self.train[index] for index in packing.order(len(self.train), self.seed, 0)]

    def shorter(self) -> Job:
        """Two steps, one of them with the longest example: enough to find the most memory."""
        size = self.params["batch_size"] * self.params["accumulate_steps"]
        longest = sorted(self.train, key=lambda row: -len(row.prompt_ids) - len(row.answer_ids))
        rest = [row for row in self.ordered() if row is not longest[0]]
        return self._replace(train=[longest[0], *rest[: 2 * size - 1]], held_out=[])

    def write(self, path: Path) -> None:
        """For `read` in another process."""
        path.write_text(json.dumps(self._asdict()))


def read(path: Path) -> Job:
    """A job that was written."""
    told = json.loads(path.read_text())
    for part in ("train", "held_out"):
        told[part] = [Row(*ids) for ids in told[part]]
    return Job(**told)


def params(method: str, max_length: int, **changes: Any) -> dict[str, Any]:
    """All parameters of a method, as this benchmark sets them."""
    usual = {
        "batch_size": BATCH,
        "num_epochs": 1,
        "max_length": max_length,
        "validation_interval": pace.NO_LOOK,
    }
    made = methods.get(method).schema.model_validate(usual | CHANGES[method] | changes)
    return made.model_dump()


def job(case: Case, seed: int, model: Path, data: Path = DATA, **more: Any) -> Job:
    """The case with its examples as tokens: what the studio's own formatter makes of them."""
    about = SETS[case.data]
    given = params(case.method, about.max_length, batch_size=about.batch)
    method = methods.get(case.method)
    virtual = method.virtual_tokens(method.schema.model_validate(given))
    formatter = prompts.formatter(model)
    rows = [
        formatter.row(about.template, [], Example(**one), about.max_length, virtual)
        for one in sets.drawn(about.reader, data / about.folder, 2 * about.trained)
    ]
    plain = [Row(row.prompt_ids, row.answer_ids) for row in rows]
    return Job(
        case.method, given, seed, str(model), plain[: about.trained], plain[about.trained :], **more
    )


def lengths(rows: Sequence[Row]) -> dict[str, float]:
    """Mean tokens of prompts and answers, the longest example, and what all prompts share."""
    return {
        "prompt": round(sum(len(row.prompt_ids) for row in rows) / len(rows), 1),
        "answer": round(sum(len(row.answer_ids) for row in rows) / len(rows), 1),
        "longest": max(len(row.prompt_ids) + len(row.answer_ids) for row in rows),
        "shared": packing.shared_prefix(rows),
    }


def machine() -> str:
    """This machine in words: processor, cores, memory."""
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    with open("/proc/meminfo") as file:
        memory = int(file.readline().split()[1]) / 2**20
    return f"{names[0] if names else platform.machine()}, {len(names)} cores, {memory:.0f} GB"
