"""Intervals: published cases, and how often they hold the true value."""

import math

import numpy as np
import pytest

from app.comparison import intervals

SIZES = (40, 60, 150, 500, 2000)
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_published_cases(right: int, total: int, low: float, high: float) -> None:
    assert intervals.wilson(right, total) == pytest.approx((low, high), abs=6e-5)
    turned = intervals.wilson(total - right, total)
    assert turned == pytest.approx((1 - high, 1 - low), abs=6e-5)


def _chances(total: int, share: float) -> list[float]:
    """Of 0 to `total` right answers."""
    logs = [math.lgamma(k + 1) for k in range(total + 1)]
    return [
        math.exp(
            logs[total]
            - logs[k]
            - logs[total - k]
            + k * math.log(share)
            + (total - k) * math.log(1 - share)
        )
        for k in range(total + 1)
    ]


@pytest.mark.parametrize("total", SIZES)
def test_wilsons_interval_holds_the_true_share_in_93_to_97_of_100(total: int) -> None:
    """Reckoned, not simulated: all counts with their chances.

    Counts are whole, so that the coverage jumps with the true share: it is the mean over true
    shares up to a point away, as is usual (Agresti and Coull 1998; Brown, Cai and DasGupta 2001).
    """
    found = [intervals.wilson(right, total) for right in range(total + 1)]
    for share in SHARES:
        near = np.linspace(share - 0.01, share + 0.01, 9)
        held = [
            sum(
                chance
                for chance, one in zip(_chances(total, true), found, strict=True)
                if one.holds(true)
            )
            for true in near
        ]
        assert 0.93 <= np.mean(held) <= 0.97, (total, share)


def _drawn(kind: str, total: int, columns: int) -> tuple[np.ndarray, float]:
    """Scores as ROUGE and F1 have them, and their true mean."""
    chance = np.random.default_rng(total)
    if kind == "spread":
        return chance.beta(2, 1.2, (total, columns)), 2 / 3.2
    # Many right in full, some in part, few not at all.
    parts = chance.choice([1.0, 0.0, -1.0], p=[0.6, 0.1, 0.3], size=(total, columns))
    inside = chance.beta(3, 2, (total, columns))
    return np.where(parts < 0, inside, parts), 0.6 + 0.3 * 3 / 5


@pytest.mark.parametrize("total", SIZES)
@pytest.mark.parametrize("kind", ["spread", "mostly right"])
def test_the_bootstraps_interval_holds_the_true_mean_in_93_to_97_of_100(
    kind: str, total: int
) -> None:
    scores, true = _drawn(kind, total, 1200)
    found = intervals.of_means(scores, intervals.means(scores))
    held = np.mean([one.holds(true) for one in found])
    assert 0.93 <= held <= 0.97


def test_the_bootstrap_is_seeded_and_follows_the_scores() -> None:
    scores, _ = _drawn("spread", 100, 2)
    first, again = (intervals.of_means(scores, intervals.means(scores)) for _ in range(2))
    assert first == again
    for column, one in zip(scores.T, first, strict=True):
        assert one.low < column.mean() < one.high
        error = column.std(ddof=1) / 10
        assert one.high - one.low == pytest.approx(2 * 1.96 * error, rel=0.08)


@pytest.mark.parametrize("others", [0, 1, 9])
def test_where_nearly_all_scores_are_equal_the_interval_does_not_collapse(others: int) -> None:
    scores = np.ones((60, 1))
    scores[:others] = 0.5
    (found,) = intervals.of_means(scores, intervals.means(scores))
    assert found == intervals.wilson(60 - others / 2, 60)
    assert found.high - found.low > 0.05


def test_a_wider_level_is_wider() -> None:
    scores, _ = _drawn("spread", 80, 1)
    drawn = intervals.means(scores)
    (plain,), (wide,) = (intervals.of_means(scores, drawn, level) for level in (0.95, 0.995))
    assert wide.low < plain.low < plain.high < wide.high
    assert intervals.wilson(8, 10, 0.99).low < intervals.wilson(8, 10).low
