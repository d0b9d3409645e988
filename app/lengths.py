"""How long a dataset's examples are for a base model in a template, in tokens; counted once, then kept."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from app import datasets, files, prompts
from app.errors import StudioError
from app.tables import BaseModel, Dataset

MOST_ROWS = 2000  # looked at; of a larger dataset every n-th row, and the longest by characters
LONGEST = 32
CHARACTERS = 4.2  # of a token, where the tokenizer or the rows cannot be read here
CHAT_TOKENS = 30  # that a chat format writes around a text
_MARK = "\0"  # where an example's input stands


class Lengths(NamedTuple):
    """Tokens of prompt and answer of each row looked at; all prompts begin with the same `shared`."""

    rows: tuple[tuple[int, int], ...]
    longest: tuple[tuple[int, int], ...]  # of all rows, the longest first
    shared: int
    counted: bool = True  # False: told from numbers of characters

    def totals(self) -> list[int]:
        """Prompt and answer together, of each row looked at."""
        return [prompt + answer for prompt, answer in self.rows]


class _Rows:
    """A dataset as a key of the cache below: equal by its id, since it never changes."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Rows) and other.dataset.id == self.dataset.id

    def __hash__(self) -> int:
        return hash(self.dataset.id)


def of(base_model: BaseModel, dataset: Dataset, template: str, labels: Sequence[str]) -> Lengths:
    """Counted with the base model's own tokenizer, or estimated where that is not possible."""
    try:
        return counted(base_model.id, dataset, template, labels)
    except (StudioError, OSError):
        return _estimated(base_model, dataset, template, labels)


def counted(base_model_id: str, dataset: Dataset, template: str, labels: Sequence[str]) -> Lengths:
    """With the base model's own tokenizer. Raises StudioError or OSError where a file is missing."""
    return _counted(base_model_id, _Rows(dataset), template, tuple(labels))


@lru_cache(maxsize=16)
def _counted(base_model_id: str, which: _Rows, template: str, labels: tuple[str, ...]) -> Lengths:
    formatter = prompts.formatter(files.tokenizer(base_model_id))
    rows = datasets.rows(which.dataset)

    def tokens(row: object) -> tuple[list[int], int]:
        ids = formatter.prompt_ids(template, row.input, labels)  # type: ignore[attr-defined]
        return ids, len(formatter.answer_ids(row.output))  # type: ignore[attr-defined]

    found = [tokens(row) for row in rows[:: -(-len(rows) // MOST_ROWS)]]
    wide = sorted(rows, key=lambda row: -len(row.input) - len(row.output))[:LONGEST]
    longest = sorted(((len(ids), answer) for ids, answer in map(tokens, wide)), key=sum)[::-1]
    first, last = min(ids for ids, _ in found), max(ids for ids, _ in found)
    same = next(
        (place for place, pair in enumerate(zip(first, last, strict=False)) if len(set(pair)) > 1),
        min(len(first), len(last)),
    )
    pairs = tuple((len(ids), answer) for ids, answer in found)
    return Lengths(pairs, tuple(longest), min(same, min(pairs)[0] - 1))


def _estimated(
    base_model: BaseModel, dataset: Dataset, template: str, labels: Sequence[str]
) -> Lengths:
    """From the dataset's mean and longest lengths in characters."""
    half = dataset.num_bytes / dataset.num_examples / 2  # where no look has told the lengths
    into, out = dataset.report.get("mean_input", half), dataset.report.get("mean_output", half)
    most = dataset.report.get("longest_input", 2 * into)
    before, _, after = prompts.fill(template, _MARK, labels).partition(_MARK)
    shared = len(before) / CHARACTERS + CHAT_TOKENS * base_model.has_chat
    answer = int(out / CHARACTERS + 1)
    usual, longest = (
        (max(1, int(shared + (size + len(after)) / CHARACTERS)), answer) for size in (into, most)
    )
    return Lengths((usual,) * 31 + (longest,), (longest,), min(int(shared), usual[0] - 1), False)
