"""The statistics of a trial by lot: means with intervals, slopes over clusters, exact sign flips, equivalence, grades.

Units are parents: what several SAEs show of one parent is averaged, or stays together when parents are drawn anew.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import mannwhitneyu, spearmanr, t, ttest_1samp

Floats = NDArray[np.float64]
_DRAWS = 2000  # of the bootstrap
_LEVELS = 4000  # to which the sum of differences is rounded, in an exact test


class Interval(NamedTuple):
    """An estimate with its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int


def mean_interval(values: ArrayLike) -> Interval:
    """Mean of independent values, with Student's interval; infinite of one value, NaN of none.

    >>> [round(x, 3) for x in mean_interval([1.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484, 3]
    """
    known = _known(values)
    n = len(known)
    if n == 0:
        return Interval(np.nan, np.nan, np.nan, 0)
    mean = float(known.mean())
    half = float(t.ppf(0.975, n - 1) * known.std(ddof=1) / np.sqrt(n)) if n > 1 else np.inf
    return Interval(mean, mean - half, mean + half, n)


class Line(NamedTuple):
    """A line of least squares, with 95 % intervals, and the correlation."""

    slope: Interval
    intercept: Interval
    r: float


def line_through(x: ArrayLike, y: ArrayLike, clusters: ArrayLike, seed: int = 0) -> Line:
    """``y = intercept + slope · x`` of least squares; intervals from drawing whole clusters (parents) with replacement.

    >>> line = line_through([0.0, 1, 2, 3], [1.0, 3, 5, 7], [0, 0, 1, 1])
    >>> round(line.slope.mean, 6), round(line.intercept.mean, 6), round(line.r, 6)
    (2.0, 1.0, 1.0)
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    names, cluster = np.unique(np.asarray(clusters), return_inverse=True)
    # sums a cluster: any draw of clusters is then a product with how often each was drawn
    parts: Floats = np.stack([np.bincount(cluster, part, len(names)) for part in (np.ones_like(x), x, y, x * x, x * y, y * y)])
    slope, intercept, r = _fit(parts.sum(1))
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=_DRAWS)
    slopes, intercepts, _ = _fit(parts @ counts.T.astype(np.float64))

    def of(best: Floats, draws: Floats) -> Interval:
        low, high = np.nanquantile(draws, [0.025, 0.975])
        return Interval(float(best), float(low), float(high), len(names))

    return Line(of(slope, slopes), of(intercept, intercepts), float(r))


def _fit(sums: Floats) -> tuple[Floats, Floats, Floats]:
    n, x, y, xx, xy, yy = sums
    with np.errstate(all="ignore"):
        covariance, variance = xy / n - x * y / n**2, xx / n - (x / n) ** 2
        slope = covariance / variance
        return slope, (y - slope * x) / n, covariance / np.sqrt(variance * (yy / n - (y / n) ** 2))


def sign_flip_test(differences: ArrayLike) -> float:
    """Two-sided p of Fisher's exact test on paired differences: how many of all 2ⁿ choices of signs have a sum as far from 0.

    Signs are those that the lot could have given. The sum's distribution is found exactly, of differences rounded to one part
    in some thousands of the sum of their sizes.

    >>> sign_flip_test([1.0, 1.0, 1.0]), sign_flip_test([1.0, -1.0])
    (0.25, 1.0)
    """
    known = _known(differences)
    total = np.abs(known).sum()
    if not total:
        return 1.0
    steps = np.rint(np.abs(known) / total * _LEVELS).astype(int)
    chances = np.zeros(2 * steps.sum() + 1)  # of a sum of s steps, at s + steps.sum()
    chances[steps.sum()] = 1.0
    for step in steps:
        chances = (np.roll(chances, step) + np.roll(chances, -step)) / 2
    sums = np.abs(np.arange(len(chances)) - steps.sum())
    seen = np.abs((steps * np.sign(known)).sum())
    return float(min(1.0, chances[sums >= seen].sum()))


def equivalence_test(differences: ArrayLike, margin: float) -> float:
    """Two one-sided t tests: the p of the mean difference lying outside ``± margin``; small where it lies within.

    >>> round(equivalence_test([0.01, -0.01, 0.0, 0.01, -0.01], 0.03), 4)
    0.0013
    """
    known = _known(differences)
    if len(known) < 2 or not known.std():
        return 1.0 if not len(known) or abs(known.mean()) >= margin else 0.0
    above, below = (
        ttest_1samp(known, limit, alternative=side).pvalue for limit, side in ((-margin, "greater"), (margin, "less"))
    )
    return float(max(above, below))


def auc(treated: ArrayLike, untreated: ArrayLike) -> float:
    """Chance that a treated value is larger than an untreated one, ties counted half; NaN without either.

    >>> auc([2.0, 3.0], [1.0, 2.0])
    0.875
    """
    one, other = _known(treated), _known(untreated)
    return float(mannwhitneyu(one, other).statistic / len(one) / len(other)) if len(one) and len(other) else float("nan")


def share_above_median(untreated: ArrayLike, treated: ArrayLike) -> float:
    """Of untreated values, the share above the treated ones' median; NaN without either.

    >>> share_above_median([0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 4.0])
    0.5
    """
    one, other = _known(untreated), _known(treated)
    return float((one > np.median(other)).mean()) if len(one) and len(other) else float("nan")


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's, over the places where both are known; NaN where one is constant."""
    pairs = np.asarray([x, y], dtype=np.float64)
    pairs = pairs[:, np.isfinite(pairs).all(0)]
    if pairs.shape[1] < 3 or not pairs[0].std() or not pairs[1].std():
        return float("nan")
    return float(spearmanr(*pairs).statistic)


def _known(values: ArrayLike) -> Floats:
    numbers = np.asarray(values, dtype=np.float64).ravel()
    return numbers[np.isfinite(numbers)]
