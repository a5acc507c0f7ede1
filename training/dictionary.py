"""What a translation model must beat: copying the source, and a dictionary that translates word for word.

The dictionary is IBM Model 1 (Brown et al. 1993, section 4.2): which target word a source word stands for, learnt from
sentence pairs by expectation maximisation, with neither order nor context.
"""

import re
from collections.abc import Sequence

import numpy as np

from training.data.pairs import Pair

ITERATIONS = 6
MAX_CELLS = 40_000_000  # pairs of words that are looked at: bounds memory to about two gigabytes
_WORD = re.compile(r"\w+|[^\w\s]")
_JOIN_LEFT = frozenset(".,;:!?)]}%…")


class Dictionary:
    """The likeliest target word of each source word; others are copied."""

    def __init__(self, entries: dict[str, str]) -> None:
        self.entries = entries

    def __call__(self, text: str) -> str:
        out = ""
        for word in words(text):
            made = self.entries.get(word, word)
            out += made if not out or made in _JOIN_LEFT else f" {made}"
        return out


def words(text: str) -> list[str]:
    """Words, and punctuation marks one by one."""
    return _WORD.findall(text)


def fit_dictionary(pairs: Sequence[Pair]) -> Dictionary:
    """Learns t(target | source) by EM from uniform, the empty source word included, and keeps each row's highest.

    Of more pairs than MAX_CELLS allows for, every n-th one teaches.
    """
    pairs = pairs[:: 1 + sum((1 + len(words(p.source))) * len(words(p.target)) for p in pairs) // MAX_CELLS]
    sources, targets = _Ids([words(p.source) for p in pairs]), _Ids([words(p.target) for p in pairs])
    cells = _Cells(sources.rows, targets.rows, null=len(sources.names))
    key, inverse = np.unique(cells.source * len(targets.names) + cells.target, return_inverse=True)
    key_source = key // len(targets.names)
    t = np.full(len(key), 1.0 / max(1, len(targets.names)))
    for _ in range(ITERATIONS):
        p = t[inverse]
        posterior = p / np.bincount(cells.position, p)[cells.position]  # which source word made this target word
        counts = np.bincount(inverse, posterior)
        t = counts / np.bincount(key_source, counts)[key_source]
    order = np.lexsort((-t, key_source))
    first = order[np.unique(key_source[order], return_index=True)[1]]
    names = [*sources.names, ""]
    entries = {names[key[i] // len(targets.names)]: targets.names[key[i] % len(targets.names)] for i in first}
    entries.pop("", None)
    return Dictionary(entries)


class _Ids:
    """Every word's number, by first appearance."""

    def __init__(self, texts: Sequence[list[str]]) -> None:
        index: dict[str, int] = {}
        self.rows = [[index.setdefault(word, len(index)) for word in text] for text in texts]
        self.names = list(index)


class _Cells:
    """All (source word, target word) of each pair: arrays [N]; `position` numbers the target words of all pairs."""

    def __init__(self, sources: Sequence[list[int]], targets: Sequence[list[int]], null: int) -> None:
        source, target, position = [], [], []
        start = 0
        for s, t in zip(sources, targets, strict=True):
            rows = np.array([null, *s])
            source.append(np.repeat(rows, len(t)))
            target.append(np.tile(np.array(t, np.int64), len(rows)))
            position.append(np.tile(np.arange(start, start + len(t)), len(rows)))
            start += len(t)
        self.source, self.target, self.position = (np.concatenate(part) for part in (source, target, position))
