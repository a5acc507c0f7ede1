"""Sentence pairs to translate: two columns of a TSV, twin files, catalogues, or `{"translation": {"de": …, "en": …}}`.

Also `{"source": …, "target": …}` and `{"de": …, "en": …}`, one JSON object a line. `id` works as in chats: records with
the same id fall on the same side of the split; without one, those with the same source text do.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from serving.translation.scripts import script_of
from training.data.records import DataError, Fields, plain
from training.data.sources import read, record_key
from training.data.split import normalised, split, unseen

# A side that is longer than so many times the other says something else: in characters, SLACK added to each, and the
# corpus's own ratio taken out (German has three times the characters of Chinese).
MAX_RATIO = 3.0
SLACK = 15
VAL_PAIRS = 256  # of the held-out ones, for the validations along the way; the rest is the test set


@dataclass(frozen=True)
class Pair:
    """A text and its translation, Unicode NFC, white space as single spaces."""

    source: str
    target: str
    key: str
    origin: str = ""  # the recipe's source string that it comes from

    @property
    def identity(self) -> str:
        return self.source


@dataclass(frozen=True)
class Sides:
    """The pairs of a recipe: what teaches, what stops the training, what measures it."""

    training: list[Pair]
    validation: list[Pair]
    test: list[Pair]
    dropped: dict[str, int]  # reason → how many pairs cleaning took out
    source_script: str  # what the source side is written in, as Unicode names it: LATIN, CYRILLIC, ...


def read_pairs(sources: Sequence[str], source_language: str, target_language: str) -> list[Pair]:
    """Every record, uncleaned. Raises DataError pointing to the first that is wrong."""
    parse = partial(_parse, languages=(source_language, target_language))
    return [replace(pair, origin=name) for name in sources for pair in read([name], lambda fields: [parse(fields)])]


def read_sides(
    sources: Sequence[str], source_language: str, target_language: str, seed: int, val_fraction: float
) -> Sides:
    """Reads, cleans and splits. A held-out pair shares neither its source nor its target with a training pair.

    Raises DataError where nothing is left to learn from, or to measure on.
    """
    pairs, dropped, script = clean(read_pairs(sources, source_language, target_language))
    training, held_out = split(pairs, seed, val_fraction)
    apart = unseen(held_out, training, by=lambda pair: pair.target)
    dropped["in training too"] = len(pairs) - len(training) - len(apart)
    if not training or len(apart) < 2:
        raise DataError(
            f"translation.pairs: {len(training)} to learn from and {len(apart)} held out are too few; give more, or "
            f"another val_fraction than {val_fraction} (left out: {counted(dropped) or 'none'})"
        )
    random.Random(seed).shuffle(apart)
    count = min(VAL_PAIRS, len(apart) // 2)
    return Sides(training, apart[:count], apart[count:], dropped, script)


def counted(dropped: dict[str, int]) -> str:
    """`dropped` of `Sides` in words; empty where nothing was."""
    return ", ".join(f"{count} {why}" for why, count in dropped.items() if count)


# ---- cleaning


def clean(pairs: Iterable[Pair]) -> tuple[list[Pair], dict[str, int], str]:
    """Pairs that can teach, how many had to go for which reason, and the script of the sources."""
    pairs = list(pairs)
    scripts = tuple(_commonest(side) for side in ([p.source for p in pairs], [p.target for p in pairs]))
    ratio = sum(len(p.target) for p in pairs) / max(1, sum(len(p.source) for p in pairs))
    counts: Counter[str] = Counter(dict.fromkeys(("empty", "identical", "length ratio", "wrong script", "repeated"), 0))
    seen: set[tuple[str, str]] = set()
    kept = []
    for pair in pairs:
        why = _fault(pair, scripts, ratio) or ("repeated" if (pair.source, pair.target) in seen else "")
        if why:
            counts[why] += 1
            continue
        seen.add((pair.source, pair.target))
        kept.append(pair)
    return kept, dict(counts), scripts[0]


def _fault(pair: Pair, scripts: tuple[str, ...], ratio: float) -> str:
    """Why a pair cannot teach; empty where it can. `ratio`: the corpus's target over its source characters."""
    if not pair.source or not pair.target:
        return "empty"
    if pair.source == pair.target:
        return "identical"
    shorter, longer = sorted((ratio * len(pair.source) + SLACK, len(pair.target) + SLACK))
    if longer > MAX_RATIO * shorter:
        return "length ratio"
    if any(
        main_script(text) not in (wanted, "") for text, wanted in zip((pair.source, pair.target), scripts, strict=True)
    ):
        return "wrong script"
    return ""


def main_script(text: str) -> str:
    """What most of a text's letters are written in; empty where it has no letter."""
    counts: Counter[str] = Counter()
    for character, count in Counter(text).items():
        if script := script_of(character):
            counts[script] += count
    return counts.most_common(1)[0][0] if counts else ""


def _commonest(texts: Iterable[str]) -> str:
    counts = Counter(filter(None, map(main_script, texts)))
    return counts.most_common(1)[0][0] if counts else ""


# ---- reading


def _parse(fields: Fields, languages: tuple[str, str]) -> Pair:
    source, target = (
        _text(side, name) for side, name in zip(_both(fields, languages), ("source", "target"), strict=True)
    )
    return Pair(source, target, record_key(fields, normalised(source)))


def _both(fields: Fields, languages: tuple[str, str]) -> tuple[Any, Any]:
    """The two sides as the record has them."""
    if "columns" in fields:
        columns = fields["columns"]
        if len(columns) != 2:
            raise ValueError(f"has {len(columns)} columns; a line is SOURCE, a tab, TARGET")
        return columns[0], columns[1]
    if "source" in fields and "target" in fields:
        return fields["source"], fields["target"]
    by_language = fields.get("translation", fields)
    if not isinstance(by_language, dict):
        raise ValueError(f"translation: must be an object with a text for each language, not {by_language!r}")
    source, target = (_key(by_language, language) for language in languages)
    return by_language[source], by_language[target]


def _key(by_language: Fields, language: str) -> str:
    """The key of a language, or of a narrower or wider one: de_DE for de, as catalogues have it."""
    if language in by_language:
        return language
    near = [key for key in by_language if re.split("[-_]", key)[0].lower() == re.split("[-_]", language)[0].lower()]
    if len(near) != 1:
        raise ValueError(f"translation.{language}: is missing; there are {', '.join(by_language) or 'none'}")
    return near[0]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: must be a text, not {value!r}")
    return plain(value)
