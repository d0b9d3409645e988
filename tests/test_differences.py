"""Differences of models that answered the same examples: published cases, errors of both kinds."""

import itertools
import math
from functools import cache

import numpy as np
import pytest

from app.comparison import differences, intervals
from app.comparison.intervals import Interval

PAIRS = list(itertools.combinations(range(4), 2))


@cache
def _tango(gained: int, lost: int, total: int) -> Interval:
    return differences.tango(gained, lost, total)


def test_a_published_case() -> None:
    """Fagerland, Lydersen and Laake 2014: 21 children before and after a transplantation."""
    assert differences.tango(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)
    assert differences.tango(7, 1, 21) == pytest.approx((0.026, 0.517), abs=5e-4)
    # McNemar's exact test gives 0.070, its mid-p version 0.039.
    assert differences.mcnemar(1, 7) == pytest.approx(0.0391, abs=5e-5)


def test_the_interval_is_all_that_the_score_test_does_not_refuse() -> None:
    """At 0 that test is McNemar's without correction: (gained - lost)^2 / (gained + lost)."""
    for gained, lost in itertools.product(range(0, 25, 3), range(1, 25, 3)):
        refused = (gained - lost) ** 2 / (gained + lost) > 3.8415
        assert _tango(gained, lost, 60).holds(0) is not refused
    assert _tango(0, 0, 60) == pytest.approx((-0.0602, 0.0602), abs=5e-4)


@pytest.mark.parametrize("total", [40, 100, 400, 2000])
@pytest.mark.parametrize("right", [0.5, 0.7, 0.9, 0.95, 0.98])
@pytest.mark.parametrize("alike", [0.0, 0.5])
def test_the_interval_of_a_difference_holds_the_true_one(
    total: int, right: float, alike: float
) -> None:
    """In 93 to 97 of 100; more often, never less, where hardly any example sets the two apart."""
    chance = np.random.default_rng(total)
    held, times = 0, 800
    apart = 0.0
    for _ in range(times):
        one = right + chance.uniform(-0.01, 0.01)
        other = max(0.4, one - chance.uniform(0.02, 0.06))
        both = one * other + alike * (min(one, other) - one * other)
        chances = [one - both, other - both]
        gained, lost, _ = chance.multinomial(total, [*chances, 1 - sum(chances)])
        apart += sum(chances) * total / times
        held += _tango(int(gained), int(lost), total).holds(one - other)
    share, error = held / times, 2 * math.sqrt(0.05 * 0.95 / times)
    assert share >= 0.93 - error / 2
    if apart >= 8:
        assert share <= 0.97 + error / 2


def _right(chance: np.random.Generator, total: int, shares: list[float]) -> np.ndarray:
    """Right or wrong of models that find the same examples hard."""
    hard = chance.normal(size=(total, 1))
    own = chance.normal(size=(total, len(shares)))
    edges = [math.sqrt(2) * intervals.NormalDist().inv_cdf(share) for share in shares]
    return (hard + own < np.array(edges)).astype(float)


def _part(chance: np.random.Generator, total: int, shares: list[float]) -> np.ndarray:
    """Scores from 0 to 1 about as high."""
    hard = chance.normal(size=(total, 1))
    own = chance.normal(size=(total, len(shares)))
    return np.clip(np.array(shares) + 0.12 * (hard + own), 0, 1)


def _judged(scores: np.ndarray, binary: bool) -> list[differences.Difference]:
    drawn = None if binary else intervals.means(scores)
    return differences.of_all(scores, PAIRS, drawn=drawn)


@pytest.mark.parametrize(
    ("total", "share", "binary", "times"),
    [(40, 0.6, True, 400), (60, 0.9, True, 400), (400, 0.8, True, 400), (60, 0.6, False, 150)],
)
def test_four_equal_methods_are_called_without_a_difference(
    total: int, share: float, binary: bool, times: int
) -> None:
    chance = np.random.default_rng(7)
    make = _right if binary else _part
    quiet = sum(
        not any(one.seen for one in _judged(make(chance, total, [share] * 4), binary))
        for _ in range(times)
    )
    assert quiet / times >= 0.93


@pytest.mark.parametrize("points", [0.03, 0.08, 0.2])
def test_a_difference_of_the_stated_size_is_found(points: float) -> None:
    """With as many examples as `needed` says, four times in five."""
    chance = np.random.default_rng(11)
    large = _right(chance, 100_000, [0.85, 0.85 - points])
    spread = float(np.mean(large[:, 0] != large[:, 1]))
    total = differences.needed(spread, points)
    times = 300
    seen = 0
    for _ in range(times):
        scores = _right(chance, total, [0.85, 0.85 - points])
        (found,) = differences.of_all(scores, [(0, 1)])
        seen += found.seen and found.points > 0
    assert 0.72 <= seen / times <= 0.92


def test_the_number_needed_by_hand() -> None:
    """Connor's formula: (1.96 sqrt(0.3) + 0.8416 sqrt(0.3 - 0.01))^2 / 0.01."""
    assert differences.needed(0.3, 0.1) == 234
    assert differences.needed(0.3, 0.1, pairs=10) > 234
    assert differences.needed(0.0, 0.03) == differences.needed(0.03, 0.03)


def test_one_crippled_method_among_equal_ones_is_told_apart() -> None:
    chance = np.random.default_rng(3)
    found = _judged(_right(chance, 150, [0.9, 0.9, 0.9, 0.5]), True)
    seen = [pair for pair, one in zip(PAIRS, found, strict=True) if one.seen]
    assert seen == [pair for pair in PAIRS if 3 in pair]
    assert all(one.points > 0.2 and one.corrected.low > 0 for one in found if one.seen)


def test_holm_by_hand() -> None:
    assert differences.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert differences.holm_steps([0.01, 0.04, 0.03, 0.005]) == [3, 2, 2, 4]
    assert differences.holm([0.9, 0.9]) == [1.0, 1.0]
    assert differences.of_all(np.ones((5, 2)), []) == []


def test_what_is_seen_follows_from_p_and_interval_alike() -> None:
    chance = np.random.default_rng(5)
    for _ in range(60):
        for one in _judged(_right(chance, 80, [0.9, 0.8, 0.75, 0.6]), True):
            assert one.corrected.low <= one.interval.low <= one.points <= one.interval.high
            assert one.seen == (one.p_corrected < 0.05 and not one.corrected.holds(0))


def test_the_coin_test_agrees_with_mcnemars_on_right_and_wrong() -> None:
    by = np.array([1.0] * 9 + [-1.0] * 3 + [0.0] * 30)[:, None]
    (p,) = differences.flipped(by)
    exact = 2 * sum(math.comb(12, k) for k in range(4)) / 2**12
    assert p == pytest.approx(exact, abs=0.015)
    assert differences.flipped(np.zeros((10, 1))) == [1.0]


def test_differences_of_scores_with_hardly_any_apart_do_not_collapse() -> None:
    scores = np.full((60, 2), 0.8)
    scores[:3, 1] = 0.4
    (found,) = differences.of_all(scores, [(0, 1)], drawn=intervals.means(scores))
    assert found.points == pytest.approx(0.02)
    assert found.interval.holds(0)
    assert not found.seen
