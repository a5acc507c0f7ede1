"""How a client's calls travel: tries, pauses, deadlines, cancellation, and the errors that come back. Knows no service.

A call that failed before anything was delivered is tried again where the server could not take it (UNAVAILABLE, or
RESOURCE_EXHAUSTED by its own word), never sooner than it asks for, with growing pauses, inside the call's timeout.
Everything else raises CallError at once. Where a name has several addresses, calls go round them, and so does a call
that is tried again.
"""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Generic, Self, TypeVar

import grpc
from google.protobuf.message import Message

from services.address import target_of

DETAILS_KEY = "grpc-status-details-bin"  # of the metadata that comes with a status of ours, and none of gRPC's own
MAX_MESSAGE_BYTES = 4 << 20  # of anything that goes over the network, either way
CHANNEL_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # connections of one's own, which no other client can spoil
    ("grpc.lb_policy_name", "round_robin"),  # grpc's default keeps to the first address that answers
    # An address that is lost is looked up and tried again soon: by default after half a minute, and up to two minutes.
    ("grpc.dns_min_time_between_resolutions_ms", 2000),
    ("grpc.max_reconnect_backoff_ms", 5000),
)
_FIRST_PAUSE_S = 0.2

_Piece = TypeVar("_Piece")
_Reply = TypeVar("_Reply")
Metadata = tuple[tuple[str, str], ...]


def connect(address: str, grpc_: Any = grpc) -> Any:
    """A channel of `grpc`, or of `grpc.aio`. Raises ValueError for an address that is none.

    HOST:PORT goes in plain text; https://HOST, or with a port, by TLS, whose roots are gRPC's own or those in the file
    that GRPC_DEFAULT_SSL_ROOTS_FILE_PATH names.
    """
    target, secure = target_of(address)
    if not secure:
        return grpc_.insecure_channel(target, CHANNEL_OPTIONS)
    return grpc_.secure_channel(target, grpc.ssl_channel_credentials(), CHANNEL_OPTIONS)


class CallError(RuntimeError):
    """A call that failed. `code` is gRPC's name for it (INVALID_ARGUMENT, ...), `details` says what to change.

    `field` is the request's field that is wrong, where one is; `request_id` is in the server's log. `by_server` tells
    a server's own word from what gRPC makes of a call that reached none.
    """

    def __init__(self, code: grpc.StatusCode, details: str, metadata: Mapping[str, str | bytes]) -> None:
        """`metadata` is what came at the end of the call."""
        super().__init__(f"{code.name}: {details}")
        self.code, self.details = code.name, details
        self.request_id, self.field = str(metadata.get("request_id", "")), str(metadata.get("field", ""))
        self.retry_after_s = float(metadata.get("retry_after_s", 0))
        self.by_server = DETAILS_KEY in metadata
        # gRPC's own RESOURCE_EXHAUSTED is a message above its limit, which stays so.
        exhausted = code is grpc.StatusCode.RESOURCE_EXHAUSTED and self.by_server
        self.retryable = exhausted or code is grpc.StatusCode.UNAVAILABLE


