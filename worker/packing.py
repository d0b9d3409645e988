"""Examples -> packed rows: [shared prefix | example | example | ...] within a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy
import torch
from torch import Tensor

from app import grouping
from worker import layouts

WINDOW = 8  # steps whose examples are sorted by length together, where rows are padded


class Example(Protocol):
    """Anything with the token ids of a prompt and of its answer, such as `prompts.Row`."""

    @property
    def prompt_ids(self) -> Sequence[int]: ...

    @property
    def answer_ids(self) -> Sequence[int]: ...


class Row(NamedTuple):
    """One example as token ids; the answer's are what is learned, the end of turn included."""

    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]


@dataclass(frozen=True)
class Packed:
    """One forward pass: examples of one step, packed into a row or, `layout` None, padded rows.

    Places count the virtual tokens, `input_ids` do not hold them. Logits are wanted at `keep`
    (the same places in every row); of these, target i is predicted by `rows[i], columns[i]`.
    """

    input_ids: Tensor  # (rows, tokens)
    position_ids: Tensor  # (rows, virtual + tokens)
    attention_mask: Tensor  # (rows, virtual + tokens), 0 at padding
    keep: Tensor  # (kept,)
    rows: Tensor  # (targets,)
    columns: Tensor  # (targets,)
    targets: Tensor  # (targets,) token ids
    examples: Tensor  # (targets,) which of the examples given each target belongs to
    layout: layouts.Layout | None

    @property
    def tokens(self) -> int:
        """Places of all rows."""
        return self.attention_mask.numel()

    def to(self, device: str) -> Packed:
        """The same on another device."""
        moved = {name: part.to(device) for name, part in vars(self).items() if part is not None}
        return replace(self, **moved)


