"""training.stats against the standard library, numpy and cases whose answer is known."""

import math
import random
import statistics

import numpy as np
import pytest

from training.stats import (
    Estimate,
    distinct_n,
    mean_and_stderr,
    most_frequent,
    paired_difference,
    pearson,
    ranks,
    ratio_and_stderr,
    spearman,
)

DRAWS = random.Random(7)
X = [DRAWS.gauss(0, 1) for _ in range(200)]
Y = [0.6 * x + DRAWS.gauss(0, 1) for x in X]


def test_mean_and_stderr_is_that_of_the_standard_library() -> None:
    estimate = mean_and_stderr(X)
    assert estimate.n == 200
    assert estimate.mean == pytest.approx(statistics.fmean(X))
    assert estimate.stderr == pytest.approx(statistics.stdev(X) / math.sqrt(200))


def test_one_value_has_an_unknown_error_and_exceeds_nothing() -> None:
    estimate = mean_and_stderr([5.0])
    assert estimate == Estimate(5.0, math.inf, 1)
    assert not estimate.exceeds(0.0)


def test_pairing_removes_what_both_sides_share() -> None:
    shared = [100 * x for x in X]
    gained = [s + 1 + 0.1 * y for s, y in zip(shared, Y, strict=True)]
    paired = paired_difference(gained, shared)
    assert paired.mean == pytest.approx(statistics.fmean(gained) - statistics.fmean(shared))
    assert paired.exceeds(0.9) and not paired.exceeds(1.1)
    assert paired.stderr < 0.01 * mean_and_stderr(gained).stderr


def test_paired_difference_refuses_lists_that_do_not_pair() -> None:
    with pytest.raises(ValueError):
        paired_difference([1.0, 2.0], [1.0])


def test_ratio_of_equal_groups_is_the_mean_of_their_ratios() -> None:
    assert ratio_and_stderr(X, [4.0] * 200).mean == pytest.approx(statistics.fmean(X) / 4)
    assert ratio_and_stderr(X, [4.0] * 200).stderr == pytest.approx(mean_and_stderr([x / 4 for x in X]).stderr)


def test_the_error_of_a_ratio_is_what_resampling_the_groups_finds() -> None:
    wholes = [DRAWS.randint(1, 6) for _ in X]
    parts = [float(sum(DRAWS.random() < 0.3 + 0.4 * (x > 0) for _ in range(w))) for x, w in zip(X, wholes, strict=True)]
    draws = np.random.default_rng(0).integers(0, 200, (4000, 200))
    resampled = np.array(parts)[draws].sum(1) / np.array(wholes)[draws].sum(1)
    assert ratio_and_stderr(parts, wholes).stderr == pytest.approx(resampled.std(), rel=0.08)


def test_correlations_are_numpys() -> None:
    assert pearson(X, Y) == pytest.approx(np.corrcoef(X, Y)[0, 1])
    assert spearman(X, Y) == pytest.approx(np.corrcoef(np.argsort(np.argsort(X)), np.argsort(np.argsort(Y)))[0, 1])


def test_spearman_sees_order_alone_and_a_constant_has_none() -> None:
    assert spearman(X, [math.exp(5 * x) for x in X]) == pytest.approx(1.0)
    assert spearman(X, [-(x**3) for x in X]) == pytest.approx(-1.0)
    assert spearman(X, [1.0] * 200) == 0.0


def test_equal_values_share_their_rank() -> None:
    assert ranks([10.0, 30.0, 20.0, 20.0]) == [1.0, 4.0, 2.5, 2.5]


def test_distinct_n_counts_ngrams_of_words_over_all_texts() -> None:
    assert distinct_n(["I am good", "I am bad"], 1) == 4 / 6
    assert distinct_n(["I am good", "i AM bad"], 2) == 3 / 4
    assert distinct_n(["good " * 50], 2) == 1 / 49
    assert distinct_n(["", "alone"], 2) == 0.0  # no pair at all


def test_most_frequent_text_and_its_share() -> None:
    assert most_frequent(["a", "b", "a", "c"]) == ("a", 0.5)
