"""The client of a ChatForge server, sync and async. Needs grpc, protobuf and chatforge.v1, nothing heavier.

    with Client("localhost:9000") as client:
        print(client.chat("What is the sea?", max_new_tokens=50).text)
        for piece in client.stream_chat([{"role": "user", "content": "Hello!"}], temperature=0):
            print(piece, end="", flush=True)

A call that failed before anything was delivered is tried again where the server could not take it (UNAVAILABLE,
RESOURCE_EXHAUSTED), with growing pauses, inside the call's timeout. Everything else raises CallError at once.
"""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

import grpc
import grpc.aio
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from chatforge.v1 import chat_pb2, chat_pb2_grpc, common_pb2, models_pb2, models_pb2_grpc

Messages = str | Sequence[Mapping[str, str]]  # one user message, or [{"role": "user", "content": "..."}, ...]
FinishReason = Literal["stop", "length"]

DEFAULT_ADDRESS = "127.0.0.1:9000"
_RETRYABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
_FIRST_PAUSE_S = 0.2
_OPTIONS = (("grpc.use_local_subchannel_pool", 1),)  # a connection of one's own, which no other client can spoil
_CHAT = (("application", "chat"),)  # Serve routes by it
_MODELS = (("application", "models"),)
_ROLES = {"system": chat_pb2.ROLE_SYSTEM, "user": chat_pb2.ROLE_USER, "assistant": chat_pb2.ROLE_ASSISTANT}
_REASONS: dict[int, FinishReason] = {common_pb2.FINISH_REASON_STOP: "stop", common_pb2.FINISH_REASON_LENGTH: "length"}
_HEALTH = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")
_ChatRequest = TypeVar("_ChatRequest", chat_pb2.ChatRequest, chat_pb2.StreamChatRequest)


class CallError(RuntimeError):
    """A call that failed. `code` is gRPC's name for it (INVALID_ARGUMENT, ...), `details` says what to change."""

    def __init__(self, code: grpc.StatusCode, details: str, request_id: str = "") -> None:
        super().__init__(f"{code.name}: {details}")
        self.code, self.details, self.request_id = code.name, details, request_id
        self.retryable = code in _RETRYABLE


@dataclass(frozen=True)
class Reply:
    """A whole answer."""

    text: str
    id: str
    model: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    seed: int
    logprobs: tuple[float, ...] = ()  # one a token made, where `logprobs=True` asked for them


class _Transport:
    """What the sync and the async client share: the channel, the stubs, the policy."""

    def __init__(self, channel: Any, timeout: float, retries: int) -> None:
        self._channel, self._timeout, self._retries = channel, timeout, retries
        self._chat = chat_pb2_grpc.ChatServiceStub(channel)
        self._models = models_pb2_grpc.ModelServiceStub(channel)
        # HealthCheckRequest {string service = 1} and HealthCheckResponse {enum status = 1} have the wire form of these.
        self._health = channel.unary_unary(
            "/grpc.health.v1.Health/Check", StringValue.SerializeToString, Int32Value.FromString
        )

    def _attempts(self, timeout: float | None) -> "_Attempts":
        return _Attempts(self._timeout if timeout is None else timeout, self._retries)


