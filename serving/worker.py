"""A model's thread: what TorchEngine, Translator and Painter have in common."""

import asyncio
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Generic, Protocol, TypeVar

import torch

from serving.api import EngineClosed

logger = logging.getLogger(__name__)


class Request(Protocol):
    """What is asked for, on its way."""

    cancelled: bool


R = TypeVar("R", bound=Request)
L = TypeVar("L")


class Worker(ABC, Generic[R, L]):
    """The open requests, each with who listens for its answer, and the thread that works on them.

    `_changed` guards the open requests, and what a subclass adds to them; it is notified when there is work.
    """

    _name: str  # of the thread, and of what closes

    def __init__(self, threads: int | None) -> None:
        """`threads` are torch's in the thread, by default what torch has there."""
        self._threads = threads
        self._open: dict[R, L] = {}  # what waits or runs
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._draining = self._closed = False
        self.device_is_lost = False  # every later step would fail: nothing but another process helps

    @abstractmethod
    def _has_work(self) -> bool:
        """Called under the lock."""

    @abstractmethod
    def _work(self) -> None:
        """Works some of it off; what this raises, the requests in it end with."""

    @abstractmethod
    def _in_work(self) -> list[R]:
        """The requests that are worked on; called under the lock."""

    @abstractmethod
    def _end(self, request: R, listener: L, error: Exception) -> None:
        """Tells that a request ends with `error`; not under the lock."""

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

    def _refuse_when_draining(self) -> None:
        if self._draining:
            raise EngineClosed(f"the {self._name} takes no new requests")

    def _ensure_thread(self) -> None:
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    def _cancel(self, request: R) -> None:
        """Gives up a request; it is out of the work by the next step."""
        with self._changed:
            self._open.pop(request, None)
            request.cancelled = True
            self._changed.notify_all()

    def _fail(self, requests: Collection[R], error: Exception) -> None:
        with self._changed:
            failed = {request: self._open.pop(request) for request in set(requests) if request in self._open}
            for request in failed:
                request.cancelled = True
        for request, listener in failed.items():
            self._end(request, listener, error)

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        while self._wait_for_work():
            try:
                self._work()
            except Exception as error:
                logger.exception("the %s failed; what it was working on ends with this error", self._name)
                self.device_is_lost |= isinstance(error, torch.AcceleratorError)  # one without memory is not lost
                with self._changed:
                    failed = list(self._open) if self.device_is_lost else self._in_work()
                self._fail(failed, error)

    def _wait_for_work(self) -> bool:
        """Whether there is some; False when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._has_work())
            return not self._closed
