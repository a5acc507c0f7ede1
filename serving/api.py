"""What everything that answers has in common: how an answer ends, and how a request is turned away."""

from typing import Literal

FinishReason = Literal["stop", "length"]


class QueueFull(RuntimeError):
    """The waiting queue is at its bound; the caller should come back later."""


class EngineClosed(RuntimeError):
    """The engine, translator or painter drains or is closed, and takes no new requests."""
