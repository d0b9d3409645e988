"""How good a model is on examples it was not trained on: losses and greedy answers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicLayer

from worker import attention, head, lanes, lending, packing
from worker.backbones import compute, embed, inner, num_virtual
from worker.distributed import ALONE, Group
from worker.generate import read, room
from worker.hardware import Hardware
from worker.packing import Example, Packed


class Loss(NamedTuple):
    """Of one example: the summed loss of its answer's tokens, in nats, and how many they are."""

    example: int
    total: float
    tokens: int


def mean(losses: Sequence[Loss]) -> float:
    """The loss per target token over all these examples."""
    return sum(loss.total for loss in losses) / max(1, sum(loss.tokens for loss in losses))


def token_losses(model: Any, soft_prefix: Tensor | None, row: Packed, machine: Hardware) -> Tensor:
    """The loss of each target of a packed row, (targets,), float32, with its gradient.

    Run it, and its backward pass, inside `attention.packed(inner(model), row.layout, lender)`.
    """
    backbone = inner(model)
    inputs: dict[str, Any] = {"attention_mask": row.attention_mask, "use_cache": False}
    if soft_prefix is None or (row.layout is not None and row.layout.borrows):
        inputs["input_ids"] = row.input_ids
    else:
        with compute(machine):
            inputs["inputs_embeds"] = embed(backbone, soft_prefix, row.input_ids)
    if row.layout is not None:
        inputs["position_ids"] = row.position_ids
    return head.losses(backbone, inputs, row, machine)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without dropout and gradients; afterwards the model is in the mode it was in."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def losses(
    model: Any,
    soft_prefix: Tensor | None,
    examples: Sequence[Example],
    machine: Hardware,
    *,
    plain: bool,
    group: Group = ALONE,
) -> Iterator[list[Loss]]:
    """The loss of every example of this process's share, a packed row or two at a time."""
    virtual = num_virtual(soft_prefix)
    paired = lanes.suit(machine) and group.size == 1 and not plain
    how = {"plain": plain, "pairs": paired, "even": machine.keeps_shapes, "lend": not group.spreads}
    rows = group.rows(examples, machine.token_budget, virtual, **how)
    lender = lending.between([row for row, _ in rows])
    alone = lender is not None and not lender.awaited

    def measure(row: Packed) -> Tensor:
        row = row.to(machine.device)
        around = attention.packed(inner(model), row.layout, lender)
        with lending.minding(lender), torch.no_grad(), around:
            return token_losses(model, soft_prefix, row, machine).cpu()

    for some in lanes.groups(rows, paired=paired, alone=alone):
        with evaluating(model), attention.packed(inner(model), some[0][0].layout):
            measured = lanes.side_by_side(measure, [row for row, _ in some], machine)
        found: list[Loss] = []
        for (row, weight), each in zip(some, measured, strict=True):
            counted = sorted(set(row.examples.tolist())) if weight else ()
            own = [(index, each[row.examples == index]) for index in counted]
            found += [Loss(index, float(of.sum(dtype=torch.float64)), len(of)) for index, of in own]
        yield found


class Answer(NamedTuple):
    """The tokens that a model gave to a prompt, without the one that ends them."""

    prompt: int
    ids: list[int]


def answers(
    model: Any,
    soft_prefix: Tensor | None,
    prompts: Sequence[Sequence[int]],
    stop_ids: Set[int],
    max_new_tokens: int,
    machine: Hardware,
) -> Iterator[list[Answer]]:
    """The likeliest answer to each prompt, many at a time; those that ended, after every token.

    What all prompts begin with, a prompt vector included, is read once. Leaves the model in
    evaluation mode. Raises Invalid if a prompt is too long for the model.
    """
    model.eval()
    limits = [room(model, soft_prefix, prompt, max_new_tokens) for prompt in prompts]
    virtual = num_virtual(soft_prefix)
    common = packing.shared_prefix([packing.Row(prompt, ()) for prompt in prompts])
    begin = list(prompts[0][: common or (0 if virtual else 1)])
    _, cache = read(
        model, soft_prefix, torch.tensor([begin], dtype=torch.long, device=machine.device)
    )
    exact = _pads(cache, virtual, prompts, max_new_tokens)
    if not exact:
        common = 0
    start = Start(cache, virtual + common) if exact and virtual + common else None
    for members in _batches(prompts, machine.prompts_at_once, cache, exact):
        rest = [list(prompts[index][common:]) for index in members]
        most = [limits[index] for index in members]
        for ended in _answer(model, soft_prefix, rest, most, stop_ids, start):
            yield [Answer(members[row], ids) for row, ids in ended]


