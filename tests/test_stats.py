"""Intervals and tests agree with an independent computation, or with one done by hand."""

from itertools import pairwise
from math import comb, isnan, sqrt

import numpy as np
import pytest

from bench.errors import UsageError
from bench.stats import MOST_IMAGES, holm, images_needed, mcnemar, mean_std, wilson


@pytest.mark.parametrize("n", [1, 7, 100, 10_000])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.93, 1.0])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.999])
def test_wilson_is_that_of_scipy(n, share, level):
    from scipy.stats import binomtest

    k = round(share * n)
    expected = binomtest(k, n).proportion_ci(confidence_level=level, method="wilson")
    assert wilson(k, n, level) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_of_arrays_is_wilson_of_their_elements():
    low, high = wilson([0, 3, 10], [10, 10, 20])
    for i, (k, n) in enumerate([(0, 10), (3, 10), (10, 20)]):
        assert (low[i], high[i]) == wilson(k, n)


def test_wilson_of_several_shares_of_the_same_n_needs_it_once():
    assert np.array_equal(wilson([0, 3, 10], 10), wilson([0, 3, 10], [10, 10, 10]))


def test_wilson_of_a_mean_over_seeds_lies_between_its_neighbours():
    assert wilson(3, 10)[0] < wilson(3.5, 10)[0] < wilson(4, 10)[0]


def test_wilson_touches_the_border_exactly():
    n = np.arange(1, 3000)
    assert (wilson(0 * n, n)[0] == 0).all()
    assert (wilson(n, n)[1] == 1).all()


def test_wilson_of_a_half_is_the_one_by_hand():
    # centre 1/2; z² = 3.8415, reach z·sqrt(n/4 + z²/4) / (n + z²) at n = 10
    low, high = wilson(5, 10)
    reach = sqrt(3.841458820694124) * sqrt(2.5 + 3.841458820694124 / 4) / 13.841458820694124
    assert (low, high) == pytest.approx((0.5 - reach, 0.5 + reach), abs=1e-12)


@pytest.mark.parametrize(
    ("k", "n", "level"), [(-1, 5, 0.95), (6, 5, 0.95), (0, 0, 0.95), (1, 2, 95), (float("nan"), 5, 0.9)]
)
def test_wilson_refuses_what_is_no_share(k, n, level):
    with pytest.raises(UsageError):
        wilson(k, n, level)


def test_std_has_the_divisor_of_a_sample():
    assert mean_std([1.0, 2.0, 6.0]) == pytest.approx((3.0, sqrt((4 + 1 + 9) / 2)))


def test_one_value_has_no_std():
    mean, std = mean_std([4.5])
    assert mean == 4.5
    assert isnan(std)


def test_no_values_have_no_mean():
    with pytest.raises(UsageError, match="at least one"):
        mean_std([])


@pytest.mark.parametrize(("b", "c"), [(0, 5), (2, 9), (9, 2), (1, 1), (30, 12)])
def test_mcnemar_is_a_sign_test_on_the_images_that_differ(b, c):
    first = np.array([True] * b + [False] * c + [True] * 40 + [False] * 7)
    second = np.array([False] * b + [True] * c + [True] * 40 + [False] * 7)
    tail = sum(comb(b + c, i) for i in range(min(b, c) + 1)) / 2 ** (b + c)
    assert mcnemar(first, second) == pytest.approx(min(1.0, 2 * tail), rel=1e-12)


@pytest.mark.parametrize(("b", "c"), [(0, 7), (3, 11), (8, 8), (41, 17)])
def test_mcnemar_is_the_binomial_test_of_scipy(b, c):
    from scipy.stats import binomtest

    first, second = [True] * b + [False] * c, [False] * b + [True] * c
    assert mcnemar(first, second) == pytest.approx(binomtest(b, b + c, 0.5).pvalue, rel=1e-12)


def test_mcnemar_of_a_defense_with_itself_says_nothing():
    assert mcnemar([True, False, True], [True, False, True]) == 1.0


