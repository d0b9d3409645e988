"""The attention of a packed row: each example sees the shared prefix and itself, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from worker import block_attention
from worker.layouts import Block, Blocks, Layout
from worker.lending import Lender
from worker.pieces import Before

NAME = "packed_rows"
HELD = "studio_held"  # the attribute of a layer with the dtype of what it keeps for its way back
# What some architectures ask of their attention and this one does not do.
UNKNOWN = ("s_aux", "position_bias", "cache", "head_mask")
SHORT = 256  # tokens


_row: ContextVar[Layout | None] = ContextVar("row", default=None)
_lender: ContextVar[Lender | None] = ContextVar("lender", default=None)


@contextmanager
def packed(model: Any, row: Layout | None, lender: Lender | None = None) -> Iterator[None]:
    """Let `model` (transformers') attend as this packed row needs; forward and backward go inside.

    None: a plain row, nothing is changed. `lender`: whom the row lends its prefix to or borrows one from.
    """
    if row is None:
        yield
        return
    before = model.config._attn_implementation
    if before != NAME:
        model.set_attn_implementation(NAME)
    token, given = _row.set(row), _lender.set(lender)
    try:
        yield
    finally:
        _row.reset(token)
        _lender.reset(given)
        if before != NAME:
            model.set_attn_implementation(before)


def _blocks(*, mask_function: Callable[..., Any], device: Any, **_: Any) -> Blocks:
    """The model's own rule of who sees whom, asked for positions instead of places in the row."""
    row = _row.get()
    if row is None:
        raise RuntimeError("Packed rows need their layout.")
    none = torch.zeros((), dtype=torch.long, device=device)
    place = torch.arange(row.prefix + row.longest, device=device)
    causal: Tensor = mask_function(none, none, place[:, None], place[None, :])
    causal = causal.expand(len(place), len(place))
    return Blocks(row, causal[: row.prefix, : row.prefix], causal[row.prefix :], _lender.get())


class _Spread(torch.autograd.Function):
    """Tokens, (tokens, heads, width), put into the places of a padded block.

    Padding brings no gradient back, so the way back is a look-up too, not a sum.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, spread: Tensor, gathered: Tensor) -> Tensor:
        ctx.save_for_backward(gathered)
        return tokens.index_select(0, spread)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (gathered,) = ctx.saved_tensors
        return gradient.index_select(0, gathered), None, None


class _Gather(torch.autograd.Function):
    """The way back: the tokens that lie at these places of a block; padding is left out."""

    @staticmethod
    def forward(ctx: Any, block: Tensor, gathered: Tensor) -> Tensor:
        ctx.save_for_backward(gathered)
        ctx.places = block.shape[0]
        return block.index_select(0, gathered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (gathered,) = ctx.saved_tensors
        block = gradient.new_zeros((ctx.places, *gradient.shape[1:]))
        return block.index_copy_(0, gathered, gradient), None


class _How(NamedTuple):
    """What an architecture asks of its attention; `softcap` bounds the scores by a tanh."""

    scaling: float | None
    dropout: float
    softcap: float | None


def _weigh(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, how: _How) -> Tensor:
    """Attention, all parts (rows, heads, tokens, width), the mask (tokens, tokens of the keys).

    On a CPU plain products are faster for short blocks than the fused kernel, whose way back is
    slow in bf16: 9 against 28 ms for 34 examples of 29 tokens. Long ones would take more memory.
    """
    groups = query.shape[1] // key.shape[1]
    short = query.device.type == "cpu" and len(mask) <= SHORT
    if how.softcap is None and not short:
        return functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=how.dropout,
            scale=how.scaling,
            enable_gqa=groups > 1,
        )
    rows, _, tokens, width = query.shape
    scaling = width**-0.5 if how.scaling is None else how.scaling
    # Heads that share keys become more queries to these keys, so that no key is copied.
    folded = (query * scaling).reshape(rows, key.shape[1], groups * tokens, width)
    scores = folded @ key.transpose(2, 3)
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    scores = scores.view(rows, key.shape[1], groups, *mask.shape).masked_fill_(~mask, -torch.inf)
    weights = functional.dropout(scores.softmax(-1), how.dropout).flatten(2, 3)
    return (weights @ value).view(rows, query.shape[1], tokens, value.shape[-1])


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Blocks,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one packed row, (1, heads, tokens, width) in, (1, tokens, heads, width) out.

    The prefix looks at itself; then all examples, side by side as a padded block, look at the
    prefix and at themselves. Raises NotImplementedError for what it cannot do exactly.
    """
    for name in UNKNOWN:
        if others.get(name) is not None:
            raise NotImplementedError(f"attention with {name}")
    # Turned by angles in float32, queries and keys are that, too, beside narrow values.
    query, key = query.to(value.dtype), key.to(value.dtype)
    before: Before | None = None
    if (lender := attention_mask.lender) is not None:
        row = attention_mask.layout
        if row.borrows:
            before = lender.borrow(module)
        else:
            key, value = lender.lend(module, key, value, row.prefix)
    if softcap is None and not dropout and block_attention.suits(query, key, value, attention_mask):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        held = getattr(module, HELD, query.dtype)
        return block_attention.attend(query, key, value, before, attention_mask, scale, held), None
    return _attend_by_autograd(
        query, key, value, before, attention_mask, _How(scaling, dropout, softcap)
    ), None


def _attend_by_autograd(
    query: Tensor, key: Tensor, value: Tensor, before: Before | None, blocks: Blocks, how: _How
) -> Tensor:
    row, first = blocks.layout, blocks.layout.first
    sizes = [len(block.gathered) for block in row.blocks]
    parts = [
        torch.split(part[0, :, first : row.tokens].transpose(0, 1), sizes)
        for part in (query, key, value)
    ]
    asking, *own_prefix = (part[:, :, :first] for part in (query, key, value))
    shared = before or own_prefix
    answers: list[Tensor] = []
    if first:
        head = _weigh(asking, shared[0], shared[1], blocks.head, how)
        answers.append(head[0].transpose(0, 1))
    for block, *own in zip(row.blocks, *parts, strict=True):
        asking, *seen = (_spread(block, part) for part in own)
        keys, values = (
            torch.cat((theirs.expand(block.examples, -1, -1, -1), after), dim=2)
            for theirs, after in zip(shared, seen, strict=True)
        )
        mask = blocks.tail[: block.longest, : row.prefix + block.longest]
        tail = _weigh(asking, keys, values, mask, how).transpose(1, 2).flatten(0, 1)
        answers.append(_Gather.apply(tail, block.gathered))  # type: ignore[no-untyped-call]
    spare = query.shape[2] - row.tokens
    answers.append(value.new_zeros(spare, query.shape[1], value.shape[-1]))
    return torch.cat(answers)[None]


def _spread(block: Block, tokens: Tensor) -> Tensor:
    """(tokens, heads, width) -> (examples, heads, longest, width)."""
    spread: Tensor = _Spread.apply(tokens, block.spread, block.gathered)  # type: ignore[no-untyped-call]
    return spread.view(block.examples, block.longest, *tokens.shape[1:]).transpose(1, 2)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _blocks)
