"""The client of a service with several addresses: round robin, a name whose addresses change, a node that dies."""

import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from services_world import environment, eventually

from chatforge.v1 import chat_pb2, chat_pb2_grpc, common_pb2
from services.app import free_port
from services.client import AsyncClient, CallError, Client

FIRST, SECOND, THIRD = (f"127.0.0.{n}" for n in (1, 2, 3))  # addresses that Linux has without being told
PIECES = 20


class Node(chat_pb2_grpc.ChatServiceServicer):
    """Says its own address, whatever it is asked."""

    def __init__(self, address: str) -> None:
        self._address = address

    def Chat(self, request: Any, context: Any) -> Any:
        time.sleep(0.1)
        message, reason = chat_pb2.Message(content=self._address), common_pb2.FINISH_REASON_STOP
        return chat_pb2.ChatResponse(id="r", model="m", message=message, finish_reason=reason)

    def StreamChat(self, request: Any, context: Any) -> Iterator[Any]:
        if request.model == "late":
            time.sleep(1)
        for _ in range(PIECES):
            yield chat_pb2.StreamChatResponse(id="r", model="m", delta=self._address)
            time.sleep(0.1)
        yield chat_pb2.StreamChatResponse(id="r", model="m", finish_reason=common_pb2.FINISH_REASON_STOP)


@contextmanager
def node(address: str, port: int) -> Iterator[None]:
    with ThreadPoolExecutor(32) as pool:
        server = grpc.server(pool)
        chat_pb2_grpc.add_ChatServiceServicer_to_server(Node(address), server)
        assert server.add_insecure_port(f"{address}:{port}") == port
        server.start()
        try:
            yield
        finally:
            server.stop(0).wait()


class Names:
    """A name server for one name, on loopback, whose addresses may change as those of a headless Service do."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((FIRST, 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        while True:
            query, client = self._socket.recvfrom(512)
            end = query.index(b"\0", 12) + 1  # of the name; its type and class follow
            is_a = query[end : end + 2] == b"\0\1"
            found = self.addresses if is_a else ()
            header = query[:2] + struct.pack("!5H", 0x8180, 1, len(found), 0, 0)
            records = (struct.pack("!HHHIH", 0xC00C, 1, 1, 1, 4) + socket.inet_aton(a) for a in found)
            self._socket.sendto(header + query[12 : end + 4] + b"".join(records), client)


def test_calls_go_round_the_addresses_of_a_name_and_find_new_ones_when_one_is_lost() -> None:
    names, port = Names(FIRST, SECOND), free_port()
    with node(SECOND, port), Client(f"dns://{FIRST}:{names.port}/chat.example:{port}", timeout=20) as client:

        def seen() -> set[str]:
            return {client.chat("hi").text for _ in range(4)}

        with node(FIRST, port):
            eventually(lambda: seen() == {FIRST, SECOND})
        assert seen() == {SECOND}  # the name, looked up at once, still had both
        names.addresses = (SECOND, THIRD)
        with node(THIRD, port):
            eventually(lambda: seen() == {SECOND, THIRD}, seconds=12)  # by default grpc would look after 30


def test_a_server_that_was_away_for_long_is_found_again_within_seconds() -> None:
    port = free_port()
    with Client(f"{FIRST}:{port}", timeout=20, retries=0) as client:
        away = time.monotonic() + 30  # grpc's own pauses between tries would be above 10 seconds by then
        while time.monotonic() < away:
            with pytest.raises(CallError, match="UNAVAILABLE"):
                client.chat("hi")
            time.sleep(0.2)
        with node(FIRST, port):
            eventually(lambda: answers(client), seconds=8)


def answers(client: Client) -> bool:
    try:
        return client.chat("hi").text == FIRST
    except CallError:
        return False


# ---- a node that dies


@pytest.fixture
def nodes() -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """The address of two nodes; the second is a process that may be killed."""
    port = free_port()
    code = f"import test_client_nodes as t, signal\nwith t.node({SECOND!r}, {port}): print(flush=True); signal.pause()"
    here = {**environment(), "PYTHONPATH": f"{environment()['PYTHONPATH']}:{Path(__file__).parent}"}
    with (
        node(FIRST, port),
        subprocess.Popen([sys.executable, "-c", code], env=here, stdout=subprocess.PIPE) as mortal,
    ):
        assert mortal.stdout and mortal.stdout.readline()
        yield f"ipv4:{FIRST}:{port},{SECOND}:{port}", mortal
        mortal.kill()


def test_no_call_fails_that_had_no_answer_yet(nodes: Any) -> None:
    address, mortal = nodes
    asked = Counter[str]()

    def ask(client: Client) -> None:
        for _ in range(25):
            asked[client.chat("hi").text] += 1

    with Client(address, timeout=30) as client, ThreadPoolExecutor(8) as callers:
        calls = [callers.submit(ask, client) for _ in range(8)]
        eventually(lambda: asked[SECOND] > 20)
        mortal.send_signal(signal.SIGKILL)
        for call in calls:
            call.result()
    assert asked.total() == 8 * 25 and asked[FIRST] > asked[SECOND] > 20


def test_a_stream_that_has_begun_is_reported_and_one_that_has_not_is_asked_for_again(nodes: Any) -> None:
    address, mortal = nodes
    with Client(address, timeout=30) as client, ThreadPoolExecutor(4) as callers:
        late = [callers.submit(list, client.stream_chat("hi", model="late")) for _ in range(4)]
        begun = on_second(client)
        mortal.send_signal(signal.SIGKILL)
        with pytest.raises(CallError) as caught:
            list(begun)
        assert caught.value.code == "UNAVAILABLE" and caught.value.retryable
        assert [call.result() for call in late] == [[FIRST] * PIECES] * 4
        assert client.stream_chat("again").__next__() == FIRST


def on_second(client: Client) -> Any:
    """A stream that has begun on the second node."""
    for _ in range(20):
        stream = client.stream_chat("hi")
        if next(stream) == SECOND:
            return stream
        stream.close()
    raise AssertionError("no stream went to the second node")


async def test_the_async_client_goes_round_and_goes_on_likewise(nodes: Any) -> None:
    address, mortal = nodes
    async with AsyncClient(address, timeout=30) as client:
        seen = {(await client.chat("hi")).text for _ in range(12)}
        assert seen == {FIRST, SECOND}
        mortal.send_signal(signal.SIGKILL)
        assert {(await client.chat("hi")).text for _ in range(6)} == {FIRST}
