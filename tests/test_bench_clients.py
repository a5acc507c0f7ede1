"""The clients of a benchmark: every item once, as many at a time as there are clients."""

import asyncio
from typing import Any

import pytest

from services import bench_clients
from services.bench_clients import Measured, ask_all, over_grpc, table


class Silent:
    """A client without a server."""

    def __init__(self, address: str) -> None:
        self.address = address

    async def __aenter__(self) -> "Silent":
        return self

    async def __aexit__(self, *error: object) -> None:
        return None


async def test_every_item_is_asked_once_in_order_by_all_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_clients, "AsyncClient", Silent)
    asked: list[int] = []
    now, most = 0, 0

    async def ask(client: Any, item: int) -> int:
        nonlocal now, most
        asked.append(item)
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.001)
        now -= 1
        return item

    row = await ask_all(Measured(over_grpc(4)), "somewhere", range(1, 11), 4, ask)
    assert (asked, most, row.made) == (list(range(1, 11)), 4, 55)
    assert row.rate == row.made / row.seconds


def test_rates_stand_beside_the_first() -> None:
    rows = [Measured("alone", 10, 10.0), Measured(over_grpc(1), 5, 2.0)]
    shown = table("title", "images", rows, ("name",), lambda row: [row.name.upper()])
    assert [list(column.cells) for column in shown.columns[1:]] == [
        ["1.00", "2.50"], ["1.00", "2.50"], ["ALONE", "CHATFORGE OVER GRPC, 1 CLIENT"],
    ]  # fmt: skip
