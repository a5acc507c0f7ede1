"""What we add to Serve's gRPC proxy, through the servicer functions that it calls with its server.

Five things, on interfaces that Ray 2.60 keeps private, and therefore all here: the standard health service; the
application of each service, so that a client need not send Serve's `application` metadata; a refusal of bytes that are
no request; a refusal of services that this server does not have; and a last look at every status, since Serve's own (a
replica that died, a full queue, a timeout) show actor ids, addresses and pids.
"""

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from ray.serve._private.grpc_util import get_service_names

from chatforge.v1.chat_pb2_grpc import add_ChatServiceServicer_to_server
from chatforge.v1.image_pb2_grpc import add_ImageServiceServicer_to_server
from chatforge.v1.models_pb2_grpc import add_ModelServiceServicer_to_server
from chatforge.v1.translation_pb2_grpc import add_TranslationServiceServicer_to_server
from services.errors import StatusError, overloaded, refuse, send, unavailable
from services.health import HEALTH_SERVICE, add_health_servicer
from services.transport import DETAILS_KEY

# Which application serves which service; a grpc.health.v1 client asks by these names too.
APPLICATIONS = {
    "chatforge.v1.ChatService": "chat",
    "chatforge.v1.TranslationService": "translation",
    "chatforge.v1.ImageService": "image",
    "chatforge.v1.ModelService": "models",
}

logger = logging.getLogger("ray.serve")

Handler = Callable[[Any, Any], Any]


def add_chat_service(servicer: Any, server: Any) -> None:
    _add(add_ChatServiceServicer_to_server, servicer, server, "chat")


def add_translation_service(servicer: Any, server: Any) -> None:
    _add(add_TranslationServiceServicer_to_server, servicer, server, "translation")


def add_image_service(servicer: Any, server: Any) -> None:
    _add(add_ImageServiceServicer_to_server, servicer, server, "image")


def add_model_service(servicer: Any, server: Any) -> None:
    _add(add_ModelServiceServicer_to_server, servicer, server, "models")


def add_health_service(servicer: Any, server: Any) -> None:
    """The last to be called: it answers for the services added before, and refuses calls to any other of ours."""
    added = get_service_names(server.generic_rpc_handlers)
    applications = {service: application for service, application in APPLICATIONS.items() if service in added}
    # Past Serve's own method of that name, which would send the calls to replicas and list the services as served.
    super(type(server), server).add_generic_rpc_handlers((_Absent(applications),))
    server.add_passthrough_service(HEALTH_SERVICE)
    add_health_servicer(applications, server)


class _Absent(grpc.GenericRpcHandler):
    """Answers calls to services of ours that this server does not have; grpc's own words are "Method not found!"."""

    def __init__(self, present: Collection[str]) -> None:
        self._present = present

    def service(self, handler_call_details: Any) -> Any:
        service = handler_call_details.method.strip("/").partition("/")[0]
        if service in self._present or not service.startswith("chatforge."):
            return None
        text = f"this server has no {service}; it has: {', '.join(sorted(self._present))}"
        error = StatusError(grpc.StatusCode.UNIMPLEMENTED, text)
        return grpc.unary_unary_rpc_method_handler(functools.partial(_end_with, error))


async def _end_with(error: StatusError, request: bytes, context: Any) -> None:
    await refuse(error, context)


def _add(add: Callable[[Any, Any], None], servicer: Any, server: Any, application: str) -> None:
    """Registers a service whose handlers are Serve's own with ours around them."""
    serves, overrides = server.service_handler_factory, server._override_method_handler
    server.service_handler_factory = functools.partial(_handler, serves, application)
    server._override_method_handler = functools.partial(_with_parser, overrides)
    try:
        add(servicer, server)
    finally:
        server.service_handler_factory, server._override_method_handler = serves, overrides


def _with_parser(overrides: Callable[..., Any], method: str, handler: Any) -> Any:
    """Bytes that cannot be parsed arrive as the error they made: grpc would answer UNKNOWN with Python's words."""

    def parse(sent: bytes) -> Any:
        try:
            return handler.request_deserializer(sent)
        except DecodeError as error:
            return error

    return overrides(method, handler)._replace(request_deserializer=parse)


