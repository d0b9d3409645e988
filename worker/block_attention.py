"""The attention of a packed row with a way back written by hand, for processors.

Only the queries, keys and values are kept, narrow; the weights are made again, in float32 or wider.
All tokens of the examples look at the shared prefix in one product, and at their own example in
products of a block. Each gradient is written once, where autograd would fill, add and copy a tensor
for every slice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from worker.layouts import Blocks
from worker.pieces import Before, Row, row_of

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
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*(None if part is None else part.to(held) for part in parts))
            ctx.blocks, ctx.scaling, ctx.dtype = blocks, scaling, parts[0].dtype
        row = row_of(parts, blocks, scaling)
        wide = torch.promote_types(row.asking.dtype, torch.float32)
        made = row.asking.new_empty((*row.asking.shape[:3], row.values.shape[2]), dtype=wide)
        made[:, row.examples.stop :] = 0
        seen = row.seen(row.asking, row.prefix[0])
        for piece, asking, keys, values in row.pieces():
            weights = piece.weights(piece.joined(seen, asking @ keys.transpose(2, 3), wide))
            own = weights[..., piece.before :].flatten(2, 3).to(values.dtype) @ values
            made[:, piece.where] = piece.gather(own.view(*weights.shape[:4], -1))
            if piece.before:
                seen[:, piece.among] = piece.gather(weights[..., : piece.before].to(seen.dtype))
        if row.blocks.layout.prefix:
            shared = seen.flatten(1, 2) @ row.prefix[1]
            made[:, row.examples] += torch.unflatten(shared, 1, seen.shape[1:3])
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


def _back(row: Row, gradient: Tensor) -> list[Tensor]:
    """Gradients of queries, keys and values, and of those of a prefix that another row has."""
    groups = len(row.keys)
    given = torch.unflatten(gradient[0], 1, (groups, -1)).transpose(0, 1).contiguous()
    wide = torch.promote_types(given.dtype, torch.float32)
    of_asking, of_keys, of_values = (
        torch.empty_like(part, dtype=wide) for part in (row.asking, row.keys, row.values)
    )
    for part in (of_asking, of_keys, of_values):
        part[:, row.examples.stop :] = 0
    seen, of_seen = row.seen(row.asking, row.prefix[0]), row.seen(given, row.prefix[1])
    for piece, asking, keys, values in row.pieces():
        back = piece.spread_back(given[:, piece.where]).flatten(2, 3).to(values.dtype)
        weights = piece.weights(piece.joined(seen, asking @ keys.transpose(2, 3), wide))
        of_weights = piece.joined(of_seen, back @ values.transpose(2, 3), wide, back=True)
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, wide)
        own, of_own = (
            whole[..., piece.before :].flatten(2, 3).to(values.dtype)
            for whole in (weights, of_scores)
        )
        shape = *weights.shape[:4], -1
        of_asking[:, piece.where] = piece.gather((of_own @ keys).view(shape))
        of_keys[:, piece.where] = piece.gather(of_own.transpose(2, 3) @ asking)
        of_values[:, piece.where] = piece.gather(own.transpose(2, 3) @ back)
        if piece.before:
            seen[:, piece.among] = piece.gather(weights[..., : piece.before].to(seen.dtype))
            of_seen[:, piece.among] = piece.gather(of_scores[..., : piece.before].to(seen.dtype))
    found = [of_asking, of_keys, of_values]
    if row.blocks.layout.prefix:
        weights, of_scores = (part.flatten(1, 2) for part in (seen, of_seen))
        asking, back = (part[:, row.examples] for part in (row.asking, given))
        into = torch.unflatten(of_scores @ row.prefix[0], 1, asking.shape[1:3])
        of_asking[:, row.examples] += into
        found.append(of_scores.transpose(1, 2) @ asking.flatten(1, 2))
        found.append(weights.transpose(1, 2) @ back.flatten(1, 2))
        first = row.blocks.layout.first
        for whole, share in zip(found[1:3], found[3:], strict=True):
            whole[:, :first] += share[:, :first]
    return found
