"""Word from a model's thread to a task of asyncio."""

import asyncio


class News:
    """Tells one asyncio task, from any thread, that something came."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._came = asyncio.Event()

    def tell(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._came.set)

    async def wait(self) -> None:
        await self._came.wait()
        self._came.clear()
