"""Text to sentences and back: nothing that is not translated may change."""

import random

import pytest

from serving.translation.segments import Segments, one_line, split

CHARACTERS = [
    *"ab Z.!?,;:。\t\n\r\v\f\x1c\x1f\x85\xa0\u2028\u2029\u200b\u200d\u3000\ufeff\ufe0f\u20e3",
    *"1#*\"'()«»„“…-–—|äßا中שאκж😀👍🏽❤✓©\x00",
    "  ", "\r\n", "\n\n", "z. B. ", "Dr. ", "👨‍👩‍👧", "🇩🇪", "1️⃣", "e\u0301", "http://a.b/c?d ",
]  # fmt: skip
LANGUAGES = ["de", "en-GB", "zh-Hans", "ar", "deu_Latn", "xx", ""]


def nasty(count: int) -> list[str]:
    draw = random.Random(7)
    return ["".join(draw.choices(CHARACTERS, k=draw.randint(0, 40))) for _ in range(count)]


@pytest.mark.parametrize("script", [None, "LATIN", "ARABIC"])
def test_the_identity_gives_the_text_back(script: str | None) -> None:
    for number, text in enumerate(nasty(4000)):
        whole = split(text, LANGUAGES[number % len(LANGUAGES)], script)
        assert whole.join(whole.sentences) == text
        assert all(any(letter.isalpha() for letter in sentence) for sentence in whole.sentences)
        assert all(sentence == one_line(sentence) for sentence in whole.sentences)
        assert "".join(whole.piece(i, s) for i, s in enumerate(whole.sentences)) in (text, "")


def test_cut_sentences_fit_and_give_the_text_back() -> None:
    for text in [*nasty(1000), "x" * 10_000, "word " * 2_000]:
        parts = split(text, "de").cut(lambda sentence: len(sentence) <= 7)
        assert parts.join(parts.sentences) == text
        assert all(1 <= len(sentence) <= 7 for sentence in parts.sentences)


def test_a_cut_is_at_white_space_where_there_is_some() -> None:
    text = "one two three four five six seven"
    parts = split(text, "en").cut(lambda sentence: len(sentence) <= 14)
    assert [word for sentence in parts.sentences for word in sentence.split()] == text.split()
    assert len(parts.sentences) < 6


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", []),
        (" \t\n ", []),
        ("Hallo Welt. Wie geht es?", ["Hallo Welt.", "Wie geht es?"]),
        ("Dr. Maier kam z. B. um 10 Uhr. Gut.", ["Dr. Maier kam z. B. um 10 Uhr.", "Gut."]),
        ("eins\tzwei   drei\r\n    vier\n\n", ["eins", "zwei", "drei", "vier"]),
        ("12.5 % … ?!", []),
        ("😀 Hallo 👍🏽👍🏽 Welt 👨‍👩‍👧", ["Hallo", "Welt"]),
        ("Ich ❤️ dich 1️⃣", ["Ich", "dich"]),
        ("Drei 🇩🇪🇫🇷", ["Drei"]),
        ("مرحبا بالعالم. Guten Tag, שלום. 你好。", ["Guten Tag, שלום."]),
    ],
)
def test_only_sentences_are_translated(text: str, sentences: list[str]) -> None:
    assert list(split(text, "de", "LATIN").sentences) == sentences


def test_lines_stay_lines() -> None:
    endings = ["\n", "\r\n", "\n\n", "\u2028", "\x85", "\n   \n", "\v"]
    text = "".join(f"{'  ' * (n % 3)}Zeile {n}. Noch ein Satz.{endings[n % 7]}" for n in range(200))
    whole = split(text, "de", "LATIN")
    translated = whole.join([f"line\n{sentence.upper()}\r\n" for sentence in whole.sentences])
    assert len(whole.sentences) == 400
    assert translated.splitlines(keepends=True) == [
        line.replace("Zeile", "line ZEILE").replace("Noch ein Satz", "line NOCH EIN SATZ")
        for line in text.splitlines(keepends=True)
    ]


@pytest.mark.timeout(60)  # a pattern that backtracks would take hours
@pytest.mark.parametrize("part", ["x", " ", "\n", "a. ", "😀 ", "ا", "(", '"', "\u200d", "1\ufe0f", "❤ \u200d"])
def test_long_texts_are_split_with_few_looks_at_each_part(part: str) -> None:
    looks = 0

    def fits(sentence: str) -> bool:
        nonlocal looks
        looks += 1
        return len(sentence) <= 100

    text = part * (10_000 // len(part))
    segments = split(text, "de", "LATIN").cut(fits)
    assert segments.join(segments.sentences) == text
    assert looks <= 4 * len(segments.sentences)


def test_a_text_without_sentences_is_itself() -> None:
    assert split("\n", "en") == Segments((), ("\n",))
    assert split("\n", "en").join([]) == "\n"
