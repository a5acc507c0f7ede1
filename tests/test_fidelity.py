"""Fréchet distance against closed forms, shrinkage and neighbours against slow loops."""

import itertools

import numpy as np
import pytest

from training.data.split import normalised
from training.fidelity import caption_ranks, chance_of_match, frechet_distance, gaussian_of, nearest, shrinkage


@pytest.fixture
def random():
    return np.random.default_rng(0)


def test_frechet_distance_of_numbers_is_the_closed_form():
    for m1, s1, m2, s2 in ((0.0, 1.0, 3.0, 2.0), (-1.0, 0.5, -1.0, 4.0), (2.0, 0.0, 5.0, 0.0)):
        found = frechet_distance(np.array([m1]), np.array([[s1**2]]), np.array([m2]), np.array([[s2**2]]))
        assert found == pytest.approx((m1 - m2) ** 2 + (s1 - s2) ** 2)


def test_frechet_distance_of_independent_numbers_adds_up(random):
    m1, m2 = random.normal(size=(2, 7))
    s1, s2 = random.random((2, 7))
    found = frechet_distance(m1, np.diag(s1**2), m2, np.diag(s2**2))
    assert found == pytest.approx(((m1 - m2) ** 2 + (s1 - s2) ** 2).sum())


def test_frechet_distance_does_not_depend_on_the_axes(random):
    """Gaussians that do not commute: turned by one rotation, they are as far apart; the order does not matter."""
    mu1, mu2 = random.normal(size=(2, 5))
    sigma1, sigma2 = (a @ a.T for a in random.normal(size=(2, 5, 5)))
    turn, _ = np.linalg.qr(random.normal(size=(5, 5)))
    found = frechet_distance(mu1, sigma1, mu2, sigma2)
    turned = frechet_distance(turn @ mu1, turn @ sigma1 @ turn.T, turn @ mu2, turn @ sigma2 @ turn.T)
    assert found == pytest.approx(turned) and found == pytest.approx(frechet_distance(mu2, sigma2, mu1, sigma1))
    eigenvalues = np.linalg.eigvals(sigma1 @ sigma2)  # as eq. 6 has it; not symmetric
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2) - 2 * np.sqrt(eigenvalues.real).sum()
    assert found == pytest.approx(expected)


def test_frechet_distance_of_equals_is_zero_even_without_full_rank(random):
    features = random.normal(size=(40, 3)) @ random.normal(size=(3, 12))
    mean, covariance = np.mean(features, 0), np.cov(features.T)
    assert frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-5)


def test_a_gaussian_of_many_pictures_is_the_usual_one(random):
    features = random.normal(size=(50, 6)).astype(np.float32)
    mean, covariance = gaussian_of(features)
    assert np.allclose(mean, features.mean(0)) and np.allclose(covariance, np.cov(features.T), atol=1e-6)


def slow_shrinkage(features):
    n, d = features.shape
    centred = features - features.mean(0)
    s = sum(np.outer(x, x) for x in centred) / n
    beta = sum(((np.outer(x, x) - s) ** 2).sum() for x in centred) / n**2
    return min(1.0, beta / ((s - np.trace(s) / d * np.eye(d)) ** 2).sum())


@pytest.mark.parametrize("n", [3, 8, 15])
def test_a_gaussian_of_few_pictures_is_shrunk_as_ledoit_and_wolf_have_it(random, n):
    features = random.normal(size=(n, 16)) * np.linspace(0.1, 3, 16) + 5
    share = shrinkage(features)
    assert share == pytest.approx(slow_shrinkage(features)) and 0 < share <= 1
    _, covariance = gaussian_of(features)
    plain = np.cov(features.T)
    assert np.trace(covariance) == pytest.approx(np.trace(plain))
    assert np.allclose(covariance - (1 - share) * plain, share * np.trace(plain) / 16 * np.eye(16))
    assert np.linalg.eigvalsh(covariance).min() > 0


def test_shrinkage_comes_nearer_to_the_truth(random):
    truth = np.diag(np.linspace(0.5, 2, 30))
    features = random.normal(size=(20, 30)) @ np.sqrt(truth)
    errors = [np.square(sigma - truth).sum() for sigma in (gaussian_of(features).covariance, np.cov(features.T))]
    assert errors[0] < errors[1] / 4


def test_equal_pictures_and_a_single_one():
    assert np.allclose(gaussian_of(np.ones((3, 5))).covariance, 0)
    with pytest.raises(ValueError, match="at least 2 pictures, not 1"):
        gaussian_of(np.ones((1, 5)))


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5


def test_the_nearest_is_by_direction_and_not_by_length(random):
    samples, pictures = random.normal(size=(9, 4)), random.normal(size=(20, 4))
    slow = [max(range(20), key=lambda p: cosine(sample, pictures[p])) for sample in samples]
    assert nearest(samples, pictures).tolist() == slow
    assert nearest(samples * 100, pictures * random.uniform(0.1, 9, (20, 1))).tolist() == slow
    assert nearest(np.zeros((1, 4)), pictures).shape == (1,)


def test_a_captions_rank_is_what_a_slow_loop_finds(random):
    samples, pictures = random.normal(size=(25, 4)), random.normal(size=(30, 4))
    names = [f"thing {i % 10}" for i in range(30)]
    wanted = [f"thing {i % 12}" for i in range(25)]  # things 10 and 11 are in no picture
    slow = []
    for sample, caption in zip(samples, wanted, strict=True):
        ranked = sorted(range(30), key=lambda p: -cosine(sample, pictures[p]))
        slow.append(next((float(place) for place, p in enumerate(ranked) if names[p] == caption), float("inf")))
    assert caption_ranks(samples, wanted, pictures, names) == slow
    assert len(set(slow)) > 5


def test_captions_match_without_case_and_articles():
    one = np.eye(2)
    assert caption_ranks(one, ["A red apple", "The Sun!"], one, ["red apple", "sun"]) == [0.0, 0.0]
    assert caption_ranks(one, ["sun", "red apple"], one, ["red apple", "sun"]) == [1.0, 1.0]


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_chance_of_a_match_is_the_share_of_all_ways_to_pick(k):
    names = ["cat", "cat", "The dog", "sun", "cat"]
    wanted = ["a cat", "dog", "moon"]
    picks = list(itertools.combinations(names, k))
    slow = [sum(any(normalised(p) == normalised(c) for p in pick) for pick in picks) / len(picks) for c in wanted]
    assert chance_of_match(wanted, names, k) == pytest.approx(sum(slow) / 3)
