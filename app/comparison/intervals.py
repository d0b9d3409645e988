"""How sure a score is: Wilson's interval for right or wrong, the bootstrap's for everything else."""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
RESAMPLES = 4000
SEED = 1
FEWEST = 10  # with fewer examples off the commonest score a bootstrap has too little to draw from
_CHUNK = 500  # resamples at a time, so that memory stays small

Array = NDArray[np.float64]


class Interval(NamedTuple):
    """From `low` to `high`, in the unit of the score."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether the value lies in it."""
        return self.low <= value <= self.high


def quantile(level: float) -> float:
    """How many standard errors a two-sided interval of this level reaches: 1.96 for 0.95."""
    return NormalDist().inv_cdf(0.5 + level / 2)


def wilson(right: float, total: float, level: float = LEVEL) -> Interval:
    """Of a share: `right` of `total`.

    Wilson 1927, Journal of the American Statistical Association 22, 209-212. `right` need not be
    whole: of a mean of scores from 0 to 1 the interval is then too wide, never too narrow, because
    no such scores vary more than zeros and ones do. Of nothing it may be anything.
    """
    if not total:
        return Interval(0.0, 1.0)
    z = quantile(level)
    share = right / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    spread = share * (1 - share) / total + z * z / (4 * total * total)
    half = z * math.sqrt(spread) / (1 + z * z / total)
    # At the ends it begins and ends at them exactly, whatever rounding says.
    low = max(0.0, middle - half) if right > 0 else 0.0
    return Interval(low, min(1.0, middle + half) if right < total else 1.0)


def of_means(scores: Array, drawn: Array, level: float = LEVEL) -> list[Interval]:
    """Of the mean of each column of scores from 0 to 1, (examples, models), from `means(scores)`.

    Where nearly all scores are the same the bootstrap collapses: there it is Wilson's.
    """
    return [
        wilson(float(column.sum()), len(column), level)
        if is_thin(column)
        else corrected(values, float(column.mean()), level, acceleration(column))
        for column, values in zip(scores.T, drawn.T, strict=True)
    ]


def means(scores: Array) -> Array:
    """The means of each column in RESAMPLES draws of the rows, (draws, columns)."""
    narrow = scores.astype(np.float32)
    return resampled(len(scores), lambda counts: counts @ narrow / np.float32(len(scores)))


def is_thin(values: Array) -> bool:
    """Whether fewer than FEWEST values differ from the commonest one."""
    counts = np.unique(values, return_counts=True)[1]
    return bool(len(values) - counts.max() < FEWEST)


def resampled(total: int, statistic: Callable[[Any], Any], seed: int = SEED) -> Array:
    """The statistic of RESAMPLES draws of `total` examples with replacement; the same each time.

    It is given how often each draw holds each example, (draws, examples), and answers with one
    value a draw, or several.
    """
    chance = np.random.default_rng(seed)
    rows = np.arange(_CHUNK)[:, None] * total
    parts = []
    for _ in range(RESAMPLES // _CHUNK):
        drawn = chance.integers(total, size=(_CHUNK, total), dtype=np.int32) + rows
        counts = np.bincount(drawn.ravel(), minlength=_CHUNK * total)
        parts.append(statistic(counts.reshape(_CHUNK, total).astype(np.float32)))
    return np.concatenate(parts).astype(float)


def acceleration(values: Array) -> float:
    """How fast the error of the mean changes with the mean; the jackknife's, in closed form."""
    off = values - values.mean()
    spread = float((off**2).sum())
    return float((off**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0


def corrected(
    drawn: Array, found: float, level: float = LEVEL, acceleration: float = 0.0
) -> Interval:
    """The BCa interval of a statistic that was `found`, from its resampled values.

    Efron 1987, Journal of the American Statistical Association 82, 171-185. With an acceleration of
    0 it is corrected for bias alone. What was found lies in it always.
    """
    below = float(np.mean(drawn < found) + np.mean(drawn == found) / 2)
    edge = 1 / (2 * len(drawn))
    bias = NormalDist().inv_cdf(min(1 - edge, max(edge, below)))
    ends = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        moved = bias + NormalDist().inv_cdf(tail)
        share = NormalDist().cdf(bias + moved / (1 - acceleration * moved))
        ends.append(float(np.quantile(drawn, share)))
    return Interval(min(ends[0], found), max(ends[1], found))
