"""Painter: prompts in, images out, many requests at a time, by a thread of its own."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from serving.engine.api import EngineClosed, QueueFull
from serving.image.api import ImageRequest, PainterStats, Progress
from serving.image.batching import Call, Waiting, pick
from serving.image.components import load_components
from serving.image.sampling import Drawing, check
from serving.news import News

logger = logging.getLogger(__name__)

# A batch that is not full waits so long for company, in seconds: callers whose images came together ask again together.
_COMPANY = 0.02


class Painter:
    """Draws by any pipeline folder of Stable Diffusion's or PixArt's family.

    Images of all requests wait in one queue, in order; those of equal params are drawn together, and one is the same
    whatever is drawn beside it, up to the rounding of float sums.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        threads: int | None = None,
        max_batch: int = 8,
        max_waiting: int = 64,
    ) -> None:
        """`dtype` is the denoiser's, by default float32 whatever the folder holds.

        `threads` are those of the thread that draws, by default what torch has there. `max_batch` bounds the images
        that are drawn together, `max_waiting` those that wait (of more than one request). Raises ValueError where the
        folder cannot be served, and for sizes below one.
        """
        for name, value in {"max_batch": max_batch, "max_waiting": max_waiting}.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.components = load_components(folder, dtype, device=device)
        self.defaults = self.components.defaults
        self._threads, self._max_batch, self._max_waiting = threads, max_batch, max_waiting
        self._waiting: list[Waiting] = []  # oldest first
        self._running: list[Waiting] = []
        self._open: dict[Call, Callable[[], None]] = {}  # how to tell each call that something came
        self._images = self._steps = 0
        self._changed = threading.Condition()  # guards everything above; notified when there is work
        self._thread: threading.Thread | None = None
        self._draining = self._closed = False

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

    async def drain(self) -> None:
        """Takes no new requests and returns when those that are open have ended."""
        self._draining = True
        while self._open:
            await asyncio.sleep(0.01)

    def close(self) -> None:
        """Ends every request with EngineClosed, and the thread."""
        with self._changed:
            self._draining = self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._fail(list(self._open), EngineClosed("the painter was closed"))

    async def _stream(self, call: Call) -> AsyncIterator[Progress | list[np.ndarray]]:
        news = News()
        try:
            self._submit(call, news.tell)
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

    def _submit(self, call: Call, tell: Callable[[], None]) -> None:
        new = [Waiting(call, i) for i in range(len(call.request.seeds))]
        with self._changed:
            if self._draining:
                raise EngineClosed("the painter takes no new requests")
            # One that alone has more than may wait could never be taken: it is, when nothing waits.
            if self._waiting and len(self._waiting) + len(new) > self._max_waiting:
                waiting = f"{len(self._waiting)} images wait already and {len(new)} are new"
                raise QueueFull(f"{waiting} (max_waiting={self._max_waiting})")
            self._waiting += new
            self._open[call] = tell
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="painter", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _cancel(self, call: Call) -> None:
        """Gives up a call that has not ended."""
        with self._changed:
            self._open.pop(call, None)
            call.cancelled = True
            self._waiting = [w for w in self._waiting if w.call is not call]

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        while batch := self._start():
            try:
                self._paint(batch)
            except Exception as error:
                logger.exception("a batch failed; its requests end with this error")
                self._fail([w.call for w in batch], error)
            with self._changed:
                self._running = []

    def _start(self) -> list[Waiting]:
        """Moves the next batch from the waiting to the running, once there is one; empty when closed."""
        with self._changed:
            while not self._closed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                self._changed.wait_for(lambda: self._closed or len(self._waiting) >= self._max_batch, _COMPANY)
                if self._waiting and not self._closed:
                    self._running = pick(self._waiting, self._max_batch)
                    picked = set(self._running)
                    self._waiting = [w for w in self._waiting if w not in picked]
                    return self._running
        return []

    def _paint(self, batch: list[Waiting]) -> None:
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
                self._tell(call, Progress(step, drawing.total, previews))

    def _tell(self, call: Call, progress: Progress) -> None:
        with self._changed:
            call.tell(progress)
            tell = self._open.get(call)
        if tell is not None:
            tell()

    def _deliver(self, call: Call, places: Sequence[int], images: Sequence[np.ndarray]) -> None:
        with self._changed:
            call.images |= dict(zip(places, images, strict=True))
            self._images += len(images)
            self._running = [w for w in self._running if w.call is not call]
            tell = self._open.get(call)
        if tell is not None:
            tell()

    def _fail(self, calls: Sequence[Call], error: Exception) -> None:
        with self._changed:
            failed = {call: self._open.pop(call) for call in set(calls) if call in self._open}
            self._waiting = [w for w in self._waiting if w.call not in failed]
            for call in failed:
                call.error, call.cancelled = error, True
        for tell in failed.values():
            tell()


def _rows(batch: Sequence[Waiting]) -> dict[Call, list[int]]:
    """Where each call's images are in a batch."""
    rows: dict[Call, list[int]] = {}
    for row, waiting in enumerate(batch):
        rows.setdefault(waiting.call, []).append(row)
    return rows
