"""What we add to Serve's gRPC proxy, through the servicer functions that it calls with its server.

Three things, all on interfaces that Ray 2.60 keeps private, and therefore all here: the standard health service; the
application of each service, so that a client need not send Serve's `application` metadata; and a last look at every
status, since Serve's own (a replica that died, a full queue, a timeout) show actor ids, addresses and pids.
"""

import functools
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from chatforge.v1.chat_pb2_grpc import add_ChatServiceServicer_to_server
from chatforge.v1.models_pb2_grpc import add_ModelServiceServicer_to_server
from services.errors import DETAILS_KEY, StatusError, overloaded, send, unavailable
from services.health import HEALTH_SERVICE, add_health_servicer

# Which application serves which service; a grpc.health.v1 client asks by these names too.
APPLICATIONS = {"chatforge.v1.ChatService": "chat", "chatforge.v1.ModelService": "models"}

logger = logging.getLogger("ray.serve")

Handler = Callable[[Any, Any], Any]


def add_chat_service(servicer: Any, server: Any) -> None:
    _add(add_ChatServiceServicer_to_server, servicer, server, APPLICATIONS["chatforge.v1.ChatService"])


def add_model_service(servicer: Any, server: Any) -> None:
    _add(add_ModelServiceServicer_to_server, servicer, server, APPLICATIONS["chatforge.v1.ModelService"])


def add_health_service(servicer: Any, server: Any) -> None:
    server.add_passthrough_service(HEALTH_SERVICE)
    add_health_servicer(APPLICATIONS, server)


def _add(add: Callable[[Any, Any], None], servicer: Any, server: Any, application: str) -> None:
    """Registers a service whose handlers are Serve's own with ours around them."""
    serves = server.service_handler_factory
    server.service_handler_factory = functools.partial(_handler, serves, application)
    try:
        add(servicer, server)
    finally:
        server.service_handler_factory = serves


def _handler(serves: Callable[..., Handler], application: str, *, service_method: str, streaming_type: Any) -> Handler:
    inner = serves(service_method=service_method, streaming_type=streaming_type)

    async def unary(request: Any, context: Any) -> bytes:
        response = await inner(request, _Routed(context, application))
        conceal(context)
        return response

    async def stream(request: Any, context: Any) -> AsyncIterator[bytes]:
        async for message in inner(request, _Routed(context, application)):
            yield message
        conceal(context)

    return stream if streaming_type.name.endswith("_STREAM") else unary


class _Routed:
    """A call's context whose metadata names the application."""

    def __init__(self, context: Any, application: str) -> None:
        self._context, self._application = context, application

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def invocation_metadata(self) -> tuple[Any, ...]:
        sent = tuple(self._context.invocation_metadata() or ())
        return (*(pair for pair in sent if pair[0] != "application"), ("application", self._application))


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