def test_mcnemar_refuses_other_images():
    with pytest.raises(UsageError, match="3 and 2 images"):
        mcnemar([True, False, True], [True, False])


def test_holm_by_hand():
    # 0.01 0.02 0.03 0.04 times 4 3 2 1 is 0.04 0.06 0.06 0.04, and the last may not fall below the third
    assert holm([0.02, 0.01, 0.04, 0.03]) == pytest.approx([0.06, 0.04, 0.06, 0.06])


def test_holm_stays_a_probability_and_leaves_a_single_one():
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0]
    assert holm([0.03]).tolist() == [0.03]
    assert holm([]).tolist() == []


def test_holm_refuses_what_is_no_probability():
    with pytest.raises(UsageError, match="between 0 and 1"):
        holm([0.5, 1.5])


def binomial(d, share):
    return [comb(d, i) * share**i * (1 - share) ** (d - i) for i in range(d + 1)]


def power_by_enumeration(n, p10, p01, alpha):
    """Every number of discordant images and every split of them, with the p-value from its definition."""
    total = 0.0
    for d, weight in enumerate(binomial(n, p10 + p01)):
        fair = binomial(d, 0.5)
        for b, chance in enumerate(binomial(d, p10 / (p10 + p01))):
            p = 2 * sum(fair[: min(b, d - b) + 1])
            total += weight * chance * (p <= alpha * (1 + 1e-12))
    return total


@pytest.mark.parametrize(
    ("p10", "p01", "alpha", "power"),
    [
        (0.6, 0.05, 0.05, 0.8),
        (0.5, 0.1, 0.05, 0.8),
        (0.1, 0.5, 0.05, 0.8),
        # all images are discordant: the saw-tooth is at its sharpest
        (0.75, 0.25, 0.05, 0.8),
        (0.8, 0.2, 0.05, 0.55),
        (0.9, 0.1, 0.01, 0.9),
        (0.3, 0.0, 0.05, 0.8),
        # the p-value of five on one side is 2 / 2⁵ = 0.0625 exactly
        (0.5, 0.0, 0.0625, 0.8),
    ],
)
def test_the_images_needed_are_the_first_number_that_has_the_power(p10, p01, alpha, power):
    has = (n for n in range(1, 80) if power_by_enumeration(n, p10, p01, alpha) >= power)
    assert images_needed(p10, p01, alpha=alpha, power=power) == next(has)


def test_more_images_can_have_less_power():
    """Else the test above would not see a search that takes the power for monotone."""
    powers = [power_by_enumeration(n, 0.75, 0.25, 0.05) for n in range(1, 40)]
    assert any(after < before - 0.01 for before, after in pairwise(powers))


def test_images_that_all_speak_for_one_defense_are_needed_six_times():
    # 2 / 2⁵ > 0.05 > 2 / 2⁶
    assert images_needed(1, 0) == images_needed(0, 1) == 6


def test_the_images_needed_come_to_what_the_normal_distribution_says():
    # (1.960 sqrt(p) + 0.842 sqrt(p - d²))² / d² with p = 0.5, d = 0.02; the exact test takes a little more
    assert images_needed(0.26, 0.24) == pytest.approx(9810, rel=0.02)
    assert images_needed(0.26, 0.24) > 9810


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((0.1, 0.1), {}, "no number of images tells equals apart"),
        ((-0.1, 0.1), {}, "at least 0, at most 1 together"),
        ((0.8, 0.3), {}, "at least 0, at most 1 together"),
        ((float("nan"), 0.3), {}, "at least 0, at most 1 together"),
        ((0.2, 0.1), {"alpha": 5}, "alpha 5 is not between 0 and 1"),
        ((0.2, 0.1), {"power": 1}, "power 1 is not between 0 and 1"),
        ((1e-6, 0), {}, f"more than {MOST_IMAGES:,} images"),
    ],
)
def test_images_needed_refuses_what_has_no_answer(arguments, settings, message):
    with pytest.raises(UsageError, match=message):
        images_needed(*arguments, **settings)
