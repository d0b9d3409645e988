"""Where the parts of a packed row lie, and who may look at whom."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# Padding, in pairs of tokens that see each other, that costs less than one more block: so many, or
# this share of the block's.
PADDED, PADDED_SHARE = 2**13, 1 / 8
LONG = 64  # tokens from which on a block's own products are made in bf16 where the row's are
MOST_PAIRS = 2**19  # of tokens that see each other in a block: their weights are there all at once


@dataclass(frozen=True)
class Block:
    """Examples of about the same length, side by side, padded to the longest.

    `spread` has, for each place of the block, which of its tokens stands there;
    `gathered` has for each of its tokens, in the row's order, its place in the block.
    """

    examples: int
    longest: int
    spread: Tensor
    gathered: Tensor

    def to(self, device: str) -> Block:
        """The same on another device."""
        return replace(self, spread=self.spread.to(device), gathered=self.gathered.to(device))


@dataclass(frozen=True)
class Layout:
    """Where the parts of a packed row lie: `prefix` shared tokens, then the blocks of examples.

    Tokens behind these fill the row up: they see nobody, and nobody sees them. A row that borrows its
    prefix begins with its examples: another row of the step has the prefix.
    """

    prefix: int
    blocks: tuple[Block, ...]
    borrows: bool = False

    @property
    def first(self) -> int:
        """Where the first example begins."""
        return 0 if self.borrows else self.prefix

    @property
    def longest(self) -> int:
        """Tokens of the longest example, after the prefix."""
        return max((block.longest for block in self.blocks), default=0)

    @property
    def tokens(self) -> int:
        """Of all that lies in the row."""
        return self.first + sum(len(block.gathered) for block in self.blocks)

    def to(self, device: str) -> Layout:
        """The same on another device."""
        return replace(self, blocks=tuple(block.to(device) for block in self.blocks))


def evened(count: int) -> int:
    """The next of sixteen lengths between a power of two and the next one, or multiple of 8."""
    step = max(8, 1 << max(0, count.bit_length() - 5))
    return -(-count // step) * step


def layout(prefix: int, lengths: list[int], *, borrows: bool = False, even: bool = False) -> Layout:
    """The layout of a row of `prefix` tokens and then examples of these lengths, short to long.

    `even`: long blocks are padded a little more, so that few have a length of their own.
    """
    groups: list[list[int]] = []
    for length in lengths:
        group = groups[-1] if groups else []
        pairs = (len(group) + 1) * length * (prefix + length)
        padded = sum(length - other for other in group) * (prefix + length)
        if not group or pairs > MOST_PAIRS or padded > max(PADDED, PADDED_SHARE * pairs):
            groups.append([])
        groups[-1].append(length)
    return Layout(prefix, tuple(_block(group, even) for group in groups), borrows)


def _block(lengths: list[int], even: bool) -> Block:
    longest = max(lengths)
    if even and longest >= LONG:
        longest = evened(longest)
    counts = torch.tensor(lengths)
    starts = counts.cumsum(0) - counts
    place = torch.arange(longest)
    # A place behind an example's end holds its first token: nobody looks at it, nothing comes back.
    spread = starts[:, None] + torch.where(place[None] < counts[:, None], place[None], 0)
    block = torch.arange(len(lengths) * longest).view(len(lengths), longest)
    gathered = torch.cat([block[row, :length] for row, length in enumerate(lengths)])
    return Block(len(lengths), longest, spread.flatten(), gathered)


@dataclass(frozen=True)
class Blocks:
    """What one kind of layer may look at: within the prefix, and from an example's tokens.

    `head` is (prefix, prefix); `tail` is (longest, prefix + longest). True means: may see. `lender`, a
    `lending.Lender`: whom the row lends its prefix to or borrows one from.
    """

    layout: Layout
    head: Tensor
    tail: Tensor
    lender: Any = None

    # Asked for by each layer, on its way there and back.
    @functools.cached_property
    def hidden(self) -> tuple[Tensor, Tensor]:
        """The same, but True means: does not see."""
        return ~self.head, ~self.tail

    @functools.cached_property
    def hides_prefix(self) -> bool:
        """Whether some token of an example does not see all of the prefix."""
        return not bool(self.tail[:, : self.layout.prefix].all())