class Start(NamedTuple):
    """What all prompts begin with, read already: `places` of one row."""

    cache: Any
    places: int


def shares(
    model: Any, soft_prefix: Tensor | None, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> bool:
    """Whether `answers` can read what all these prompts begin with once: found out by reading one token."""
    word = torch.tensor([prompts[0][:1]], dtype=torch.long, device=inner(model).device)
    with evaluating(model):
        _, cache = read(model, soft_prefix, word)
    return _pads(cache, num_virtual(soft_prefix), prompts, max_new_tokens)


def _pads(cache: Any, virtual: int, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> bool:
    """Whether padding between what is cached and what is read next changes nothing.

    It does where a layer looks back a number of places smaller than the longest text, or is no
    attention at all.
    """
    longest = virtual + max(map(len, prompts)) + max_new_tokens
    return all(
        type(layer) is DynamicLayer or getattr(layer, "sliding_window", 0) > longest
        for layer in cache.layers
    )


def _batches(
    prompts: Sequence[Sequence[int]], size: int, cache: Any, exact: bool
) -> Iterator[list[int]]:
    """Prompts to be answered together, the shortest first; of equal length where padding is not exact."""
    if not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        size = 1  # these caches cannot leave a row out when it has ended
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for _, same in itertools.groupby(by_length, key=lambda index: exact or len(prompts[index])):
        members = list(same)
        yield from (members[first : first + size] for first in range(0, len(members), size))


def _padded(rest: list[list[int]], before: int) -> tuple[Tensor, Tensor]:
    """Token ids padded on the left, (rows, longest), and what may be seen, 0 at padding.

    The mask, (rows, before + longest), shows all of the `before` places that are read already.
    """
    longest = max(map(len, rest))
    ids = torch.tensor([[0] * (longest - len(one)) + one for one in rest])
    mask = torch.ones(len(rest), before + longest, dtype=torch.long)
    for row, one in enumerate(rest):
        mask[row, before : before + longest - len(one)] = 0
    return ids, mask


def _answer(
    model: Any,
    soft_prefix: Tensor | None,
    rest: list[list[int]],
    limits: list[int],
    stop_ids: Set[int],
    start: Start | None,
) -> Iterator[list[tuple[int, list[int]]]]:
    """Go on from `start` with `rest`, padded on the left; after each token the rows that ended."""
    ids, mask = _padded(rest, start.places if start else num_virtual(soft_prefix))
    ids, mask = ids.to(inner(model).device), mask.to(inner(model).device)
    cache = None
    if start:
        cache, soft_prefix = copy.deepcopy(start.cache), None
        cache.batch_repeat_interleave(len(rest))
    running = list(range(len(rest)))
    written: list[list[int]] = [[] for _ in rest]
    while running:
        logits, cache = read(model, soft_prefix, ids, cache=cache, mask=mask)
        soft_prefix = None
        going = []
        for place, token in enumerate(logits.argmax(-1).tolist()):
            row = running[place]
            if token not in stop_ids:
                written[row].append(token)
            if token not in stop_ids and len(written[row]) < limits[row]:
                going.append(place)
        yield [(row, written[row]) for place, row in enumerate(running) if place not in going]
        chosen = logits.argmax(-1)[going]
        if len(going) < len(running):
            running = [running[place] for place in going]
            if running:
                kept = torch.tensor(going, device=mask.device)
                cache.batch_select_indices(kept)
                mask = mask[kept]
        ids = chosen[:, None]
        mask = functional.pad(mask, (0, 1), value=1)