def _handler(serves: Callable[..., Handler], application: str, *, service_method: str, streaming_type: Any) -> Handler:
    inner = serves(service_method=service_method, streaming_type=streaming_type)

    async def unary(request: Any, context: Any) -> bytes:
        if isinstance(request, DecodeError):
            await refuse(_unreadable(service_method), context)
        call = _Call(context, application)
        response = await inner(request, call)
        call.end(context)
        return response

    async def stream(request: Any, context: Any) -> AsyncIterator[bytes]:
        """The messages, read by a task of their own.

        Serve cancels the replica's work only if the client's going finds it waiting for the replica, as that task
        always is. Going while a message is written just closes this generator, and would leave the replica at work to
        the end of the answer.
        """
        if isinstance(request, DecodeError):
            await refuse(_unreadable(service_method), context)
        call = _Call(context, application)
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        reader = asyncio.create_task(_read(inner(request, call), queue))
        try:
            while (message := await queue.get()) is not None:
                yield message
            await reader
            call.end(context)
        finally:
            reader.cancel()

    return stream if streaming_type.name.endswith("_STREAM") else unary


def _unreadable(service_method: str) -> StatusError:
    request = f"{service_method.rpartition('/')[2]}Request"
    return StatusError(grpc.StatusCode.INVALID_ARGUMENT, f"{request}: cannot be parsed; its strings must be UTF-8")


async def _read(messages: AsyncIterator[bytes], queue: "asyncio.Queue[bytes | None]") -> None:
    """Moves messages into the queue as they come, then None."""
    try:
        async for message in messages:
            queue.put_nowait(message)
    finally:
        queue.put_nowait(None)


class _Call:
    """What Serve reads and writes of a call's context, with metadata that names the application.

    It stands apart from the context because Serve's part may outlive the call, and grpcio 1.85 crashes the process when
    the context of an ended call is asked for its peer.
    """

    def __init__(self, context: Any, application: str) -> None:
        sent = tuple(context.invocation_metadata() or ())
        self._metadata = (*(pair for pair in sent if pair[0] != "application"), ("application", application))
        self._peer, self._auth = context.peer(), context.auth_context()
        self._identities, self._identity_key = context.peer_identities(), context.peer_identity_key()
        self._code: grpc.StatusCode | None = None
        self._details = ""
        self._trailing: tuple[Any, ...] = ()

    def end(self, context: Any) -> None:
        """Puts the status on the real context, in words that are ours."""
        conceal(self)
        if self._code is not None:
            context.set_code(self._code)
            context.set_details(self._details)
        context.set_trailing_metadata(self._trailing)

    def invocation_metadata(self) -> tuple[Any, ...]:
        return self._metadata

    def peer(self) -> str:
        return self._peer

    def auth_context(self) -> Any:
        return self._auth

    def peer_identities(self) -> Any:
        return self._identities

    def peer_identity_key(self) -> Any:
        return self._identity_key

    def code(self) -> grpc.StatusCode | None:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> tuple[Any, ...]:
        return self._trailing

    def set_code(self, code: grpc.StatusCode) -> None:
        self._code = code

    def set_details(self, details: str) -> None:
        self._details = details

    def set_trailing_metadata(self, metadata: Any) -> None:
        """The request's id stays, as in the context that a replica has."""
        known = [pair for pair in self._trailing if pair[0] == "request_id"]
        self._trailing = (*known, *(pair for pair in metadata if pair not in known))


def conceal(context: Any) -> None:
    """Puts a status of ours in place of one that Serve itself made."""
    code, metadata = context.code(), dict(context.trailing_metadata() or ())
    if code in (None, 0, grpc.StatusCode.OK) or DETAILS_KEY in metadata:
        return
    request_id = str(metadata.get("request_id", ""))
    logger.warning("request %s ended with %s: %s", request_id, code, context.details())
    send(_told(code), context, request_id)


def _told(code: grpc.StatusCode) -> StatusError:
    match code:
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return overloaded("too many requests wait for this service; try again later")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return StatusError(code, "the answer took longer than the server's request_timeout_s")
        case grpc.StatusCode.CANCELLED:
            return StatusError(code, "the call was cancelled")
        case _:  # the replica died in the middle, or is not up again yet
            return unavailable("the service lost the process that answered, and starts another; try again")
