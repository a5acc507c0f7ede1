"""Coalescing: fewer messages, the same answer, and closing it closes the engine's stream."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from services.stream import MESSAGES_PER_SECOND, coalesced
from serving.engine.api import Chunk, joined

CHUNKS = [Chunk(f"{i} ", (i,), 1, finish_reason="length" if i == 99 else None) for i in range(100)]


class Source:
    """Chunks as an engine gives them, all ready at once, or stuck after the first."""

    def __init__(self, *, stuck: bool = False, error: Exception | None = None) -> None:
        self.closed = False
        self._stuck, self._error = stuck, error

    async def chunks(self) -> AsyncIterator[Chunk]:
        try:
            for chunk in CHUNKS:
                yield chunk
                if self._stuck:
                    await asyncio.Event().wait()
                if self._error:
                    raise self._error
        finally:
            self.closed = True


async def test_what_is_ready_together_travels_together() -> None:
    source = Source()
    sent = [chunk async for chunk in coalesced(source.chunks(), lambda: MESSAGES_PER_SECOND // 100)]
    assert joined(sent) == joined(CHUNKS)
    assert len(sent) < 10 and source.closed


async def test_the_first_chunk_does_not_wait() -> None:
    """With so many streams that the next message would be due in a day."""
    stream = coalesced(Source(stuck=True).chunks(), lambda: 86_400 * MESSAGES_PER_SECOND)
    assert await anext(stream) == CHUNKS[0]
    await stream.aclose()  # type: ignore[attr-defined]


async def test_closing_it_closes_the_engines_stream() -> None:
    source = Source(stuck=True)
    stream = coalesced(source.chunks(), lambda: 1)
    await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]
    assert source.closed


async def test_cancelling_its_reader_closes_the_engines_stream() -> None:
    source = Source(stuck=True)

    async def read() -> None:
        async for _ in coalesced(source.chunks(), lambda: 1):
            pass

    task = asyncio.create_task(read())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.01)
    assert source.closed


async def test_an_error_of_the_engine_comes_after_what_it_made() -> None:
    source = Source(error=RuntimeError("step failed"))
    seen = []
    with pytest.raises(RuntimeError, match="step failed"):
        async for chunk in coalesced(source.chunks(), lambda: 1):
            seen.append(chunk)
    assert seen == [CHUNKS[0]] and source.closed
