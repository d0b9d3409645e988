"""How much of the machine's rate of matrix products a training step reaches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from app import methods
from benchmarks.cases import Job
from worker import packing
from worker.hardware import Hardware
from worker.packing import Example


class Product(NamedTuple):
    """(rows x inner) times (inner x columns), so many times in a step."""

    rows: int
    inner: int
    columns: int
    times: int

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.inner * self.columns * self.times


class Work(NamedTuple):
    """What one step needs at least: distinct tokens, target tokens, pairs that attend."""

    tokens: int
    targets: int
    pairs: int


def work(examples: Sequence[Example], virtual: int) -> Work:
    """The least work of a step: what its examples share once, no padding, causal pairs only.

    The last token of an answer is only predicted, so it is no token that is read.
    """
    shared = virtual + packing.shared_prefix(examples)
    own = [virtual + len(one.prompt_ids) + len(one.answer_ids) - 1 - shared for one in examples]
    pairs = shared * (shared + 1) // 2
    pairs += sum(length * shared + length * (length + 1) // 2 for length in own)
    return Work(shared + sum(own), sum(len(one.answer_ids) for one in examples), pairs)


def products(
    shapes: dict[str, Any], adapted: list[list[int]], rank: int, whole: bool, step: Work
) -> list[Product]:
    """The matrix products of a step by shape, forward and back.

    A frozen layer of `in` by `out` has two of them (its output, and the gradient of its input), a
    trained one a third (the gradient of its weights). An adapter is two trained layers of width
    `rank`. The output layer sees the target tokens alone.
    """
    found: list[Product] = []

    def layer(tokens: int, into: int, out: int, count: int, trained: bool) -> None:
        found.append(Product(tokens, into, out, count))
        found.append(Product(tokens, out, into, count))
        if trained:
            found.append(Product(into, tokens, out, count))

    for into, out, count in shapes["linear"].values():
        layer(step.tokens, into, out, count, whole)
    for into, out, count in adapted:
        layer(step.tokens, into, rank, count, True)
        layer(step.tokens, rank, out, count, True)
    layer(step.targets, shapes["hidden"], shapes["vocabulary"], 1, whole)
    return found


def attention(shapes: dict[str, Any], step: Work) -> int:
    """Operations of attention's two products, once forward and twice that on the way back."""
    width = shapes["heads"] * shapes["head_dim"]
    return int(3 * 2 * 2 * shapes["layers"] * width * step.pairs)


def measured_rate(wanted: Sequence[Product], machine: Hardware) -> float:
    """Operations per second of these products alone, each shape at its best of three."""
    seconds = 0.0
    for product in wanted:
        left = torch.randn(product.rows, product.inner, dtype=machine.computed)
        right = torch.randn(product.columns, product.inner, dtype=machine.computed).t()
        took = []
        for _ in range(4):  # the first one warms up
            began = time.perf_counter()
            torch.matmul(left, right)
            took.append(time.perf_counter() - began)
        seconds += min(took[1:]) * product.times
    return sum(product.operations for product in wanted) / seconds


def share(job: Job, machine: Hardware, examples_per_second: float) -> dict[str, float]:
    """`gemm_share`: useful operations per second of a mean step, over the rate of its products."""
    method, params = methods.get(job.method), job.settings
    size = params.batch_size * params.accumulate_steps
    ordered = job.ordered()
    steps = [ordered[first : first + size] for first in range(0, len(ordered), size)]
    needed = [work(some, method.virtual_tokens(params)) for some in steps]
    mean = Work(*(round(sum(part) / len(needed)) for part in zip(*needed, strict=True)))
    adapted = method.adapted(job.shapes, params)
    rank, whole = getattr(params, "rank", 0), not method.frozen_base
    wanted = products(job.shapes, adapted, rank, whole, mean)
    useful = sum(one.operations for one in wanted) + attention(job.shapes, mean)
    # A row holds no more tokens than the machine's budget: its products are of that height.
    rows = -(-mean.tokens // machine.token_budget)
    row = Work(mean.tokens // rows, max(1, mean.targets // rows), mean.pairs // rows)
    possible = measured_rate(products(job.shapes, adapted, rank, whole, row), machine)
    reached = useful * examples_per_second / size
    return {"share": reached / possible, "reached": reached, "possible": possible}
