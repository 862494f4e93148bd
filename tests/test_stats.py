"""Intervals and tests agree with an independent computation, or with one done by hand."""

from math import comb, isnan, sqrt

import numpy as np
import pytest

from bench.errors import UsageError
from bench.stats import holm, mcnemar, mean_std, wilson


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


def test_wilson_of_a_mean_over_seeds_lies_between_its_neighbours():
    assert wilson(3, 10)[0] < wilson(3.5, 10)[0] < wilson(4, 10)[0]


def test_wilson_touches_the_border_exactly():
    assert wilson(0, 33)[0] == 0
    assert wilson(33, 33)[1] == 1


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
