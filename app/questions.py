"""What an experiment may be asked: its name, task, labels, seed and the inputs to watch, checked."""

import unicodedata
from collections.abc import Sequence

from app import datasets, prompts
from app.errors import Invalid
from app.inspection import MOST_LABELS
from app.tables import Dataset

MOST_WATCHED = 5
LONGEST_WATCHED = 4000  # characters


def name(given: str) -> str:
    """The name without needless spaces. Raises Invalid, as all here do."""
    tidy = " ".join(given.split())
    if not tidy or len(tidy) > 100:
        raise Invalid("Give the experiment a name of 1 to 100 characters.", field="name")
    if any(unicodedata.category(character) in {"Cc", "Cs"} for character in tidy):
        raise Invalid("The name holds control characters; type it anew.", field="name")
    return tidy


def task(given: str) -> str:
    """One of the tasks there are."""
    if given not in prompts.TASKS:
        raise Invalid(f"Choose a task from: {', '.join(prompts.TASKS)}.", field="task")
    return given


def labels(dataset: Dataset, task: str, given: Sequence[str]) -> list[str]:
    """The labels of a classification, each once and as in the data; of other tasks none."""
    if task != "classification":
        return []
    tidy = list(dict.fromkeys(label.strip() for label in given if label.strip()))
    if not 2 <= len(tidy) <= MOST_LABELS:
        raise Invalid(
            f"Classification needs 2 to {MOST_LABELS} labels, spelled as in the data.",
            field="labels",
        )
    known = datasets.labels(dataset)
    if known and (strange := [label for label in tidy if label not in known]):
        raise Invalid(
            f"No example has the output {', '.join(map(repr, strange[:5]))}. Spell the labels as in "
            f"the data: {', '.join(known[:20])}.",
            field="labels",
        )
    return tidy


def seed(given: int) -> int:
    """A seed that every library takes."""
    if not 0 <= given < 2**31:
        raise Invalid("The seed must be a whole number from 0 to 2147483647.", field="seed")
    return given


def watch(given: Sequence[str]) -> list[str]:
    """The inputs that are answered while a run learns, each once."""
    tidy = list(dict.fromkeys(one for one in given if one.strip()))
    if len(tidy) > MOST_WATCHED:
        raise Invalid(f"At most {MOST_WATCHED} inputs can be watched.", field="watch")
    if any(len(one) > LONGEST_WATCHED for one in tidy):
        raise Invalid(
            f"An input to watch may have {LONGEST_WATCHED:,} characters at most.", field="watch"
        )
    if any("\0" in one or any("\ud800" <= letter <= "\udfff" for letter in one) for one in tidy):
        raise Invalid(
            "The inputs to watch hold characters that are no text (NUL or half a character).",
            field="watch",
        )
    return tidy
