"""Policy: which of the images that wait are drawn together. Knows requests and numbers of images, no tensors."""

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from serving.image.api import ImageRequest, Progress


def kind_of(request: ImageRequest) -> Hashable:
    """What requests must have in common to be drawn together."""
    return request.params, request.image is not None, request.mask is not None


@dataclass(eq=False)
class Call:
    """A request on its way."""

    request: ImageRequest
    preview_every: int = 0
    images: dict[int, np.ndarray] = field(default_factory=dict)  # by place among the request's seeds
    error: Exception | None = None
    cancelled: bool = False
    _steps: int = 0  # of all its images together
    _news: deque[Progress] = field(default_factory=deque)

    @property
    def done(self) -> bool:
        return self.error is not None or len(self.images) == len(self.request.seeds)

    def advance(self, images: int, total: int) -> int | None:
        """Books one of `total` steps of so many of the images; the step that all have come to, where that is a new one.

        Images that are drawn in later batches count as not begun.
        """
        count = len(self.request.seeds)
        before, self._steps = self._steps, self._steps + images
        return self._steps // count if self._steps // count > before // count else None

    def tell(self, progress: Progress) -> None:
        """Of what is not taken yet only the newest keeps its previews: a slow reader costs no memory."""
        if progress.previews:
            self._news = deque(replace(each, previews=()) for each in self._news)
        self._news.append(progress)

    def take(self) -> list[Progress]:
        """What was told since the last time."""
        news, self._news = self._news, deque()
        return list(news)


@dataclass(frozen=True, eq=False)
class Waiting:
    """An image that waits for its batch."""

    call: Call
    index: int  # among the request's seeds

    @property
    def seed(self) -> int:
        return self.call.request.seeds[self.index]


def pick(waiting: Sequence[Waiting], max_batch: int) -> list[Waiting]:
    """The next batch: the oldest image, and the oldest of those that are of its kind, `max_batch` at most.

    A request that does not fit in is split: its others are the oldest of their kind next time, so that filling a batch
    up makes none later.
    """
    kind = kind_of(waiting[0].call.request)
    return [w for w in waiting if kind_of(w.call.request) == kind][:max_batch]
