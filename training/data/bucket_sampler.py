"""Which pictures make which batch: a pure function of the seed and the step, by buckets of one aspect ratio."""

from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np


class BucketSampler:
    """Batches of equal size, each of one bucket (pictures of one shape); every epoch in an order of its own.

    Every picture is learnt about as often as any other: a bucket that is too rare to fill a batch has one in some
    epochs only.
    """

    def __init__(self, buckets: Sequence[Hashable], batch_size: int, seed: int) -> None:
        """`buckets` has that of each picture."""
        members = defaultdict(list)
        for index, bucket in enumerate(buckets):
            members[bucket].append(index)
        self._members = [np.array(indices) for indices in members.values()]
        self._pictures, self._batch_size, self._seed = len(buckets), batch_size, seed
        self._epoch: tuple[int, list[np.ndarray]] = (-1, [])

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-self._pictures // self._batch_size)

    def at(self, step: int) -> np.ndarray:
        """The pictures [batch_size] of an optimiser step."""
        epoch, number = divmod(step, len(self))
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._shuffled(epoch)
        return self._epoch[1][number]

    def _shuffled(self, epoch: int) -> list[np.ndarray]:
        random = np.random.default_rng((self._seed, epoch))
        ends = np.cumsum([len(indices) for indices in self._members]) * len(self) / self._pictures
        ends[-1] = len(self)  # whatever the rounding says
        counts = np.diff(np.floor(ends + random.random()).clip(max=len(self)), prepend=0).astype(int)
        batches: list[np.ndarray] = []
        for indices, count in zip(self._members, counts, strict=True):
            wanted = count * self._batch_size
            rounds = [random.permutation(indices) for _ in range(-(-wanted // len(indices)))]
            batches += np.split(np.concatenate(rounds)[:wanted], count) if count else []
        return [batches[i] for i in random.permutation(len(batches))]


def shard(batch: np.ndarray, rank: int, workers: int, passes: int) -> list[np.ndarray]:
    """A worker's part of a batch, a row each pass: positions in the batch, so that its random numbers are its own."""
    assert len(batch) % (workers * passes) == 0
    return list(np.arange(len(batch)).reshape(passes, workers, -1)[:, rank])
