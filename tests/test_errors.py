"""Errors on the wire: what the caller is told, and what the caller is not."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from ray.serve.metrics import Counter

from services.errors import StatusError, answers, invalid, overloaded, refuse, send, unavailable
from services.proxy import _Call, conceal
from services.transport import DETAILS_KEY
from serving.api import EngineClosed, QueueFull


class Context:
    """What Serve's context keeps of a call."""

    def __init__(self, code: Any = None, details: str = "", metadata: tuple[tuple[str, Any], ...] = ()) -> None:
        self._code, self._details, self._metadata = code, details, [("request_id", "r-1"), *metadata]

    def code(self) -> Any:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> list[tuple[str, Any]]:
        return self._metadata

    def set_code(self, code: Any) -> None:
        self._code = code

    def set_details(self, details: str) -> None:
        self._details = details

    def set_trailing_metadata(self, metadata: list[tuple[str, Any]]) -> None:
        self._metadata = [("request_id", "r-1"), *metadata]


class Service:
    """Fails as it is told."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    @answers(StringValue)
    async def Ask(self, request: Any, grpc_context: Any, request_id: str) -> StringValue:
        raise self._error

    @answers(StringValue)
    async def StreamAsk(self, request: Any, grpc_context: Any, request_id: str) -> AsyncIterator[StringValue]:
        yield StringValue(value="first")
        raise self._error


TOLD = {
    QueueFull("queue at 64"): (grpc.StatusCode.RESOURCE_EXHAUSTED, "too many requests wait for this model"),
    EngineClosed("closed"): (grpc.StatusCode.UNAVAILABLE, "the server is going down"),
    invalid("top", "is wrong"): (grpc.StatusCode.INVALID_ARGUMENT, "top: is wrong"),
    KeyError("/secret/path"): (grpc.StatusCode.INTERNAL, "internal error; the server's log has it as request r-1"),
    ValueError("secret shape [3, 4]"): (grpc.StatusCode.INTERNAL, "internal error"),
}


@pytest.mark.parametrize("error", TOLD, ids=lambda e: type(e).__name__)
async def test_a_failed_method_answers_empty_beside_a_status(error: Exception) -> None:
    code, text = TOLD[error]
    context = Context()
    assert await Service(error).Ask(StringValue(), context) == StringValue()
    assert context.code() is code and context.details().startswith(text)
    stream_context = Context()
    sent = [message async for message in Service(error).StreamAsk(StringValue(), stream_context)]
    assert sent == [StringValue(value="first"), StringValue()]
    assert (stream_context.code(), stream_context.details()) == (context.code(), context.details())
    assert "secret" not in repr((context.details(), context.trailing_metadata()))


async def test_what_was_not_foreseen_is_in_the_log_with_the_requests_id(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("ray.serve")
    logger.addHandler(caplog.handler)
    try:
        await Service(KeyError("secret")).Ask(StringValue(), Context())
    finally:
        logger.removeHandler(caplog.handler)
    assert "request r-1 failed" in caplog.text and "KeyError: 'secret'" in caplog.text


async def test_an_error_is_counted_by_method_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """For Serve the call went well, since the method returned."""
    counted = []
    monkeypatch.setattr(Counter, "inc", lambda self, value=1.0, tags=None: counted.append((self.info["name"], tags)))
    await Service(KeyError("secret")).Ask(StringValue(), Context())
    _ = [message async for message in Service(QueueFull("full")).StreamAsk(StringValue(), Context())]
    assert counted == [
        ("request_errors", {"method": "Ask", "code": "INTERNAL"}),
        ("request_errors", {"method": "StreamAsk", "code": "RESOURCE_EXHAUSTED"}),
    ]


async def test_cancellation_passes_through() -> None:
    context = Context()
    with pytest.raises(asyncio.CancelledError):
        await Service(asyncio.CancelledError()).Ask(StringValue(), context)
    assert context.code() is None


def test_details_say_when_to_come_back() -> None:
    context = Context()
    send(overloaded("full"), context, "r-1")
    status = Status.FromString(dict(context.trailing_metadata())[DETAILS_KEY])
    info, retry = ErrorInfo(), RetryInfo()
    assert status.details[0].Unpack(info) and status.details[1].Unpack(retry)
    assert dict(info.metadata) == {"request_id": "r-1"} and retry.retry_delay.seconds == 1
    assert dict(context.trailing_metadata())["retry_after_s"] == "1"
    send(invalid("config.top_p", "must be more"), context, "r-2")
    assert dict(context.trailing_metadata())["field"] == "config.top_p"


def test_serve_finds_the_context_argument_where_it_looks_for_it() -> None:
    import inspect

    assert list(inspect.signature(Service.Ask).parameters) == ["self", "request", "grpc_context"]
    assert inspect.isasyncgenfunction(Service.StreamAsk) and Service.Ask.__name__ == "Ask"


INSIDE = "The actor is dead because its worker process has died. pid: 77, ip: 10.0.0.3\nTraceback"


@pytest.mark.parametrize(
    ("code", "becomes"),
    [
        (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE),
        (grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE),
        (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.DEADLINE_EXCEEDED),
        (grpc.StatusCode.CANCELLED, grpc.StatusCode.CANCELLED),
    ],
)
def test_the_proxy_tells_serves_own_errors_in_our_words(code: grpc.StatusCode, becomes: grpc.StatusCode) -> None:
    context = Context(code, INSIDE)
    conceal(context)
    assert context.code() is becomes
    said = repr((context.details(), context.trailing_metadata()))
    assert not [word for word in ("actor", "pid", "10.0.0.3", "Traceback") if word in said]


@pytest.mark.parametrize("code", [None, 0, grpc.StatusCode.OK])
def test_the_proxy_leaves_success_alone(code: Any) -> None:
    context = Context(code)
    conceal(context)
    assert (context.code(), context.details()) == (code, "")


def test_the_proxy_leaves_our_own_errors_alone() -> None:
    context = Context()
    error: StatusError = unavailable("going down")
    send(error, context, "r-1")
    before = context.trailing_metadata()
    conceal(context)
    assert (context.code(), context.details(), context.trailing_metadata()) == (error.code, "going down", before)


class Wire:
    """What grpc's own context is asked for."""

    peer = auth_context = peer_identities = peer_identity_key = invocation_metadata = lambda self: None

    def set_code(self, code: grpc.StatusCode) -> None:
        pass

    def set_details(self, details: str) -> None:
        pass

    def set_trailing_metadata(self, metadata: Any) -> None:
        self.metadata = list(metadata)

    async def abort(self, code: grpc.StatusCode, details: str, metadata: Any) -> None:
        self.metadata = list(metadata)
        raise RuntimeError("aborted")


@pytest.mark.parametrize("ours", [False, True])
def test_the_requests_id_goes_to_the_caller_once(ours: bool) -> None:
    """Serve has put it there; a replica's context gives it back beside the details."""
    wire, call = Wire(), _Call(Wire(), "chat")
    call.set_trailing_metadata([("request_id", "r-1")])
    if ours:
        send(unavailable("going down"), call, "r-1")
        call.set_trailing_metadata(list(call.trailing_metadata()))
    else:
        call.set_code(grpc.StatusCode.INTERNAL)  # a replica that died
    call.end(wire)
    expected = ["request_id", DETAILS_KEY, "retry_after_s"]
    assert [key for key, _ in wire.metadata] == expected and wire.metadata[0][1] == "r-1"


async def test_a_call_that_is_refused_at_once_has_an_id_too() -> None:
    wire = Wire()
    with pytest.raises(RuntimeError, match="aborted"):
        await refuse(unavailable("going down"), wire)
    metadata = dict(wire.metadata)
    info = ErrorInfo()
    assert Status.FromString(metadata[DETAILS_KEY]).details[0].Unpack(info)
    assert metadata["request_id"] == info.metadata["request_id"] != ""