def order(num_rows: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch's examples: the same for the same seed and epoch, always.

    Sorted by the raw stream of the counter-based generator Philox, which no version changes.
    """
    draws = numpy.random.Philox(key=[seed % 2**64, epoch]).random_raw(num_rows)
    return [int(index) for index in numpy.argsort(draws, kind="stable")]


def of_like_length(order: Sequence[int], examples: Sequence[Example], size: int) -> list[int]:
    """The order with examples of about the same length in each step of `size`, for rows that are padded.

    Windows of several steps are sorted by length; which of their steps comes first stays as random as the
    order was. The last step, where it is a smaller one, is left as it is.
    """
    found: list[int] = []
    whole = len(order) // size * size
    for first in range(0, whole, WINDOW * size):
        window = order[first : min(first + WINDOW * size, whole)]
        drawn = {index: place for place, index in enumerate(window)}
        lengths = {
            index: len(examples[index].prompt_ids) + len(examples[index].answer_ids)
            for index in window
        }
        by_length = sorted(window, key=lengths.__getitem__)
        steps = [by_length[at : at + size] for at in range(0, len(window), size)]
        for step in sorted(steps, key=lambda step: min(map(drawn.__getitem__, step))):
            found += step
    return [*found, *order[whole:]]


def shared_prefix(examples: Sequence[Example]) -> int:
    """How many tokens all prompts begin with, at most the shortest prompt less one token.

    One is left because the last token of a prompt predicts the first of its own answer.
    """
    first, last = (pick(list(example.prompt_ids) for example in examples) for pick in (min, max))
    common = next(
        (place for place, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]),
        min(len(first), len(last)),
    )
    return max(0, min(common, min(len(example.prompt_ids) for example in examples) - 1))


def pack(
    examples: Sequence[Example],
    budget: int,
    virtual: int = 0,
    *,
    plain: bool = False,
    pairs: bool = False,
    even: bool = False,
    lend: bool = False,
) -> list[Packed]:
    """The examples of one step, cut into rows of at most `budget` tokens where they allow it.

    `virtual` tokens of a prompt vector stand before everything. `plain`: padded rows without a
    shared prefix, for models that cannot attend to packed rows. `pairs`: two rows are worked on at
    a time, and share the budget; there is one row where two would not pay. `even`: packed rows are
    filled up, so that few have a length of their own. `lend`: of several rows only the first has the
    shared prefix, and the others borrow it: beside examples where two rows are all, else it lies alone,
    if that spares enough.
    """
    prefix = 0 if plain else shared_prefix(examples)
    # The last token of an answer is only predicted, it need not be read.
    lengths = [len(one.prompt_ids) + len(one.answer_ids) - 1 - prefix for one in examples]
    by_length = sorted(range(len(examples)), key=lambda index: (lengths[index], index))
    before = virtual + prefix
    if plain:
        cut = grouping.cut(by_length, lengths, budget, before, padded=True)
        return [_padded(examples, members, virtual) for members in cut]
    groups, lends = grouping.groups(by_length, lengths, budget, before, pairs=pairs, lend=lend)
    return [
        _packed(examples, members, prefix, virtual, even, borrows=lends and place > 0)
        for place, members in enumerate(groups)
    ]


def _packed(
    examples: Sequence[Example],
    members: list[int],
    prefix: int,
    virtual: int,
    even: bool,
    borrows: bool,
) -> Packed:
    before = virtual + prefix
    start = 0 if borrows else virtual  # places of the row that no id stands for
    ids = [] if borrows else list(examples[0].prompt_ids[:prefix])
    positions = [] if borrows else list(range(before))
    keep: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    lengths: list[int] = []
    for index in members:
        prompt, answer = examples[index].prompt_ids[prefix:], examples[index].answer_ids
        first = start + len(ids) + len(prompt) - 1
        keep += range(first, first + len(answer))
        targets += answer
        owners += [index] * len(answer)
        lengths.append(len(prompt) + len(answer) - 1)
        ids += [*prompt, *answer[:-1]]
        positions += range(before, before + lengths[-1])
    if even:
        spare = layouts.evened(len(positions)) - len(positions)
        ids, positions = ids + [0] * spare, positions + [0] * spare
        keep += keep[-1:] * (layouts.evened(len(keep)) - len(keep))
    return Packed(
        input_ids=torch.tensor([ids], dtype=torch.long),
        position_ids=torch.tensor([positions]),
        attention_mask=torch.ones(1, len(positions), dtype=torch.long),
        keep=torch.tensor(keep, dtype=torch.long),
        rows=torch.zeros(len(targets), dtype=torch.long),
        columns=torch.arange(len(targets)),
        targets=torch.tensor(targets, dtype=torch.long),
        examples=torch.tensor(owners, dtype=torch.long),
        layout=layouts.layout(before, lengths, borrows=borrows, even=even),
    )


def _padded(examples: Sequence[Example], members: list[int], virtual: int) -> Packed:
    texts = [[*examples[index].prompt_ids, *examples[index].answer_ids[:-1]] for index in members]
    longest = max(map(len, texts))
    rows: list[int] = []
    places: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for row, index in enumerate(members):
        answer = examples[index].answer_ids
        first = virtual + len(examples[index].prompt_ids) - 1
        rows += [row] * len(answer)
        places += range(first, first + len(answer))
        targets += answer
        owners += [index] * len(answer)
    keep = sorted(set(places))
    mask = torch.zeros(len(members), virtual + longest, dtype=torch.long)
    for row, text in enumerate(texts):
        mask[row, : virtual + len(text)] = 1
    return Packed(
        # Padding is told by the mask, never by its id: many models end a text with that same id.
        input_ids=torch.tensor([text + [0] * (longest - len(text)) for text in texts]),
        position_ids=torch.arange(virtual + longest).expand(len(members), -1),
        attention_mask=mask,
        keep=torch.tensor(keep),
        rows=torch.tensor(rows),
        columns=torch.tensor([keep.index(place) for place in places]),
        targets=torch.tensor(targets),
        examples=torch.tensor(owners),
        layout=None,
    )