class Client(_Transport):
    """Talks to one server; safe to share between threads. Close it, or use it in a `with` block.

    `timeout` is in seconds, of a whole call with its retries; every method takes another. Methods raise CallError.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, *, timeout: float = 300.0, retries: int = 4) -> None:
        super().__init__(grpc.insecure_channel(address, _OPTIONS), timeout, retries)

    def chat(self, messages: Messages, *, model: str = "", timeout: float | None = None, **config: Any) -> Reply:
        """The whole answer; `config` has the fields of GenerationConfig (max_new_tokens, temperature, stop, ...)."""
        request = _request(chat_pb2.ChatRequest, messages, model, config)
        return _reply(self._unary(self._chat.Chat, request, _CHAT, timeout))

    def stream_chat(
        self, messages: Messages, *, model: str = "", timeout: float | None = None, **config: Any
    ) -> "ChatStream":
        """The answer's text in pieces, while it is made; leaving the loop or closing it cancels the call."""
        request = _request(chat_pb2.StreamChatRequest, messages, model, config)
        return ChatStream(self._chat.StreamChat, request, self._attempts(timeout))

    def list_models(self, timeout: float | None = None) -> list[models_pb2.Model]:
        request = models_pb2.ListModelsRequest()
        return list(self._unary(self._models.ListModels, request, _MODELS, timeout).models)

    def get_model(self, name: str = "", timeout: float | None = None) -> models_pb2.Model:
        request = models_pb2.GetModelRequest(name=name)
        return self._unary(self._models.GetModel, request, _MODELS, timeout).model

    def health(self, service: str = "", timeout: float | None = None) -> str:
        """SERVING or NOT_SERVING: of the whole server, or of one service such as chatforge.v1.ChatService."""
        return _HEALTH[self._unary(self._health, StringValue(value=service), (), timeout).value]

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _unary(self, call: Any, request: Any, metadata: Any, timeout: float | None) -> Any:
        attempts = self._attempts(timeout)
        while True:
            try:
                return call(request, timeout=attempts.remaining(), metadata=metadata)
            except grpc.RpcError as error:
                time.sleep(attempts.pause_after(error))


class ChatStream:
    """Iterates over the pieces of an answer; once it has ended, `reply` is the whole of it."""

    def __init__(self, call: Any, request: chat_pb2.StreamChatRequest, attempts: "_Attempts") -> None:
        self._collected = _Collected()
        self._pieces = _pieces(call, request, attempts, self._collected)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Cancels what is not yet answered."""
        self._pieces.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def reply(self) -> Reply:
        """Raises RuntimeError before the end."""
        return self._collected.reply()


# No method of ChatStream: it would refer to the stream that refers to it, and a loop that is left would cancel its call
# only when the garbage collector comes by.
def _pieces(open_call: Any, request: Any, attempts: "_Attempts", collected: "_Collected") -> Generator[str, None, None]:
    while True:
        call = open_call(request, timeout=attempts.remaining(), metadata=_CHAT)
        try:
            for message in call:
                if piece := collected.add(message):
                    yield piece
            return
        except grpc.RpcError as error:
            pause = attempts.pause_after(error, delivered=collected.started)
        finally:
            call.cancel()
        time.sleep(pause)


class AsyncClient(_Transport):
    """`Client` for asyncio: the same methods, awaited; `stream_chat` gives an async iterator."""

    def __init__(self, address: str = DEFAULT_ADDRESS, *, timeout: float = 300.0, retries: int = 4) -> None:
        super().__init__(grpc.aio.insecure_channel(address, _OPTIONS), timeout, retries)

    async def chat(self, messages: Messages, *, model: str = "", timeout: float | None = None, **config: Any) -> Reply:
        request = _request(chat_pb2.ChatRequest, messages, model, config)
        return _reply(await self._unary(self._chat.Chat, request, _CHAT, timeout))

    def stream_chat(
        self, messages: Messages, *, model: str = "", timeout: float | None = None, **config: Any
    ) -> "AsyncChatStream":
        request = _request(chat_pb2.StreamChatRequest, messages, model, config)
        return AsyncChatStream(self._chat.StreamChat, request, self._attempts(timeout))

    async def list_models(self, timeout: float | None = None) -> list[models_pb2.Model]:
        request = models_pb2.ListModelsRequest()
        return list((await self._unary(self._models.ListModels, request, _MODELS, timeout)).models)

    async def get_model(self, name: str = "", timeout: float | None = None) -> models_pb2.Model:
        request = models_pb2.GetModelRequest(name=name)
        return (await self._unary(self._models.GetModel, request, _MODELS, timeout)).model

    async def health(self, service: str = "", timeout: float | None = None) -> str:
        return _HEALTH[(await self._unary(self._health, StringValue(value=service), (), timeout)).value]

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _unary(self, call: Any, request: Any, metadata: Any, timeout: float | None) -> Any:
        attempts = self._attempts(timeout)
        while True:
            try:
                return await call(request, timeout=attempts.remaining(), metadata=metadata)
            except grpc.RpcError as error:
                await asyncio.sleep(attempts.pause_after(error))


class AsyncChatStream:
    """`ChatStream` for asyncio."""

    def __init__(self, call: Any, request: chat_pb2.StreamChatRequest, attempts: "_Attempts") -> None:
        self._collected = _Collected()
        self._pieces = _async_pieces(call, request, attempts, self._collected)

    def __aiter__(self) -> AsyncIterator[str]:
        return self._pieces

    async def aclose(self) -> None:
        """Cancels what is not yet answered."""
        await self._pieces.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    @property
    def reply(self) -> Reply:
        """Raises RuntimeError before the end."""
        return self._collected.reply()


async def _async_pieces(
    open_call: Any, request: Any, attempts: "_Attempts", collected: "_Collected"
) -> AsyncGenerator[str, None]:
    while True:
        call = open_call(request, timeout=attempts.remaining(), metadata=_CHAT)
        try:
            async for message in call:
                if piece := collected.add(message):
                    yield piece
            return
        except grpc.RpcError as error:
            pause = attempts.pause_after(error, delivered=collected.started)
        finally:
            call.cancel()
        await asyncio.sleep(pause)


class _Attempts:
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
        pause = self._pause * random.uniform(0.5, 1.5)  # so that those who were refused together do not return together
        if delivered or not failure.retryable or not self._retries or pause > self.remaining():
            raise failure from None
        self._retries -= 1
        self._pause *= 2
        return pause


class _Collected:
    """The messages of one stream so far."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._logprobs: list[float] = []
        self._last: chat_pb2.StreamChatResponse | None = None

    @property
    def started(self) -> bool:
        return self._last is not None

    def add(self, message: chat_pb2.StreamChatResponse) -> str:
        """The message's text. An error comes with one empty message, which has no id and is none of the answer."""
        if message.id:
            self._last = message
            self._texts.append(message.delta)
            self._logprobs += [entry.logprob for entry in message.logprobs]
        return message.delta

    def reply(self) -> Reply:
        last = self._last
        if last is None or last.finish_reason not in _REASONS:
            raise RuntimeError("reply: the stream has not ended; iterate to its end first")
        return Reply(
            text="".join(self._texts),
            id=last.id,
            model=last.model,
            finish_reason=_REASONS[last.finish_reason],
            prompt_tokens=last.usage.prompt_tokens,
            completion_tokens=last.usage.completion_tokens,
            seed=last.seed,
            logprobs=tuple(self._logprobs),
        )


