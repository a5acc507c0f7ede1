"""Painter: prompts in, images out, many requests at a time, by a thread of its own."""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import torch

from serving.batches import Batches
from serving.image.api import ImageRequest, PainterStats, Progress
from serving.image.batching import Call, Waiting, pick
from serving.image.components import load_components
from serving.image.sampling import Drawing, check
from serving.news import News

# A batch that is not full waits so long for company, in seconds: callers whose images came together ask again together.
_COMPANY = 0.02


class Painter(Batches[Call, Waiting]):
    """Draws by any pipeline folder of Stable Diffusion's or PixArt's family.

    Images of all requests wait in one queue, in order; those of equal params are drawn together, and one is the same
    whatever is drawn beside it, up to the rounding of float sums.
    """

    _name, _items = "painter", "images"

    def __init__(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        threads: int | None = None,
        max_batch: int = 8,
        max_waiting: int = 64,
        allow_unsafe: bool = False,
    ) -> None:
        """`dtype` is the denoiser's, by default float32 whatever the folder holds.

        `threads` are those of the thread that draws, by default what torch has there. `max_batch` bounds the images
        that are drawn together, `max_waiting` those that wait (of more than one request). `allow_unsafe` as
        load_components'. Raises ValueError where the folder cannot be served, and for sizes below one.
        """
        for name, value in {"max_batch": max_batch, "max_waiting": max_waiting}.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        super().__init__(max_waiting, threads)
        self.components = load_components(folder, dtype, device=device, allow_unsafe=allow_unsafe)
        self.defaults = self.components.defaults
        self._max_batch = max_batch
        self._images = self._steps = 0

    async def draw(self, request: ImageRequest) -> list[np.ndarray]:
        """An image [height, width, 3] uint8 per seed, in order. Cancelling it takes them out by the next step.

        Raises as `stream` does.
        """
        *_, images = [event async for event in self.stream(request)]
        assert isinstance(images, list)
        return images

    def stream(self, request: ImageRequest, preview_every: int = 0) -> AsyncIterator[Progress | list[np.ndarray]]:
        """The request's progress, with previews at every so-manieth step (0: none), and last its images.

        Closing the iterator takes its images out of their batch by the next step. Raises ValueError where the model
        cannot draw the request, QueueFull where more images would wait than may, EngineClosed after drain().
        """
        if preview_every < 0:
            raise ValueError(f"preview_every={preview_every} must be 0 (no previews) or more")
        check(self.components, request)
        return self._stream(Call(request, preview_every))

    def stats(self) -> PainterStats:
        with self._changed:
            running = {w.call for w in self._running}
            return PainterStats(
                num_requests_running=len(running),
                num_requests_waiting=len({w.call for w in self._waiting} - running),
                images=self._images,
                steps=self._steps,
            )

    async def _stream(self, call: Call) -> AsyncIterator[Progress | list[np.ndarray]]:
        news = News()
        try:
            self._submit(call, [Waiting(call, i) for i in range(len(call.request.seeds))], news.tell)
            done = False
            while not done:
                await news.wait()
                with self._changed:
                    progresses, done = call.take(), call.done
                for progress in progresses:
                    yield progress
            if call.error is not None:
                raise call.error
            yield [call.images[i] for i in range(len(call.request.seeds))]
        finally:
            self._cancel(call)

    def _pick(self) -> list[Waiting]:
        return pick(self._waiting, self._max_batch)

    def _wait_for_company(self) -> None:
        self._changed.wait_for(lambda: self._closed or len(self._waiting) >= self._max_batch, _COMPANY)

    def _work_off(self, batch: list[Waiting]) -> None:
        """Draws a batch to its end, or until nobody waits for it any more."""
        drawing = Drawing(self.components, [(w.call.request, w.seed) for w in batch])
        while drawing.step < drawing.total:
            if not (batch := self._without_cancelled(drawing, batch)):
                return
            drawing.advance()
            self._report(drawing, _rows(batch))
        for call, rows in _rows(batch).items():
            if not call.cancelled:
                self._deliver(call, [batch[row].index for row in rows], drawing.images(rows))

    def _without_cancelled(self, drawing: Drawing, batch: list[Waiting]) -> list[Waiting]:
        with self._changed:
            kept = [row for row, w in enumerate(batch) if not (self._closed or w.call.cancelled)]
            batch, before = [batch[row] for row in kept], len(batch)
            self._running = batch
        if batch and len(batch) < before:
            drawing.keep(kept)
        return batch

    def _report(self, drawing: Drawing, rows: dict[Call, list[int]]) -> None:
        """Tells every call how far its images are."""
        with self._changed:
            self._steps += 1
            steps = {call: call.advance(len(of_call), drawing.total) for call, of_call in rows.items()}
        for call, step in steps.items():
            if step is not None:
                wanted = call.preview_every and step % call.preview_every == 0
                previews = tuple(drawing.previews(rows[call])) if wanted else ()
                with self._changed:
                    call.tell(Progress(step, drawing.total, previews))
                self._tell(call)

    def _deliver(self, call: Call, places: Sequence[int], images: Sequence[np.ndarray]) -> None:
        with self._changed:
            call.images |= dict(zip(places, images, strict=True))
            self._images += len(images)
            self._running = [w for w in self._running if w.call is not call]
        self._tell(call)


def _rows(batch: Sequence[Waiting]) -> dict[Call, list[int]]:
    """Where each call's images are in a batch."""
    rows: dict[Call, list[int]] = {}
    for row, waiting in enumerate(batch):
        rows.setdefault(waiting.call, []).append(row)
    return rows
