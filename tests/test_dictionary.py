"""The baselines of translation: EM finds the words that belong together, against the algorithm written out slowly."""

import itertools
from collections import defaultdict

import pytest

from training.data.pairs import Pair
from training.dictionary import ITERATIONS, fit_dictionary, words

PAIRS = [("das Haus", "the house"), ("das Buch", "the book"), ("ein Buch", "a book"), ("ein Haus .", "a house .")]


def pairs(texts):
    return [Pair(source, target, source) for source, target in texts]


def slow_model_1(texts):
    """Brown et al. 1993, figure 1 of Koehn's textbook: t(target | source) with the empty source word."""
    both = [(["", *words(s)], words(t)) for s, t in texts]
    vocabulary = {t for _, target in both for t in target}
    table = defaultdict(lambda: 1 / len(vocabulary))
    for _ in range(ITERATIONS):
        counts, totals = defaultdict(float), defaultdict(float)
        for source, target in both:
            for t in target:
                norm = sum(table[s, t] for s in source)
                for s in source:
                    counts[s, t] += table[s, t] / norm
                    totals[s] += table[s, t] / norm
        table = defaultdict(float, {(s, t): c / totals[s] for (s, t), c in counts.items()})
    sources = {s for source, _ in both for s in source if s}
    return {s: max(sorted(vocabulary), key=lambda t: table[s, t]) for s in sources}


def test_the_words_that_belong_together_are_found():
    learnt = fit_dictionary(pairs(PAIRS))
    assert learnt.entries == slow_model_1(PAIRS)
    assert {"Haus": "house", "Buch": "book", "das": "the", "ein": "a"}.items() <= learnt.entries.items()


def test_against_the_slow_one_on_more():
    nouns = {"Hund": "dog", "Katze": "cat", "Maus": "mouse", "Baum": "tree"}
    colours = {"rot": "red", "blau": "blue", "alt": "old"}
    texts = [
        (f"{a} ist {b} .", f"{c} is {d} .") for (a, c), (b, d) in itertools.product(nouns.items(), colours.items())
    ]
    learnt = fit_dictionary(pairs(texts)).entries
    slow = slow_model_1(texts)
    for word in {**nouns, **colours}:
        assert learnt[word] == slow[word] == {**nouns, **colours}[word]


@pytest.mark.parametrize(
    ("text", "translated"), [("das Buch .", "the book."), ("ein Auto", "a Auto"), ("", ""), ("🙂", "🙂")]
)
def test_it_goes_word_by_word_and_copies_what_it_does_not_know(text, translated):
    assert fit_dictionary(pairs(PAIRS))(text) == translated
