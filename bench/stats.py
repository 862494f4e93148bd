"""Intervals, mean ± std over seeds, and paired tests: what may be said of a measured share.

Wilson's interval: Wilson, JASA 1927. McNemar's test: McNemar, Psychometrika 1947, in its exact binomial form.
Holm's correction: Holm, Scandinavian Journal of Statistics 1979.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bench.errors import UsageError


def wilson(
    successes: ArrayLike, n: ArrayLike, level: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The score interval of a share, as fractions in [0,1]: lower and upper ends, shaped like the arguments.

    Args:
        successes: how many of the n; need not be whole, for the mean over several seeds is not.
        n: trials, at least one.
        level: the coverage that is aimed at.

    Raises:
        UsageError: a count outside 0..n, no trials, or a level outside (0,1).
    """
    # copies, for what is merely broadcast may not be written to, and statsmodels asks for arrays that may
    k, total = map(np.array, np.broadcast_arrays(np.asarray(successes, float), np.asarray(n, float)))
    if not 0 < level < 1:
        raise UsageError(f"level {level} of an interval is not between 0 and 1; 0.95 is usual")
    if not ((total > 0) & (k >= 0) & (k <= total)).all():
        raise UsageError(f"no interval for {k} successes of {total}; expected 0 ≤ successes ≤ n, n > 0")
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(k, total, alpha=1 - level, method="wilson")
    # at the two borders the ends are 0 and 1 but for rounding
    return np.where(k == 0, 0.0, low), np.where(k == total, 1.0, high)


def mean_std(values: Sequence[float] | NDArray[np.float64]) -> tuple[float, float]:
    """Mean and sample standard deviation (divisor n-1); the latter is NaN for one value.

    Raises:
        UsageError: there are no values.
    """
    if len(values) == 0:
        raise UsageError("no mean of no values; give at least one")
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else math.nan


def mcnemar(a: ArrayLike, b: ArrayLike) -> float:
    """The exact two-sided p-value that two defenses are right on equally many of the same images.

    Only images on which they differ speak: under the null hypothesis each is a fair coin.

    Args:
        a: whether the first defense holds, bool `(n,)`.
        b: whether the second one does, on the same images, bool `(n,)`.

    Raises:
        UsageError: the two are not of one length.
    """
    first, second = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    if first.shape != second.shape:
        raise UsageError(f"{first.size} and {second.size} images; a paired test needs the same ones")
    from statsmodels.stats.contingency_tables import mcnemar as test

    table = [
        [(first & second).sum(), (first & ~second).sum()],
        [(second & ~first).sum(), (~first & ~second).sum()],
    ]
    return float(test(table, exact=True).pvalue)


def holm(pvalues: ArrayLike) -> NDArray[np.float64]:
    """The p-values adjusted for being several, in the order given: reject those below the family's level.

    Raises:
        UsageError: a value that is no probability.
    """
    p = np.asarray(pvalues, dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise UsageError(f"p-values lie between 0 and 1; got {p}")
    if not p.size:
        return p
    from statsmodels.stats.multitest import multipletests

    adjusted: NDArray[np.float64] = multipletests(p, method="holm")[1]
    return adjusted


#: the largest number of images that `images_needed` looks at: no test set has as many
MOST_IMAGES = 1_000_000


def images_needed(p10: float, p01: float, *, alpha: float = 0.05, power: float = 0.8) -> int:
    """The smallest number of images on which McNemar's exact test tells two defenses apart often enough.

    Of n images D ~ Binomial(n, p10 + p01) are discordant, and of those Binomial(D, p10 / (p10 + p01)) speak for the
    first defense. The test is two-sided and sees D, so its power at n is the mean over D of the chance to reject.

    That chance is a saw-tooth in D: each time the critical count stays where it was, one more image costs power. The
    search therefore halves intervals on the running maximum of the chance over D instead, whose mean never falls with n
    and is never below the power: no n short of its crossing can do. From there every n is tried in turn.

    Args:
        p10: share of the images on which only the first defense holds.
        p01: share on which only the second one does.
        alpha: the level of the test.
        power: how often it shall reject.

    Raises:
        UsageError: shares that are none or equal, a level or power outside (0,1), or more than `MOST_IMAGES`.
    """
    if not (p10 >= 0 and p01 >= 0 and p10 + p01 <= 1 + 1e-12):
        raise UsageError(
            f"discordant shares {p10:g} and {p01:g}; expected two of at least 0, at most 1 together"
        )
    if p10 == p01:
        raise UsageError(
            f"both defenses win on {p10:g} of the images; no number of images tells equals apart"
        )
    for what, value in (("alpha", alpha), ("power", power)):
        if not 0 < value < 1:
            raise UsageError(f"{what} {value:g} is not between 0 and 1; 0.05 and 0.8 are usual")
    from scipy.stats import binom

    discordant = min(p10 + p01, 1.0)

    def rejects(most: int) -> NDArray[np.float64]:
        """The chance to reject given D = 0..most."""
        d = np.arange(most + 1)
        first = np.asarray(binom.ppf(alpha / 2, d, 0.5))
        critical = first - (np.asarray(binom.cdf(first, d, 0.5)) > alpha / 2)
        share = p10 / (p10 + p01)
        return np.asarray(binom.cdf(critical, d, share) + binom.sf(d - critical - 1, d, share))

    def mean(chance: NDArray[np.float64], n: int) -> float:
        """Over D, but for tails that no sum in double precision would notice."""
        low, high = int(binom.ppf(1e-15, n, discordant)), int(binom.isf(1e-15, n, discordant))
        d = np.arange(low, high + 1)
        return float(binom.pmf(d, n, discordant) @ chance[d])

    enough = 1
    while mean(chance := rejects(int(binom.isf(1e-15, enough, discordant))), enough) < power:
        if enough == MOST_IMAGES:
            raise UsageError(f"more than {MOST_IMAGES:,} images are needed; no test set has as many")
        enough = min(2 * enough, MOST_IMAGES)
    bound = np.maximum.accumulate(chance)
    n = 1 + bisect_left(range(1, enough), power, key=lambda n: mean(bound, n))
    return next(n for n in range(n, enough + 1) if mean(chance, n) >= power)
