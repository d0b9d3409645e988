"""The attention of a packed row with a way back written by hand, for processors.

Only the queries, keys and values are kept, narrow; the weights are made again, in float32 or wider.
Each gradient is written once, where autograd would fill, add and copy a tensor for every slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from worker.layouts import Block, Blocks

LARGEST = 2**24  # weights made at a time: more would take much memory


def suits(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks) -> bool:
    """Whether `attend` knows how: one dtype, on a processor, no overly long texts."""
    row = blocks.layout
    most = max(
        row.prefix**2,
        *(block.examples * block.longest * (row.prefix + block.longest) for block in row.blocks),
    )
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype
        and query.dtype in (torch.bfloat16, torch.float32, torch.float64)
        and query.shape[1] * most <= LARGEST
    )


def attend(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scaling: float, held: torch.dtype
) -> Tensor:
    """(1, heads, tokens, width) in, (1, tokens, heads, width) out; `held`: the dtype of what is kept."""
    made: Tensor = _Attend.apply(query, key, value, blocks, scaling, held)  # type: ignore[no-untyped-call]
    return made


class _Piece(NamedTuple):
    """The prefix, or a block of examples: which tokens of the row it is, and who sees whom in it."""

    where: slice
    block: Block | None
    before: int  # tokens of the prefix that are seen as well
    mask: Tensor  # (longest, before + longest), True: sees

    @property
    def examples(self) -> int:
        return self.block.examples if self.block else 1

    @property
    def is_full(self) -> bool:
        """Whether no place is padding."""
        block = self.block
        return block is None or len(block.gathered) == block.examples * block.longest

    def spread(self, tokens: Tensor) -> Tensor:
        """The piece's tokens in its places: (tokens, heads, width) -> (places, heads, width)."""
        own = tokens[self.where]
        return own if self.is_full else own.index_select(0, self.block.spread)  # type: ignore[union-attr]

    def spread_back(self, gradient: Tensor) -> Tensor:
        """The same of a gradient: nothing comes from padding."""
        own = gradient[self.where]
        if self.block is None or self.is_full:
            return own
        places = own.new_zeros((self.block.examples * self.block.longest, *own.shape[1:]))
        return places.index_copy_(0, self.block.gathered, own)

    def gather(self, places: Tensor, tokens: Tensor) -> None:
        """Put what stands at the places, (count, groups, ..., width), into the piece's tokens."""
        count, groups, _, width = places.shape
        heads = tokens.shape[1]
        apart = places.view(count, groups, heads // groups, -1, width).permute(0, 3, 1, 2, 4)
        if self.block is None or self.is_full:
            tokens[self.where].view(apart.shape).copy_(apart)
        else:
            flat = apart.reshape(-1, heads, width)
            torch.index_select(flat, 0, self.block.gathered, out=tokens[self.where])

    def fold(self, places: Tensor, groups: int) -> Tensor:
        """(places, heads, width) -> (count, groups, heads of a group x longest, width).

        Heads that share keys become more queries to these keys, so that no key is copied.
        """
        heads, width = places.shape[1:]
        apart = places.view(self.examples, -1, groups, heads // groups, width)
        return apart.permute(0, 2, 3, 1, 4).reshape(self.examples, groups, -1, width)

    def seen(self, tokens: Tensor) -> Tensor:
        """Keys or values: (tokens, groups, width) -> (count, groups, before + longest, width)."""
        own = self.fold(self.spread(tokens), tokens.shape[1])
        if not self.before:
            return own
        shared = tokens[: self.before].transpose(0, 1)
        return torch.cat((shared.expand(self.examples, -1, -1, -1), own), dim=2)

    def weights(self, asking: Tensor, keys: Tensor, scaling: float) -> Tensor:
        """(count, groups, queries, before + longest)."""
        bias = torch.zeros(self.mask.shape, dtype=asking.dtype).masked_fill_(~self.mask, -torch.inf)
        bias = bias.repeat(asking.shape[2] // len(bias), 1)
        scores = torch.baddbmm(
            bias, asking.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), alpha=scaling
        )
        return scores.softmax(-1).view(*asking.shape[:3], -1)


def _pieces(blocks: Blocks) -> Iterator[_Piece]:
    prefix = done = blocks.layout.prefix
    if prefix:
        yield _Piece(slice(prefix), None, 0, blocks.head)
    for block in blocks.layout.blocks:
        where = slice(done, done + len(block.gathered))
        mask = blocks.tail[: block.longest, : prefix + block.longest]
        yield _Piece(where, block, prefix, mask)
        done = where.stop


class _Attend(torch.autograd.Function):
    @staticmethod
    @torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: Blocks,
        scaling: float,
        held: torch.dtype,
    ) -> Tensor:
        parts = [part[0].transpose(0, 1) for part in (query, key, value)]  # tokens first
        wide = torch.promote_types(query.dtype, torch.float32)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*(part.to(held) for part in parts))
            ctx.blocks, ctx.scaling, ctx.wide = blocks, scaling, wide
        asked, *known = (part.to(wide) for part in parts)
        made = asked.new_empty(*asked.shape[:2], value.shape[-1])
        made[blocks.layout.tokens :] = 0
        for piece in _pieces(blocks):
            asking = piece.fold(piece.spread(asked), key.shape[1])
            keys, values = map(piece.seen, known)
            piece.gather(piece.weights(asking, keys, scaling) @ values, made)
        return made[None].to(query.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        asked, *known = (part.to(ctx.wide) for part in ctx.saved_tensors)
        given, groups = gradient[0].to(ctx.wide), known[0].shape[1]
        of_asked, *of_known = (torch.empty_like(part) for part in (asked, *known))
        row = ctx.blocks.layout
        for part in (of_asked, *of_known):
            part[: row.prefix], part[row.tokens :] = 0, 0
        for piece in _pieces(ctx.blocks):
            asking = piece.fold(piece.spread(asked), groups)
            keys, values = map(piece.seen, known)
            back = piece.fold(piece.spread_back(given), groups)
            weights = piece.weights(asking, keys, ctx.scaling)
            of_values = weights.transpose(2, 3) @ back
            of_scores = torch._softmax_backward_data(
                back @ values.transpose(2, 3), weights, -1, weights.dtype
            ).mul_(ctx.scaling)
            piece.gather(of_scores @ keys, of_asked)
            for whole, part in zip(
                of_known, (of_scores.transpose(2, 3) @ asking, of_values), strict=True
            ):
                own = part[:, :, piece.before :]
                if piece.block is None:
                    whole[piece.where] += own[0].transpose(0, 1)
                else:
                    whole[: piece.before] += part[:, :, : piece.before].sum(0).transpose(0, 1)
                    piece.gather(own.contiguous(), whole)
        grads = (part.transpose(0, 1)[None].to(gradient.dtype) for part in (of_asked, *of_known))
        return *grads, None, None, None
