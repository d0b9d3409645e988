"""Whether one model answers better than another: both answered the same examples, so by pairs."""

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from app.comparison import intervals
from app.comparison.intervals import LEVEL, SEED, Array, Interval

POWER = 0.8  # how often a difference is to be seen that is there
_FLIPS = 10_000
_CHUNK = 1000


class Difference(NamedTuple):
    """One model's mean score less another's. Alone and corrected for all pairs that were judged."""

    points: float
    interval: Interval  # of this pair alone
    corrected: Interval  # at the level of the step at which Holm's procedure judged the pair
    p: float
    p_corrected: float
    seen: bool  # whether the data show a difference


def of_all(
    scores: Array, pairs: Sequence[tuple[int, int]], *, drawn: Array | None = None
) -> list[Difference]:
    """The differences between these pairs of columns of `scores`, (examples, models).

    They are corrected for being so many. `drawn`, the resampled means of the columns, is for scores
    that are not just right or wrong. A difference is seen where Holm's p-value is below 5 % and the
    corrected interval leaves out 0: never on the strength of one alone.
    """
    if not pairs:
        return []
    by = np.stack([scores[:, one] - scores[:, other] for one, other in pairs], axis=1)
    p = [_mcnemar_of(column) for column in by.T] if drawn is None else flipped(by)
    found = []
    for place, step in enumerate(holm_steps(p)):
        one, other = pairs[place]
        resampled = None if drawn is None else drawn[:, one] - drawn[:, other]
        alone, wide = (
            _interval(by[:, place], resampled, level) for level in (LEVEL, 1 - (1 - LEVEL) / step)
        )
        found.append(Difference(float(by[:, place].mean()), alone, wide, p[place], 1.0, False))
    return [
        one._replace(p_corrected=p, seen=p < 1 - LEVEL and not one.corrected.holds(0))
        for one, p in zip(found, holm(p), strict=True)
    ]


def _interval(by: Array, drawn: Array | None, level: float) -> Interval:
    if drawn is None or intervals.is_thin(by):
        return _tango_of(by, level)
    return intervals.corrected(drawn, float(by.mean()), level, intervals.acceleration(by))


def _tango_of(by: Array, level: float) -> Interval:
    gained, lost = float(by[by > 0].sum()), float(-by[by < 0].sum())
    return tango(gained, lost, len(by), level)


def tango(gained: float, lost: float, total: int, level: float = LEVEL) -> Interval:
    """Of the difference of two paired shares: `gained` examples only the first model has right,
    `lost` ones only the second.

    Tango 1998, Statistics in Medicine 17, 891-908: all differences that a score test does not
    refuse. Fagerland, Lydersen and Laake 2014 (Statistics in Medicine 33, 2850-2875) recommend it.
    Counts need not be whole: of differences of scores it is then too wide, never too narrow.
    """
    z = intervals.quantile(level)
    found = (gained - lost) / total

    def off(asked: float) -> float:
        b = -gained - lost + (2 * total - gained + lost) * asked
        c = -lost * asked * (1 - asked)
        q = (math.sqrt(max(0.0, b * b - 8 * total * c)) - b) / (4 * total)
        spread = total * (2 * q + asked * (1 - asked))
        return abs(gained - lost - total * asked) - z * math.sqrt(max(0.0, spread))

    def end(inside: float, outside: float) -> float:
        for _ in range(50):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if off(middle) <= 0 else (inside, middle)
        return (inside + outside) / 2

    return Interval(end(found, -1.0), end(found, 1.0))


def _mcnemar_of(by: Array) -> float:
    return mcnemar(int((by > 0).sum()), int((by < 0).sum()))


@lru_cache(maxsize=4096)
def mcnemar(gained: int, lost: int) -> float:
    """The mid-p value of McNemar's test: how likely so unequal counts are of equal models.

    Fagerland, Lydersen and Laake 2013, BMC Medical Research Methodology 13:91.
    """
    total, least = gained + lost, min(gained, lost)
    chances = [
        math.exp(
            math.lgamma(total + 1)
            - math.lgamma(k + 1)
            - math.lgamma(total - k + 1)
            - total * math.log(2)
        )
        for k in range(least + 1)
    ]
    if gained == lost:
        return 1.0
    return min(1.0, 2 * math.fsum(chances) - chances[-1])


def flipped(by: Array, seed: int = SEED) -> list[float]:
    """For each column of differences: how likely so large a mean is if each sign were a coin's.

    Two equal models could be exchanged in any example (Fisher's randomization test).
    """
    chance = np.random.default_rng(seed)
    narrow, sums = by.astype(np.float32), by.sum(axis=0)
    beyond = np.zeros(by.shape[1])
    for _ in range(_FLIPS // _CHUNK):
        bits = np.frombuffer(chance.bytes(-(-_CHUNK * len(by) // 8)), np.uint8)
        coins = np.unpackbits(bits)[: _CHUNK * len(by)].reshape(_CHUNK, len(by))
        turned = sums - 2 * (coins.astype(np.float32) @ narrow)
        beyond += (np.abs(turned) >= np.abs(sums) - 1e-4).sum(axis=0)
    return [float(count) for count in (beyond + 1) / (_FLIPS + 1)]


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979, Scandinavian Journal of Statistics 6, 65-70)."""
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=lambda place: p[place])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = highest
    return adjusted


def holm_steps(p: Sequence[float]) -> list[int]:
    """By how many Holm divides the 5 % for each: what is left to judge, until one is not refused."""
    steps, left = [0] * len(p), len(p)
    for place in sorted(range(len(p)), key=lambda place: p[place]):
        steps[place] = left
        if p[place] * left < 1 - LEVEL:
            left = max(1, left - 1)
    return steps


def needed(spread: float, points: float, pairs: int = 1) -> int:
    """How many examples show a difference of so many points four times in five.

    `spread` is the variance of the differences where there is none on average; for right and
    wrong the share of examples that only one model has right. Connor 1987, Biometrics 43, 207-211.
    """
    alpha, spread = (1 - LEVEL) / pairs, max(spread, points)
    reach = intervals.quantile(1 - alpha) * math.sqrt(spread)
    reach += NormalDist().inv_cdf(POWER) * math.sqrt(max(0.0, spread - points**2))
    return math.ceil((reach / points) ** 2)
