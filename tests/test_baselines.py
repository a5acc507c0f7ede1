"""The rankers that a reward model must beat: they find what a bag of words can know, and nothing else."""

import itertools
import math
import random

import pytest

from training.baselines import MAX_WORDS, fit_bag_of_words, longer_wins, words
from training.data.rankings import Ranking
from training.measure import pairs_right, ranker_scores


def ranking(completions: list[str], ranks: list[int]) -> Ranking:
    return Ranking([{"role": "user", "content": "Hello!"}], completions, ranks, "key")


def planted(number: int, seed: int) -> list[Ranking]:
    """Completions of random words; the more often one says "good", and the less often "bad", the better."""
    draws = random.Random(seed)
    out = []
    for _ in range(number):
        texts = [" ".join(draws.choices(["good", "bad", *"abcdefgh"], k=draws.randint(3, 9))) for _ in range(4)]
        merit = [text.split().count("good") - text.split().count("bad") for text in texts]
        order = sorted(set(merit), reverse=True)
        out.append(ranking(texts, [order.index(m) + 1 for m in merit]))
    return [r for r in out if len(set(r.ranks)) > 1]


def pairs(ranking: Ranking) -> list[tuple[str, str]]:
    """(better, worse) of every two completions of different rank."""
    ranked = list(zip(ranking.ranks, ranking.completions, strict=True))
    return [(better, worse) for high, better in ranked for low, worse in ranked if high < low]


def accuracy(ranker, rankings) -> float:  # type: ignore[no-untyped-def]
    right, total = pairs_right(ranker_scores(ranker, rankings), rankings)
    return sum(right) / sum(total)


def test_a_bag_of_words_finds_the_words_that_decide() -> None:
    learnt = fit_bag_of_words(planted(200, seed=1))
    assert accuracy(learnt, planted(200, seed=2)) > 0.97
    assert max(learnt.weights, key=learnt.weights.__getitem__) == "good"
    assert min(learnt.weights, key=learnt.weights.__getitem__) == "bad"
    assert accuracy(longer_wins, planted(200, seed=2)) == pytest.approx(0.5, abs=0.1)


def test_order_is_beyond_a_bag_of_words() -> None:
    rankings = [ranking([f"yes {x} no", f"no {x} yes"], [1, 2]) for x in "abcdefgh"]
    assert accuracy(fit_bag_of_words(rankings), rankings) == 0.5


def test_the_weights_are_where_the_gradient_vanishes() -> None:
    """At the minimum of Σ −log σ(w·d) + ½|w|², every weight is Σ σ(−w·d) · d, with d the difference of counts."""
    rankings = planted(30, seed=3)
    learnt = fit_bag_of_words(rankings)
    expected = dict.fromkeys(learnt.weights, 0.0)
    for better, worse in itertools.chain.from_iterable(map(pairs, rankings)):
        push = 1 / (1 + math.exp(learnt(better) - learnt(worse)))
        for word in expected:
            expected[word] += push * (words(better).count(word) - words(worse).count(word))
    assert learnt.weights == pytest.approx(expected, abs=1e-4)


def test_words_it_never_saw_and_empty_texts_score_nothing() -> None:
    learnt = fit_bag_of_words([ranking(["good", "", "bad"], [1, 2, 3])])
    assert learnt("unheard of") == learnt("") == 0.0
    assert learnt("good") > 0 > learnt("bad")
    assert len(learnt.weights) == 2 <= MAX_WORDS


def test_words_are_case_blind_and_marks_count() -> None:
    assert words("Don't SHOUT!!") == ["don't", "shout", "!", "!"]
