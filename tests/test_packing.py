"""Packed rows hold every example once, with the right positions and targets."""

import itertools

import torch

from worker import layouts, packing
from worker.packing import Row

EXAMPLES = [
    Row([1, 5, 6, 7, 8], [20, 21, 2]),
    Row([1, 5, 6, 9], [22, 2]),
    Row([1, 5, 6, 7], [23, 24, 25, 2]),
]


def test_order_is_a_permutation_that_seed_and_epoch_alone_decide() -> None:
    first = packing.order(50, 7, 0)
    torch.manual_seed(1)
    assert packing.order(50, 7, 0) == first
    assert sorted(first) == list(range(50))
    assert packing.order(50, 7, 1) != first
    assert packing.order(50, 8, 0) != first
    # Written down once: a resumed run must go on in the same order under any version.
    assert packing.order(8, 7, 0) == [4, 1, 6, 3, 2, 7, 5, 0]


def test_padded_rows_have_examples_of_like_length_in_an_order_that_stays_random() -> None:
    sizes = [1 + 7 * place % 101 for place in range(101)]
    examples = [Row([5] * size, [2]) for size in sizes]
    order = packing.order(101, 7, 0)
    found = packing.of_like_length(order, examples, 4)
    assert sorted(found) == sorted(order)
    assert found == packing.of_like_length(order, examples, 4)
    assert found[100:] == order[100:]  # the smaller step stays the last one
    steps = [[sizes[index] for index in found[at : at + 4]] for at in range(0, 100, 4)]
    before = [[sizes[index] for index in order[at : at + 4]] for at in range(0, 100, 4)]
    apart = [sum(max(step) - min(step) for step in every) for every in (steps, before)]
    assert apart[0] < 0.3 * apart[1]
    assert [max(step) for step in steps[:8]] != sorted(max(step) for step in steps[:8])
    for window in range(0, 100, 32):  # no example has gone further than its window
        assert set(found[window : window + 32]) == set(order[window : window + 32])


def test_shared_prefix_leaves_the_last_token_of_every_prompt() -> None:
    assert packing.shared_prefix(EXAMPLES) == 3
    assert packing.shared_prefix([EXAMPLES[0]]) == 4
    assert packing.shared_prefix([Row([1, 2, 3], [4]), Row([1, 2], [4])]) == 1
    assert packing.shared_prefix([Row([1, 2], [4]), Row([3, 2], [4])]) == 0


def test_packed_row_has_each_example_after_the_prefix() -> None:
    (row,) = packing.pack(EXAMPLES, 100, virtual=2)
    # From short to long: example 1 (9 | 22), then 2 (7 | 23 24 25) and 0 (7 8 | 20 21).
    assert row.input_ids.tolist() == [[1, 5, 6, 9, 22, 7, 8, 20, 21, 7, 23, 24, 25]]
    assert row.position_ids.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 5, 6, 7, 8],
    ]
    assert row.targets.tolist() == [22, 2, 20, 21, 2, 23, 24, 25, 2]
    assert row.examples.tolist() == [1, 1, 0, 0, 0, 2, 2, 2, 2]
    assert row.keep.tolist() == [5, 6, 8, 9, 10, 11, 12, 13, 14]


def test_every_target_is_predicted_by_the_token_before_it() -> None:
    for plain in (False, True):
        seen: dict[int, list[int]] = {}
        for row in packing.pack(EXAMPLES, 100, virtual=3, plain=plain):
            places = row.keep[row.columns] - 3
            before = row.input_ids[row.rows, places].tolist()
            for example, token, target in zip(
                row.examples.tolist(), before, row.targets.tolist(), strict=True
            ):
                seen.setdefault(example, []).extend((token, target))
        for index, example in enumerate(EXAMPLES):
            text = [example.prompt_ids[-1], *example.answer_ids]
            pairs = [part for pair in itertools.pairwise(text) for part in pair]
            assert seen[index] == pairs


def test_rows_keep_to_the_budget_and_lose_no_example() -> None:
    examples = [Row([1, 2, 3, *range(5, 6 + n % 9)], [30, 31, 2]) for n in range(40)]
    for plain in (False, True):
        rows = packing.pack(examples, 60, virtual=4, plain=plain)
        assert len(rows) > 1
        assert all(row.tokens <= 60 for row in rows)
        found = sorted(index for row in rows for index in set(row.examples.tolist()))
        assert found == list(range(40))


def test_a_long_prefix_lies_alone_beside_one_row_that_would_be_too_long_with_it() -> None:
    examples = [Row([1] * 200 + [5 + place, 6, 7, 8, 9], [2]) for place in range(20)]
    assert [row.tokens for row in packing.pack(examples, 300, lend=True)] == [300]
    assert [row.tokens for row in packing.pack(examples, 256, lend=True)] == [200, 100]
    assert [row.tokens for row in packing.pack(examples, 256)] == [255, 245]


def test_an_example_longer_than_the_budget_has_a_row_of_its_own() -> None:
    long = Row(list(range(50)), [1])
    rows = packing.pack([Row([0, 1], [1]), long, Row([0, 2], [1])], 20)
    assert [sorted(set(row.examples.tolist())) for row in rows] == [[0, 2], [1]]


def test_padding_is_told_by_length_not_by_token() -> None:
    # 0 is a token of the text here and the filler of the padding too.
    (row,) = packing.pack([Row([0, 0], [0, 0]), Row([0, 0, 0, 0], [0, 0])], 100, plain=True)
    assert row.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert len(row.targets) == 4


def test_long_examples_share_no_block_that_would_take_much_memory() -> None:
    found = layouts.layout(40, [480] * 6)
    assert [block.examples for block in found.blocks] == [2, 2, 2]
    assert [block.examples for block in layouts.layout(40, [30] * 16).blocks] == [16]


def test_rows_that_are_filled_up_have_few_lengths() -> None:
    lengths, kept = set(), set()
    for longer in range(300):
        examples = [Row([1, 5, 6, *range(7, 200 + longer)], [20, 21, 2]), *EXAMPLES]
        (row,) = packing.pack(examples, 2000, virtual=2, even=True)
        (usual,) = packing.pack(examples, 2000, virtual=2)
        assert row.tokens == row.input_ids.shape[1] + 2 == row.position_ids.shape[1]
        assert usual.tokens <= row.tokens <= 1.07 * usual.tokens
        assert torch.equal(row.input_ids[:, : usual.tokens - 2], usual.input_ids)
        assert torch.equal(row.keep[row.columns], usual.keep)
        lengths.add(row.tokens)
        kept.add(len(row.keep))
    assert len(lengths) <= 24
    assert kept == {16}
