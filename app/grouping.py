"""Which examples of a step lie in which row: by length, within a budget, for one row at a time or two."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

LEAST_PAIR = 128  # tokens that two rows together must have to be worked on side by side
LEAST_LENT = 128  # tokens that a prefix in a row of its own must spare the others


def groups(
    by_length: Sequence[int],
    lengths: Sequence[int],
    budget: int,
    before: int,
    *,
    pairs: bool,
    lend: bool,
) -> tuple[list[list[int]], bool]:
    """The examples of each packed row, and whether the rows borrow the first one's `before` tokens.

    `pairs`: two rows are worked on at a time, where that pays. `lend`: the shared tokens may lie in the
    first row alone: beside examples where two rows are all, else by themselves, if that spares enough.
    """
    lend = lend and before > 0
    found = _pairs(by_length, lengths, budget, before, lend) if pairs else []
    if len(found) == 2:
        return found, lend
    rows = found or cut(by_length, lengths, budget, before)
    if lend and before * (len(rows) - 1) >= LEAST_LENT:
        return [[], *(found or cut(by_length, lengths, budget, 0))], True
    if lend and found:
        return groups(by_length, lengths, budget, before, pairs=pairs, lend=False)
    return rows, False


def cut(
    indices: Iterable[int],
    lengths: Sequence[int],
    budget: int,
    before: int,
    *,
    padded: bool = False,
) -> list[list[int]]:
    """Consecutive groups, each within the budget or of one example alone."""
    groups: list[list[int]] = []
    tokens = 0
    for index in indices:  # from short to long, so that padding stays small
        length = lengths[index]
        tokens = (len(groups[-1]) + 1) * (before + length) if padded and groups else tokens + length
        if not groups or tokens > budget:
            groups.append([])
            tokens = before + length
        groups[-1].append(index)
    return groups


def deal(
    indices: Iterable[int], lengths: Sequence[int], size: int, first: int = 0
) -> list[list[int]]:
    """So many parts of about as many tokens each, `first` in the first before all: the longest go first."""
    parts: list[list[int]] = [[] for _ in range(size)]
    loads = [first] + [0] * (size - 1)
    for index in sorted(indices, key=lambda index: lengths[index], reverse=True):
        least = loads.index(min(loads))
        parts[least].append(index)
        loads[least] += lengths[index]
    return parts


def _pairs(
    by_length: Sequence[int], lengths: Sequence[int], budget: int, before: int, lend: bool
) -> list[list[int]]:
    """An even number of groups of about as many tokens, each within half of the budget.

    None where too short rows, or their beginning, which each has anew if none lends it, would eat up
    the gain.
    """
    total = sum(lengths)
    every = 0 if lend else before
    if every + max(lengths) > budget // 2 or total < max(LEAST_PAIR, before + every):
        return []
    for count in range(2, len(by_length) + 1, 2):
        first = before if lend and count == 2 else 0
        groups = deal(by_length, lengths, count, first)
        loads = [every + sum(lengths[one] for one in group) for group in groups]
        if first + loads[0] <= budget // 2 and max(loads) <= budget // 2 and all(groups):
            return [group[::-1] for group in groups]  # from short to long
    return []
