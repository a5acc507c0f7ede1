"""Requests by the batch: what Translator and Painter have in common, each with a thread of its own.

A request is a call of several items, sentences or images. They wait in one queue, in order; the thread picks some that
fit together, works them off, and tells the calls of what has come.
"""

import asyncio
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import torch

from serving.engine.api import EngineClosed, QueueFull

logger = logging.getLogger(__name__)


class Call(Protocol):
    """A request on its way."""

    error: Exception | None
    cancelled: bool


class Item(Protocol):
    """What waits for its batch."""

    @property
    def call(self) -> Call: ...


C = TypeVar("C", bound=Call)
I = TypeVar("I", bound=Item)  # noqa: E741


class Batches(ABC, Generic[C, I]):
    """The queue and its thread. A subclass picks batches and works them off.

    `_changed` guards the items that wait and run, the open calls, and what a subclass adds to them.
    """

    _name: str  # of the thread, and of what closes
    _items: str  # in the plural

    def __init__(self, max_waiting: int, threads: int | None) -> None:
        """`threads` are torch's in the thread, by default what torch has there."""
        self._max_waiting, self._threads = max_waiting, threads
        self._waiting: list[I] = []  # oldest first
        self._running: list[I] = []
        self._open: dict[C, Callable[[], None]] = {}  # how to tell each call that something came
        self._changed = threading.Condition()  # notified when there is work
        self._thread: threading.Thread | None = None
        self._draining = self._closed = False
        self.device_is_lost = False  # every later step would fail: nothing but another process helps

    @abstractmethod
    def _pick(self) -> list[I]:
        """The next batch out of what waits, which is something; called under the lock."""

    @abstractmethod
    def _work(self, batch: list[I]) -> None:
        """Works a batch off; what this raises, its calls end with."""

    def _wait_for_company(self) -> None:
        """Called under the lock where something waits: may leave it for a moment, for more to come."""

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
        self._fail(list(self._open), EngineClosed(f"the {self._name} was closed"))

    def _submit(self, call: C, new: Sequence[I], tell: Callable[[], None], bounded: bool = True) -> None:
        with self._changed:
            if self._draining:
                raise EngineClosed(f"the {self._name} takes no new requests")
            # One that alone has more than may wait could never be taken: it is, when nothing waits.
            if bounded and new and self._waiting and len(self._waiting) + len(new) > self._max_waiting:
                waiting = f"{len(self._waiting)} {self._items} wait already and {len(new)} are new"
                raise QueueFull(f"{waiting} (max_waiting={self._max_waiting})")
            self._waiting += new
            self._open[call] = tell
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _cancel(self, call: C) -> None:
        """Gives up a call that has not ended."""
        with self._changed:
            self._open.pop(call, None)
            call.cancelled = True
            self._waiting = [item for item in self._waiting if item.call is not call]

    def _tell(self, *calls: C) -> None:
        """That something came; not under the lock."""
        with self._changed:
            told = [self._open[call] for call in calls if call in self._open]
        for tell in told:
            tell()

    def _fail(self, calls: Sequence[C], error: Exception) -> None:
        with self._changed:
            failed = {call: self._open.pop(call) for call in set(calls) if call in self._open}
            self._waiting = [item for item in self._waiting if item.call not in failed]
            for call in failed:
                call.error, call.cancelled = error, True
        for tell in failed.values():
            tell()

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        while batch := self._next():
            try:
                self._work(batch)
            except Exception as error:
                logger.exception("a batch failed; its requests end with this error")
                self.device_is_lost |= isinstance(error, torch.AcceleratorError)  # one without memory is not lost
                self._fail([item.call for item in batch], error)  # type: ignore[misc]  # an item's call is a C
            with self._changed:
                self._running = []

    def _next(self) -> list[I]:
        """Moves the next batch from the waiting to the running, once there is one; empty when closed."""
        with self._changed:
            while not self._closed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                self._wait_for_company()
                if self._waiting and not self._closed:
                    batch = self._pick()
                    picked = set(batch)
                    self._waiting = [item for item in self._waiting if item not in picked]
                    self._running = list(batch)
                    return batch
        return []
