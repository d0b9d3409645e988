"""What is noticed of examples as they pass by: labels, JSON, doubles, contradictions, lengths."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Any

from app.errors import Invalid
from app.examples import Example
from app.settings import settings

MOST_LABELS = 200
LONGEST_LABEL = 100  # characters, on one line


class Inspection:
    """Looks at examples one by one, in bounded memory; `report` then says what they are like."""

    def __init__(self) -> None:
        self.count = 0
        self.outputs: Counter[str] | None = Counter()  # None: too many or too long for labels
        self.are_objects = True  # whether each output so far is a JSON object
        self.answers: dict[bytes, set[bytes]] = {}  # hash of an input -> hashes of its outputs
        self.doubles = 0
        self.lengths: tuple[list[int], list[int]] = ([], [])

    def follow(self, found: Iterable[Example]) -> Iterator[Example]:
        """The same examples, looked at. Raises Invalid at one more than there may be."""
        for example in found:
            self.count += 1
            if self.count > settings.max_examples:
                raise Invalid(
                    f"The file holds more than {settings.max_examples:,} examples. Nothing was "
                    "stored: take a part of them and upload that.",
                    field="file",
                )
            self._see(example)
            yield example

    def _see(self, example: Example) -> None:
        if self.outputs is not None:
            self.outputs[example.output] += 1
            if len(self.outputs) > MOST_LABELS or not _may_be_label(example.output):
                self.outputs = None
        self.are_objects = self.are_objects and _is_object(example.output)
        question, answer = (blake2b(text.encode()).digest() for text in example)
        answers = self.answers.setdefault(question, set())
        self.doubles += answer in answers
        answers.add(answer)
        for lengths, text in zip(self.lengths, example, strict=True):
            lengths.append(len(text))

    def report(self) -> dict[str, Any]:
        """Numbers of characters and of rows. Labels only where outputs come twice on average, or more."""
        inputs, outputs = self.lengths
        labels = self.outputs if self.outputs and 2 * len(self.outputs) <= self.count else {}
        return {
            "labels": {label: labels[label] for label in sorted(labels)},
            "json_objects": self.are_objects,
            "duplicates": self.doubles,
            "contradictions": sum(len(answers) > 1 for answers in self.answers.values()),
            "longest_input": max(inputs),
            "longest_output": max(outputs),
            "mean_input": round(sum(inputs) / self.count, 1),
            "mean_output": round(sum(outputs) / self.count, 1),
        }


def _may_be_label(output: str) -> bool:
    return len(output) <= LONGEST_LABEL and len(output.splitlines()) == 1


def _is_object(output: str) -> bool:
    try:
        return isinstance(json.loads(output), dict)
    except (ValueError, RecursionError):
        return False
