"""Coalescing: tokens that are ready together travel in one message.

Serve's proxy forwards about 1,900 messages a second over all streams. With n streams open, each may therefore send one
every n / 1,900 s; chunks that come sooner wait for that moment and go as one. A lone stream never waits noticeably,
and a first token never waits at all.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress

from serving.engine.api import Chunk, joined

MESSAGES_PER_SECOND = 1_900


async def coalesced(chunks: AsyncIterator[Chunk], open_streams: Callable[[], int]) -> AsyncIterator[Chunk]:
    """The same answer in as many or fewer chunks. Closing it closes `chunks`."""
    clock = asyncio.get_running_loop().time
    queue: asyncio.Queue[Chunk | Exception | None] = asyncio.Queue()
    pump = asyncio.create_task(_pump(chunks, queue))
    earliest = 0.0
    try:
        while True:
            ready = [await queue.get()]
            if (wait := earliest - clock()) > 0:
                await asyncio.sleep(wait)
            while not queue.empty():
                ready.append(queue.get_nowait())
            parts = [item for item in ready if isinstance(item, Chunk)]
            if parts:
                yield joined(parts)
                earliest = clock() + open_streams() / MESSAGES_PER_SECOND
            if isinstance(ready[-1], Exception):
                raise ready[-1]
            if ready[-1] is None:
                return
    finally:
        pump.cancel()
        with suppress(asyncio.CancelledError):
            await pump


async def _pump(chunks: AsyncIterator[Chunk], queue: "asyncio.Queue[Chunk | Exception | None]") -> None:
    """Moves chunks into the queue as they come, then None or what `chunks` raised."""
    try:
        async with aclosing(chunks):  # type: ignore[type-var]
            async for chunk in chunks:
                queue.put_nowait(chunk)
        queue.put_nowait(None)
    except Exception as error:
        queue.put_nowait(error)
