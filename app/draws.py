"""The steps of a training as they may come: examples drawn by length, and packed into rows as the worker does."""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from app import grouping, pace
from app.lengths import Lengths
from app.methods import Method

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
    """The rows of one step as one lane would have them, from lengths alone."""
    shared = min(shared, min(prompt for prompt, _ in examples) - 1)
    before = virtual + shared
    lengths = [prompt + answer - 1 - shared for prompt, answer in examples]
    by_length = sorted(range(len(examples)), key=lengths.__getitem__)
    rows, lent = grouping.groups(by_length, lengths, budget, before, pairs=False, lend=True)
    return [
        Row(
            0 if lent and place else before,
            tuple(lengths[index] for index in members),
            sum(examples[index][1] for index in members),
        )
        for place, members in enumerate(rows)
    ]


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
