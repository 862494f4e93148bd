"""Intervals, mean ± std over seeds, and paired tests: what may be said of a measured share.

Wilson's interval: Wilson, JASA 1927. McNemar's test: McNemar, Psychometrika 1947, in its exact binomial form.
Holm's correction: Holm, Scandinavian Journal of Statistics 1979.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bench.errors import UsageError


def wilson(
    successes: ArrayLike, n: ArrayLike, level: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The score interval of a share, as fractions in [0,1]: lower and upper ends, shaped like the arguments.

    With z the two-sided normal quantile and p = successes / n, the ends are
    `(p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)`.

    Args:
        successes: how many of the n; need not be whole, for the mean over several seeds is not.
        n: trials, at least one.
        level: the coverage that is aimed at.

    Raises:
        UsageError: a count outside 0..n, no trials, or a level outside (0,1).
    """
    k, total = np.asarray(successes, dtype=np.float64), np.asarray(n, dtype=np.float64)
    if not 0 < level < 1:
        raise UsageError(f"level {level} of an interval is not between 0 and 1; 0.95 is usual")
    if not ((total > 0) & (k >= 0) & (k <= total)).all():
        raise UsageError(f"no interval for {k} successes of {total}; expected 0 ≤ successes ≤ n, n > 0")
    z = NormalDist().inv_cdf((1 + level) / 2)
    p = k / total
    centre = p + z**2 / (2 * total)
    reach = z * np.sqrt(p * (1 - p) / total + (z / (2 * total)) ** 2)
    shrink = 1 + z**2 / total
    # At the two borders the formula gives 0 and 1 but for rounding.
    low = np.where(k == 0, 0.0, np.clip((centre - reach) / shrink, 0.0, 1.0))
    high = np.where(k == total, 1.0, np.clip((centre + reach) / shrink, 0.0, 1.0))
    return low, high


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
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(only_first, only_second), only_first + only_second, 0.5)))


def holm(pvalues: ArrayLike) -> NDArray[np.float64]:
    """The p-values adjusted for being several, in the order given: reject those below the family's level.

    Raises:
        UsageError: a value that is no probability.
    """
    p = np.asarray(pvalues, dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise UsageError(f"p-values lie between 0 and 1; got {p}")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted
