"""Policy: which of the sentences that wait are decoded together. Knows numbers of tokens, no tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from serving.translation.api import TranslationParams
from serving.translation.search import Output

# A sentence counts as at least so many tokens: it makes some, however short it is.
SHORTEST = 16


@dataclass(eq=False)
class Call:
    """What one request asked for, each different sentence once."""

    sources: dict[str, list[int]]  # tokens by sentence
    params: TranslationParams
    outputs: dict[str, list[tuple[str, Output]]] = field(default_factory=dict)  # text and output of each hypothesis
    error: Exception | None = None
    cancelled: bool = False

    @property
    def done(self) -> bool:
        return self.error is not None or len(self.outputs) == len(self.sources)


@dataclass(frozen=True, eq=False)
class Waiting:
    """A sentence that waits for its batch."""

    sentence: str
    call: Call

    @property
    def source(self) -> list[int]:
        return self.call.sources[self.sentence]


def pick(waiting: Sequence[Waiting], max_batch_tokens: int) -> list[Waiting]:
    """The next batch: the oldest sentence, and those of equal params that are nearest to it in length.

    As many as fit: longest source · sentences · beams is at most `max_batch_tokens`, or the oldest is alone. Since the
    oldest is always in it, none waits for more batches than there were sentences before it.
    """
    oldest, *others = waiting
    params = oldest.call.params
    others = [w for w in others if w.call.params == params]
    others.sort(key=lambda w: abs(len(w.source) - len(oldest.source)))
    batch, longest = [oldest], max(SHORTEST, len(oldest.source))
    for candidate in others:
        longest = max(longest, len(candidate.source))
        if longest * (len(batch) + 1) * params.num_beams > max_batch_tokens:
            break
        batch.append(candidate)
    return batch