class Attempts:
    """The tries of one call: how much time is left, and how long to wait before the next."""

    def __init__(self, timeout: float, retries: int) -> None:
        self._deadline = time.monotonic() + timeout
        self._retries = retries
        self._pause = _FIRST_PAUSE_S

    def remaining(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def pause_after(self, error: grpc.RpcError, *, delivered: bool = False) -> float:
        """Seconds until the next try. Raises CallError where there is none."""
        failure = _call_error(error)
        # So that those who were refused together do not return together.
        pause = failure.retry_after_s + self._pause * random.uniform(0.5, 1.5)
        if delivered or not failure.retryable or not self._retries or pause > self.remaining():
            raise failure from None
        self._retries -= 1
        self._pause *= 2
        return pause


def unary(call: Any, request: Message, metadata: Metadata, attempts: Attempts) -> Any:
    """The response. Raises CallError, and ValueError for a request that is too large."""
    _check_size(request)
    while True:
        try:
            return call(request, timeout=attempts.remaining(), metadata=metadata)
        except grpc.RpcError as error:
            time.sleep(attempts.pause_after(error))


async def async_unary(call: Any, request: Message, metadata: Metadata, attempts: Attempts) -> Any:
    """As `unary`."""
    _check_size(request)
    while True:
        try:
            return await call(request, timeout=attempts.remaining(), metadata=metadata)
        except grpc.RpcError as error:
            await asyncio.sleep(attempts.pause_after(error))


class Collected(Generic[_Piece, _Reply]):
    """The messages of one stream so far; each has an id."""

    def __init__(
        self,
        piece: Callable[[Any], _Piece | None],
        ended: Callable[[Any], bool],
        joined: Callable[[Sequence[Any]], _Reply],
    ) -> None:
        """`piece` is what a message has to show, None where nothing; the last of all has `ended`.

        `joined` makes the whole answer out of all messages.
        """
        self._piece, self._ended, self._joined = piece, ended, joined
        self._messages: list[Any] = []

    @property
    def started(self) -> bool:
        return bool(self._messages)

    def add(self, message: Any) -> _Piece | None:
        """The message's piece. An error comes with one empty message, which has no id and is none of the answer."""
        if not message.id:
            return None
        self._messages.append(message)
        return self._piece(message)

    def reply(self) -> _Reply:
        if not self._messages or not self._ended(self._messages[-1]):
            raise RuntimeError("reply: the stream has not ended; iterate to its end first")
        return self._joined(self._messages)


class Stream(Generic[_Piece, _Reply]):
    """Iterates over the pieces of an answer; once it has ended, `reply` is the whole of it."""

    def __init__(
        self, call: Any, request: Message, metadata: Metadata, attempts: Attempts, collected: Collected[_Piece, _Reply]
    ) -> None:
        _check_size(request)
        self._collected = collected
        self._pieces = _pieces(call, request, metadata, attempts, collected)

    def __iter__(self) -> Iterator[_Piece]:
        return self._pieces

    def __next__(self) -> _Piece:
        return next(self._pieces)

    def close(self) -> None:
        """Cancels what is not yet answered."""
        self._pieces.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def reply(self) -> _Reply:
        """Raises RuntimeError before the end."""
        return self._collected.reply()


# No method of Stream: it would refer to the stream that refers to it, and a loop that is left would cancel its call
# only when the garbage collector comes by.
def _pieces(
    open_call: Any, request: Message, metadata: Metadata, attempts: Attempts, collected: Collected[_Piece, Any]
) -> Generator[_Piece, None, None]:
    while True:
        call = open_call(request, timeout=attempts.remaining(), metadata=metadata)
        try:
            for message in call:
                if (piece := collected.add(message)) is not None:
                    yield piece
            return
        except grpc.RpcError as error:
            pause = attempts.pause_after(error, delivered=collected.started)
        finally:
            call.cancel()
        time.sleep(pause)


class AsyncStream(Generic[_Piece, _Reply]):
    """`Stream` for asyncio."""

    def __init__(
        self, call: Any, request: Message, metadata: Metadata, attempts: Attempts, collected: Collected[_Piece, _Reply]
    ) -> None:
        _check_size(request)
        self._collected = collected
        self._pieces = _async_pieces(call, request, metadata, attempts, collected)

    def __aiter__(self) -> AsyncIterator[_Piece]:
        return self._pieces

    async def aclose(self) -> None:
        """Cancels what is not yet answered."""
        await self._pieces.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    @property
    def reply(self) -> _Reply:
        """Raises RuntimeError before the end."""
        return self._collected.reply()


async def _async_pieces(
    open_call: Any, request: Message, metadata: Metadata, attempts: Attempts, collected: Collected[_Piece, Any]
) -> AsyncGenerator[_Piece, None]:
    while True:
        call = open_call(request, timeout=attempts.remaining(), metadata=metadata)
        try:
            async for message in call:
                if (piece := collected.add(message)) is not None:
                    yield piece
            return
        except grpc.RpcError as error:
            pause = attempts.pause_after(error, delivered=collected.started)
        finally:
            call.cancel()
        await asyncio.sleep(pause)


def _check_size(request: Message) -> None:
    """gRPC would say RESOURCE_EXHAUSTED, as of a server that is busy."""
    if (size := request.ByteSize()) > MAX_MESSAGE_BYTES:
        raise ValueError(f"request: {size} bytes, above {MAX_MESSAGE_BYTES}; send less at once")


def _call_error(error: Any) -> CallError:
    """`error` is what grpc raises in either kind of client."""
    return CallError(error.code(), error.details() or "", dict(error.trailing_metadata() or ()))
