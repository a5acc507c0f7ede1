"""Sentence pairs as tokens: written once, memory-mapped by every worker, handed out in batches of like length."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from training.data.pairs import Pair
from training.data.records import DataError
from training.device import tokenizing_on_all_cores
from training.run import folder_atomic

CHUNK = 20_000  # pairs that are tokenised at once


@dataclass(frozen=True)
class Example:
    """The tokens of one pair, each side with its eos."""

    source: np.ndarray
    target: np.ndarray


class Encoder(Protocol):
    """What makes tokens of the two sides."""

    def encode(self, sentences: Sequence[str]) -> list[list[int]]: ...

    def encode_targets(self, sentences: Sequence[str]) -> list[list[int]]: ...


def write_examples(pairs: Sequence[Pair], encoder: Encoder, max_length: int, folder: Path) -> None:
    """Pairs as tokens, without those of which a side is longer than `max_length`; whole or not at all.

    Raises DataError where none is left.
    """
    sources: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    for first in range(0, len(pairs), CHUNK):
        chunk = pairs[first : first + CHUNK]
        with tokenizing_on_all_cores():
            tokens = encoder.encode([pair.source for pair in chunk])
            made = encoder.encode_targets([pair.target for pair in chunk])
        for source, target in zip(tokens, made, strict=True):
            if max(len(source), len(target)) <= max_length:
                sources.append(np.array(source, np.int32))
                targets.append(np.array(target, np.int32))
    if not sources:
        raise DataError(f"translation.max_length={max_length}: none of {len(pairs)} pairs fits; raise it")
    with folder_atomic(folder) as temporary:
        for name, rows in (("source", sources), ("target", targets)):
            np.save(temporary / f"{name}.npy", np.concatenate(rows))
            np.save(temporary / f"{name}_lengths.npy", np.array([len(row) for row in rows], np.int32))


class Examples:
    """What `write_examples` has written, read as it is needed."""

    def __init__(self, folder: Path) -> None:
        self._tokens = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("source", "target")]
        self.source_lengths, self.target_lengths = (np.load(folder / f"{n}_lengths.npy") for n in ("source", "target"))
        self._ends = [np.cumsum(lengths) for lengths in (self.source_lengths, self.target_lengths)]

    def __len__(self) -> int:
        return len(self.source_lengths)

    def __getitem__(self, index: int) -> Example:
        both = zip(self._tokens, self._ends, (self.source_lengths, self.target_lengths), strict=True)
        return Example(*(tokens[ends[index] - lengths[index] : ends[index]] for tokens, ends, lengths in both))


class Batches:
    """Examples in batches of like length; every epoch has the same number of them, in an order of its own."""

    def __init__(self, examples: Examples, batch_tokens: int, seed: int) -> None:
        self.examples, self._seed = examples, seed
        order = np.lexsort((examples.source_lengths, examples.target_lengths))
        self._ends = np.cumsum(_cut(examples.target_lengths[order], examples.source_lengths[order], batch_tokens))
        self._epoch: tuple[int, list[np.ndarray]] = (-1, [])

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._ends)

    def at(self, step: int) -> list[Example]:
        """The batch of an optimiser step: a pure function of the step and the seed."""
        epoch, index = divmod(step, len(self))
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._shuffled(epoch)
        return [self.examples[i] for i in self._epoch[1][index].tolist()]

    def _shuffled(self, epoch: int) -> list[np.ndarray]:
        """Sorted by length anew, those of equal lengths in random order, cut at the same places, then shuffled."""
        random = np.random.default_rng((self._seed, epoch))
        chance = random.random(len(self.examples))
        order = np.lexsort((chance, self.examples.source_lengths, self.examples.target_lengths))
        batches = np.split(order, self._ends[:-1])
        return [batches[i] for i in random.permutation(len(batches))]


def _cut(targets: np.ndarray, sources: np.ndarray, batch_tokens: int) -> list[int]:
    """How many of the sorted examples go into each batch of at most examples × (longest target + longest source)."""
    sizes, count, longest_target, longest_source = [], 0, 0, 0
    for target, source in zip(targets.tolist(), sources.tolist(), strict=True):
        longest_target, longest_source = max(longest_target, target), max(longest_source, source)
        if count and (count + 1) * (longest_target + longest_source) > batch_tokens:
            sizes.append(count)
            count, longest_target, longest_source = 0, target, source
        count += 1
    return [*sizes, count]
