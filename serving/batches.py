"""Requests by the batch: what Translator and Painter have in common.

A request is a call of several items, sentences or images. They wait in one queue, in order; the thread picks some that
fit together, works them off, and tells the calls of what has come.
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Generic, Protocol, TypeVar

from serving import worker
from serving.api import QueueFull


class Call(worker.Request, Protocol):
    """A request on its way."""

    error: Exception | None


class Item(Protocol):
    """What waits for its batch."""

    @property
    def call(self) -> Call: ...


C = TypeVar("C", bound=Call)
I = TypeVar("I", bound=Item)  # noqa: E741


class Batches(worker.Worker[C, Callable[[], None]], Generic[C, I]):
    """The queue. A subclass picks batches and works them off.

    `_changed` guards the items that wait and run, too. Who listens for a call's answer is told that something came.
    """

    _items: str  # in the plural

    def __init__(self, max_waiting: int, threads: int | None) -> None:
        super().__init__(threads)
        self._max_waiting = max_waiting
        self._waiting: list[I] = []  # oldest first
        self._running: list[I] = []

    @abstractmethod
    def _pick(self) -> list[I]:
        """The next batch out of what waits, which is something; called under the lock."""

    @abstractmethod
    def _work_off(self, batch: list[I]) -> None:
        """Works a batch off; takes out of `_running` what is done."""

    def _wait_for_company(self) -> None:
        """Called under the lock where something waits: may leave it for a moment, for more to come."""

    def _submit(self, call: C, new: Sequence[I], tell: Callable[[], None], bounded: bool = True) -> None:
        with self._changed:
            self._refuse_when_draining()
            # One that alone has more than may wait could never be taken: it is, when nothing waits.
            if bounded and new and self._waiting and len(self._waiting) + len(new) > self._max_waiting:
                waiting = f"{len(self._waiting)} {self._items} wait already and {len(new)} are new"
                raise QueueFull(f"{waiting} (max_waiting={self._max_waiting})")
            self._waiting += new
            self._open[call] = tell
            self._ensure_thread()
            self._changed.notify_all()

    def _tell(self, *calls: C) -> None:
        """That something came; not under the lock."""
        with self._changed:
            told = [self._open[call] for call in calls if call in self._open]
        for tell in told:
            tell()

    def _cancel(self, request: C) -> None:
        with self._changed:
            super()._cancel(request)
            self._waiting = [item for item in self._waiting if item.call is not request]

    def _fail(self, requests: Collection[C], error: Exception) -> None:
        super()._fail(requests, error)
        with self._changed:
            self._waiting = [item for item in self._waiting if not item.call.cancelled]
            self._running = [item for item in self._running if not item.call.cancelled]

    def _end(self, request: C, listener: Callable[[], None], error: Exception) -> None:
        request.error = error
        listener()

    def _has_work(self) -> bool:
        return bool(self._waiting)

    def _in_work(self) -> list[C]:
        return [item.call for item in self._running]  # type: ignore[misc]  # an item's call is a C

    def _work(self) -> None:
        with self._changed:
            self._wait_for_company()
            if self._closed or not self._waiting:
                return
            batch = self._pick()
            picked = set(batch)
            self._waiting = [item for item in self._waiting if item not in picked]
            self._running = list(batch)
        self._work_off(batch)
        with self._changed:
            self._running = []
