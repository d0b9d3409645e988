"""The steps of a training as they may come: examples drawn by length, and packed into rows as the worker does."""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from app import pace
from app.lengths import Lengths
from app.methods import Method

LEAST_LENT = 128  # as in worker/grouping.py
MOST_DRAWN = 20_000  # examples drawn to find the largest row and the mean one


class Row(NamedTuple):
    """A packed row: `before` shared places, then examples of these lengths; `targets` are learned."""

    before: int
    lengths: tuple[int, ...]
    targets: int

    @property
    def places(self) -> int:
        """How many tokens are computed, virtual ones included."""
        return self.before + sum(self.lengths)


class Work(NamedTuple):
    """Of a run's training: tokens computed, and tokens learned, both over all epochs."""

    places: float
    targets: float
    updates: int


def packed(
    examples: Sequence[tuple[int, int]], shared: int, virtual: int, budget: int
) -> list[Row]:
    """The rows of one step, by the rule of worker/grouping.py, from lengths alone."""
    shared = min(shared, min(prompt for prompt, _ in examples) - 1)
    before = virtual + shared
    own = ((one[0] + one[1] - 1 - shared, one[1]) for one in examples)
    lengths = sorted(own, key=lambda one: one[0])
    rows = _cut(lengths, before, budget)
    if len(rows) > 1:
        lent = _cut(lengths, 0, budget)  # the prefix lies alone, and all borrow it
        if before * (len(lent) - 1) >= LEAST_LENT:
            return [Row(before, (), 0), *lent]
    return rows


def _cut(lengths: Sequence[tuple[int, int]], before: int, budget: int) -> list[Row]:
    rows: list[tuple[list[int], list[int]]] = []
    room = 0
    for length, answer in lengths:
        if not rows or room + length > budget:
            rows.append(([], []))
            room = before
        rows[-1][0].append(length)
        rows[-1][1].append(answer)
        room += length
    return [Row(before, tuple(found), sum(answers)) for found, answers in rows]


def drawn(
    method: Method, params: Any, lengths: Lengths, num_rows: int, budget: int
) -> tuple[list[list[Row]], Work]:
    """Steps as they may come, each as its rows; and the work of the whole training."""
    size = min(params.batch_size * params.accumulate_steps, num_rows)
    virtual = method.virtual_tokens(params)
    each = [cut(one, params.max_length - virtual) for one in lengths.rows]
    updates = pace.steps_per_epoch(num_rows, params) * params.num_epochs
    chance, steps = random.Random(0), []
    for _ in range(max(4, min(updates, 100, MOST_DRAWN // size))):
        chosen = chance.sample(each, size) if size <= len(each) else chance.choices(each, k=size)
        steps.append(packed(chosen, lengths.shared, virtual, budget))
    rows = [row for step in steps for row in step]
    times = num_rows * params.num_epochs / (len(steps) * size)
    work = Work(
        sum(row.places for row in rows) * times, sum(row.targets for row in rows) * times, updates
    )
    return steps, work


def cut(example: tuple[int, int], room: int) -> tuple[int, int]:
    """Prompt and answer in so many tokens: the prompt loses what is too much."""
    prompt, answer = example
    answer = min(answer, max(1, room // 2)) if prompt + answer > room else answer
    return max(1, min(prompt, room - answer)), answer
