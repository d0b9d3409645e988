"""The attention of a packed row with a way back written by hand, for processors.

Only the queries, keys and values are kept, narrow; the weights are made again, in float32 or wider.
All tokens of the examples look at the shared prefix in one product, and at their own example in
products of a block. Each gradient is written once, where autograd would fill, add and copy a tensor
for every slice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from worker.layouts import Blocks
from worker.pieces import Before, Piece, Row, row_of

LARGEST = 2**24  # weights made at a time: more would take much memory


def suits(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks) -> bool:
    """Whether `attend` knows how: one dtype, on a processor, no overly long texts."""
    row = blocks.layout
    sizes = (block.examples * block.longest * (row.prefix + block.longest) for block in row.blocks)
    most = max(row.prefix**2, *sizes, 0)
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype
        and query.dtype in (torch.bfloat16, torch.float32, torch.float64)
        and query.shape[1] * most <= LARGEST
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    before: Before | None,
    blocks: Blocks,
    scaling: float,
    held: torch.dtype,
) -> Tensor:
    """(1, heads, tokens, width) in, (1, tokens, heads, width) out; `held`: the dtype of what is kept.

    `before`, (1, heads of keys, prefix, width) each, where the row does not begin with its prefix.
    """
    lent = before or (None, None)
    made: Tensor = _Attend.apply(query, key, value, *lent, blocks, scaling, held)  # type: ignore[no-untyped-call]
    return made


class _Attend(torch.autograd.Function):
    @staticmethod
    @torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
    def forward(ctx: Any, *given: Any) -> Tensor:
        *parts, blocks, scaling, held = given
        row = row_of(parts, blocks, scaling)
        if any(ctx.needs_input_grad):
            # As products take them: else they would be copied once more on the way back.
            kept = parts[0], row.keys[None], row.values[None], *parts[3:]
            ctx.save_for_backward(*(None if part is None else part.to(held) for part in kept))
            ctx.blocks, ctx.scaling, ctx.dtype = blocks, scaling, parts[0].dtype
        wide = torch.promote_types(row.asking.dtype, torch.float32)
        made = row.asking.new_empty((*row.asking.shape[:3], row.values.shape[2]), dtype=wide)
        made[:, row.spare] = 0
        seen = row.seen(row.asking, row.prefix[0])
        for piece in row.pieces():
            own = row.own(piece)
            weights = _weights(piece, seen, own, wide)
            if own is None:
                made[:, piece.where] = 0
            else:
                values = own[2]
                found = weights[..., piece.before :].flatten(2, 3).to(values.dtype) @ values
                made[:, piece.where] = piece.gather(found.view(*weights.shape[:4], -1))
            seen[:, piece.where] = piece.gather(weights[..., : piece.before].to(seen.dtype))
        made += torch.unflatten(seen.flatten(1, 2) @ row.prefix[1], 1, seen.shape[1:3])
        # (groups, tokens, heads of a group, width) -> (1, tokens, heads, width)
        return made.transpose(0, 1).flatten(1, 2)[None].to(parts[0].dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        parts = [None if part is None else part.to(ctx.dtype) for part in ctx.saved_tensors]
        row = row_of(parts, ctx.blocks, ctx.scaling)
        found = _back(row, gradient)
        found[0].mul_(ctx.scaling)
        asking = found[0].transpose(1, 2).flatten(0, 1)
        lent = found[3:] if parts[3] is not None else (None, None)
        grads = (
            one if one is None else one[None].to(ctx.dtype) for one in (asking, *found[1:3], *lent)
        )
        return *grads, None, None, None


class _Back(NamedTuple):
    """On the way back, all (groups, tokens, ...): what came, the products with the prefix, what goes on."""

    given: Tensor
    seen: Tensor
    of_seen: Tensor
    of_asking: Tensor
    of_keys: Tensor
    of_values: Tensor


def _back(row: Row, gradient: Tensor) -> list[Tensor]:
    """Gradients of queries, keys and values, and of those of a prefix that another row has."""
    groups, first = len(row.keys), row.blocks.layout.first
    given = torch.unflatten(gradient[0], 1, (groups, -1)).transpose(0, 1).contiguous()
    wide = torch.promote_types(given.dtype, torch.float32)
    own = [torch.empty_like(part, dtype=wide) for part in (row.asking, row.keys, row.values)]
    for part in own:
        part[:, :first], part[:, row.spare] = 0, 0
    seen, of_seen = row.seen(row.asking, row.prefix[0]), row.seen(given, row.prefix[1])
    back = _Back(given, seen, of_seen, *own)
    for piece in row.pieces():
        _back_of(piece, row, back)
    weights, of_scores = seen.flatten(1, 2), of_seen.flatten(1, 2)
    back.of_asking.add_(torch.unflatten(of_scores @ row.prefix[0], 1, seen.shape[1:3]))
    shared = [
        of_scores.transpose(1, 2) @ row.asking.flatten(1, 2),
        weights.transpose(1, 2) @ given.flatten(1, 2),
    ]
    for whole, share in zip(own[1:], shared, strict=True):
        whole[:, :first] += share[:, :first]
    return own + shared


def _back_of(piece: Piece, row: Row, back: _Back) -> None:
    """A piece's own gradients; weights and gradients of scores in place of its products with the prefix."""
    wide = back.of_asking.dtype
    own = row.own(piece)
    weights = _weights(piece, back.seen, own, wide)
    if own is None:
        of_scores = _of_scores(weights, piece.joined(back.of_seen, None, wide, back=True))
    else:
        asking, keys, values = own
        given = piece.spread_back(back.given[:, piece.where]).flatten(2, 3).to(values.dtype)
        of_weights = given @ values.transpose(2, 3)
        of_scores = _of_scores(weights, piece.joined(back.of_seen, of_weights, wide, back=True))
        of_own = of_scores[..., piece.before :].flatten(2, 3).to(values.dtype)
        back.of_asking[:, piece.where] = piece.gather((of_own @ keys).view(*weights.shape[:4], -1))
        back.of_keys[:, piece.where] = piece.gather(of_own.transpose(2, 3) @ asking)
        own_weights = weights[..., piece.before :].flatten(2, 3).to(values.dtype)
        back.of_values[:, piece.where] = piece.gather(own_weights.transpose(2, 3) @ given)
    for seen, both in ((back.seen, weights), (back.of_seen, of_scores)):
        seen[:, piece.where] = piece.gather(both[..., : piece.before].to(seen.dtype))


def _weights(
    piece: Piece, seen: Tensor, own: tuple[Tensor, Tensor, Tensor] | None, wide: torch.dtype
) -> Tensor:
    """What the piece's queries give to all keys they see: of the prefix, and of their own example."""
    scores = None if own is None else own[0] @ own[1].transpose(2, 3)
    return piece.weights(piece.joined(seen, scores, wide))


def _of_scores(weights: Tensor, of_weights: Tensor) -> Tensor:
    return torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
