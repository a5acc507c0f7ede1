"""What the benchmarks of the services have in common: a server on the CPU, clients that ask it, a table of rates."""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from services.client import AsyncClient
from services.config import ServerConfig

NAME = "model"


@dataclass
class Measured:
    """One way to have the same work done."""

    name: str
    made: int = 0  # tokens, sentences or images
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        return self.made / self.seconds


M = TypeVar("M", bound=Measured)
T = TypeVar("T")


def served(threads: int, ask: Callable[[str], Coroutine[Any, Any, list[M]]], **models: Any) -> list[M]:
    """What `ask` measures at the address of a server with `models`, by service and name.

    It has no GPU, since what it is measured beside has none.
    """
    from services.app import free_port, running

    with running(ServerConfig(**models, port=free_port(), threads=threads, gpus_per_replica=0)) as server:
        return asyncio.run(ask(server.address))


async def ask_all(
    row: M, address: str, items: Sequence[T], clients: int, ask: Callable[[AsyncClient, T], Awaitable[int]]
) -> M:
    """Every item once, in order, by clients that each have a connection of their own and ask one after another.

    `ask` tells how much was made of its item.
    """
    queue = deque(items)
    started = time.perf_counter()
    row.made = sum(await asyncio.gather(*(_ask_until_empty(address, queue, ask) for _ in range(clients))))
    row.seconds = time.perf_counter() - started
    return row


async def _ask_until_empty(address: str, queue: deque[T], ask: Callable[[AsyncClient, T], Awaitable[int]]) -> int:
    made = 0
    async with AsyncClient(address) as client:
        while queue:
            made += await ask(client, queue.popleft())
    return made


def over_grpc(clients: int, backend: str = "") -> str:
    """A row's name."""
    return f"chatforge over gRPC{backend}, {clients} client{'s' * (clients > 1)}"


def table(
    title: str, unit: str, rows: Sequence[M], more: Sequence[str] = (), cells: Callable[[M], list[str]] = lambda row: []
) -> Any:
    """The rates, each beside the first; `more` columns have the `cells` of each row."""
    from rich.table import Table

    made = Table("", f"{unit}/s", "×", *more, title=title, box=None)
    for row in rows:
        made.add_row(row.name, f"{row.rate:.2f}", f"{row.rate / rows[0].rate:.2f}", *cells(row))
    return made