def _reply(response: chat_pb2.ChatResponse) -> Reply:
    return Reply(
        text=response.message.content,
        id=response.id,
        model=response.model,
        finish_reason=_REASONS[response.finish_reason],
        prompt_tokens=response.usage.prompt_tokens,
        completion_tokens=response.usage.completion_tokens,
        seed=response.seed,
        logprobs=tuple(entry.logprob for entry in response.logprobs),
    )


def _request(kind: type[_ChatRequest], messages: Messages, model: str, config: dict[str, Any]) -> _ChatRequest:
    """Raises ValueError for what the protos cannot hold; all else is the server's to judge."""
    known = [field.name for field in chat_pb2.GenerationConfig.DESCRIPTOR.fields]
    if unknown := [name for name in config if name not in known]:
        raise ValueError(f"{unknown[0]}: no such field of GenerationConfig; there are: {', '.join(known)}")
    given = {name: value for name, value in config.items() if value is not None}
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    return kind(model=model, messages=[_message(turn) for turn in turns], config=chat_pb2.GenerationConfig(**given))


def _message(turn: Mapping[str, str]) -> chat_pb2.Message:
    if turn.get("role") not in _ROLES or "content" not in turn:
        raise ValueError(f"messages: {dict(turn)!r} must have a content, and a role out of {', '.join(_ROLES)}")
    return chat_pb2.Message(role=_ROLES[turn["role"]], content=turn["content"])


def _call_error(error: Any) -> CallError:
    """`error` is what grpc raises in either kind of client."""
    metadata = dict(error.trailing_metadata() or ())
    return CallError(error.code(), error.details() or "", str(metadata.get("request_id", "")))
