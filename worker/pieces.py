"""The parts of a packed row as attention works on them: the shared prefix, and blocks of examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from worker.layouts import LONG, Block, Blocks

Before = tuple[Tensor, Tensor]  # keys and values of a prefix that lies in another row


class Piece(NamedTuple):
    """The prefix, or a block of examples: which tokens of the row it is, and who sees whom in it.

    Heads that share keys become more queries to these keys, so that no key is copied: queries are
    (groups, tokens, heads of a group, width), keys and values (groups, tokens, width).
    """

    where: slice
    block: Block | None
    before: int  # tokens of the prefix
    hidden: (
        Tensor  # (longest, before + longest), of the prefix (before, before); True: does not see
    )
    hides_prefix: bool

    @property
    def examples(self) -> int:
        return self.block.examples if self.block else 1

    @property
    def is_full(self) -> bool:
        """Whether no place is padding."""
        block = self.block
        return block is None or len(block.gathered) == block.examples * block.longest

    def spread(self, own: Tensor) -> Tensor:
        """The piece's tokens in its places: (groups, tokens, ...) -> (groups, examples, longest, ...)."""
        if not self.is_full:
            own = own.index_select(1, self.block.spread)  # type: ignore[union-attr]
        return torch.unflatten(own, 1, (self.examples, -1))

    def spread_back(self, own: Tensor) -> Tensor:
        """The same of a gradient: nothing comes from padding."""
        if self.block is not None and not self.is_full:
            size = self.block.examples * self.block.longest
            places = own.new_zeros((len(own), size, *own.shape[2:]))
            own = places.index_copy_(1, self.block.gathered, own)
        return torch.unflatten(own, 1, (self.examples, -1))

    def gather(self, places: Tensor) -> Tensor:
        """What stands at the places of the piece's tokens: the way back of `spread`."""
        flat = places.flatten(1, 2)
        return flat if self.is_full else flat.index_select(1, self.block.gathered)  # type: ignore[union-attr]

    def joined(
        self, seen: Tensor, own: Tensor | None, wide: torch.dtype, *, back: bool = False
    ) -> Tensor:
        """What belongs to each pair of a query and a key: (groups, examples, longest, heads, before + longest).

        `seen`, (groups, tokens, heads, before), has what belongs to the prefix; `own`, (groups, examples,
        longest x heads, longest), to each example itself. `back`: they are gradients.
        """
        theirs = (self.spread_back if back else self.spread)(seen[:, self.where])
        if own is None:
            return theirs.to(wide)
        both = own.new_empty((*theirs.shape[:-1], self.hidden.shape[1]), dtype=wide)
        both[..., : self.before] = theirs
        both[..., self.before :] = torch.unflatten(own, 2, (len(self.hidden), -1))
        return both

    def weights(self, scores: Tensor) -> Tensor:
        """What each query gives to each key it sees, of scores as `joined` makes them."""
        skipped = 0 if self.hides_prefix else self.before
        scores[..., skipped:].masked_fill_(self.hidden[:, None, skipped:], -torch.inf)
        return scores.softmax(-1)


class Row(NamedTuple):
    """Queries, keys and values of a row, and those that its prefix has, as `Piece` has tokens."""

    asking: Tensor
    keys: Tensor
    values: Tensor
    prefix: Before
    blocks: Blocks

    @property
    def spare(self) -> slice:
        """Tokens that fill the row up."""
        return slice(self.blocks.layout.tokens, None)

    def own(self, piece: Piece) -> tuple[Tensor, Tensor, Tensor] | None:
        """A block's queries, (groups, examples, longest x heads, width), keys and values; none of the prefix,
        which sees no more than the row's products with it."""
        if piece.block is None:
            return None
        parts = (part[:, piece.where] for part in (self.asking, self.keys, self.values))
        asking, keys, values = map(piece.spread, parts)
        # Short blocks have many shapes, and oneDNN keeps half a MB for each shape of a bf16 product.
        if len(piece.hidden) < LONG and asking.dtype is torch.bfloat16:
            asking, keys, values = asking.float(), keys.float(), values.float()
        return asking.flatten(2, 3), keys, values

    def pieces(self) -> Iterator[Piece]:
        """The prefix, if it lies in the row, and then the blocks."""
        prefix, done = self.blocks.layout.prefix, self.blocks.layout.first
        head, hidden = self.blocks.hidden
        hides = self.blocks.hides_prefix
        if done:
            yield Piece(slice(done), None, prefix, head, True)
        for block in self.blocks.layout.blocks:
            where = slice(done, done + len(block.gathered))
            theirs = hidden[: block.longest, : prefix + block.longest]
            yield Piece(where, block, prefix, theirs, hides)
            done = where.stop

    def seen(self, asking: Tensor, keys: Tensor) -> Tensor:
        """Each token of the row times each of the prefix: (groups, tokens, heads, before)."""
        made = torch.unflatten(asking.flatten(1, 2) @ keys.transpose(1, 2), 1, asking.shape[1:3])
        made[:, self.spare] = 0
        return made


def row_of(parts: Sequence[Tensor | None], blocks: Blocks, scaling: float) -> Row:
    """Of query, key, value and a prefix's, as transformers has them, (1, heads, tokens, width)."""
    query, key, value, *lent = parts
    assert query is not None
    assert key is not None
    assert value is not None
    groups = key.shape[1]
    asking = torch.unflatten(query[0], 0, (groups, -1)).transpose(1, 2) * scaling
    keys, values = key[0].contiguous(), value[0].contiguous()
    before = slice(blocks.layout.first)
    prefix = [
        own[:, before] if one is None else one[0]
        for own, one in zip((keys, values), lent, strict=True)
    ]
    return Row(asking.contiguous(), keys, values, (prefix[0], prefix[1]), blocks)
