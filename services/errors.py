"""Errors on the wire: a gRPC code, a text that names the field, and google.rpc details for machines.

Serve delivers a status, trailing metadata included, only with a message: so a method that fails sets code, details
and metadata, and then answers with one empty message (a stream too), which a client never sees as an answer, since the
status is not OK. What we did not foresee becomes INTERNAL with the request's id: the log has the rest. Serve takes such
a call for one that went well, so we count it ourselves.
"""

import functools
import inspect
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NoReturn

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode

from services.metrics import count_error
from services.transport import DETAILS_KEY
from serving.api import EngineClosed, QueueFull

RETRY_AFTER_S = 1

logger = logging.getLogger("ray.serve")  # its records go to the replica's own log file


class StatusError(Exception):
    """An error that the caller is told of. `field` is the request's field that is wrong, where one is."""

    def __init__(self, code: StatusCode, text: str, *, field: str = "", retry_after_s: int | None = None) -> None:
        super().__init__(text)
        self.code, self.text, self.field, self.retry_after_s = code, text, field, retry_after_s


def invalid(field: str, why: str) -> StatusError:
    """INVALID_ARGUMENT: `field` is named in the text and in the details."""
    return StatusError(StatusCode.INVALID_ARGUMENT, f"{field}: {why}", field=field)


def not_found(field: str, why: str) -> StatusError:
    return StatusError(StatusCode.NOT_FOUND, f"{field}: {why}", field=field)


def overloaded(text: str) -> StatusError:
    return StatusError(StatusCode.RESOURCE_EXHAUSTED, text, retry_after_s=RETRY_AFTER_S)


def unavailable(text: str) -> StatusError:
    return StatusError(StatusCode.UNAVAILABLE, text, retry_after_s=RETRY_AFTER_S)


def as_status_error(error: Exception, request_id: str) -> StatusError:
    """What the caller is told of `error`."""
    match error:
        case StatusError():
            return error
        case QueueFull():
            return overloaded("too many requests wait for this model; try again later")
        case EngineClosed():
            return unavailable("the server is going down; try again later")
    logger.error("request %s failed", request_id, exc_info=error)
    return StatusError(StatusCode.INTERNAL, f"internal error; the server's log has it as request {request_id}")


def status_proto(error: StatusError, request_id: str) -> Status:
    """The google.rpc.Status with ErrorInfo, and BadRequest or RetryInfo where they apply."""
    details: list[Message] = [
        ErrorInfo(reason=error.code.name, domain="chatforge", metadata={"request_id": request_id})
    ]
    if error.field:
        violation = BadRequest.FieldViolation(field=error.field, description=error.text)
        details.append(BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        details.append(RetryInfo(retry_delay=Duration(seconds=error.retry_after_s)))
    status = Status(code=error.code.value[0], message=error.text)
    for detail in details:
        status.details.add().Pack(detail)
    return status


def send(error: StatusError, context: Any, request_id: str) -> None:
    """Puts the error on the call; the request's id is there already, and Serve keeps it."""
    context.set_code(error.code)
    context.set_details(error.text)
    context.set_trailing_metadata(list(_metadata(error, request_id)))


async def refuse(error: StatusError, context: Any) -> NoReturn:
    """Ends a call that the proxy takes no further; `context` is grpc's own."""
    request_id = str(uuid.uuid4())
    await context.abort(error.code, error.text, (("request_id", request_id), *_metadata(error, request_id)))
    raise AssertionError("abort raises")


def _metadata(error: StatusError, request_id: str) -> Iterator[tuple[str, Any]]:
    """Details as google.rpc has them, and in words for clients without its package, as ours is."""
    yield DETAILS_KEY, status_proto(error, request_id).SerializeToString()
    if error.field:
        yield "field", error.field
    if error.retry_after_s is not None:
        yield "retry_after_s", str(error.retry_after_s)


def request_id_of(context: Any) -> str:
    """The id that Serve's logs have for the call, or a fresh one."""
    known = dict(context.trailing_metadata()).get("request_id")
    return str(known or uuid.uuid4())


def answers(response: Callable[[], Message]) -> Callable[[Any], Any]:
    """Decorates the method of an RPC, unary or streaming, which takes (request, grpc_context, request_id).

    Whatever it raises goes out as a status beside one empty `response`; cancellation passes through.
    """

    def decorate(method: Any) -> Any:
        return _stream(method, response) if inspect.isasyncgenfunction(method) else _unary(method, response)

    return decorate


def _unary(method: Any, response: Callable[[], Message]) -> Any:
    async def call(self: Any, request: Message, grpc_context: Any) -> Message:
        request_id = request_id_of(grpc_context)
        try:
            return await method(self, request, grpc_context, request_id)
        except Exception as error:
            _tell(error, grpc_context, request_id, method.__name__)
            return response()

    return _named(call, method)


def _stream(method: Any, response: Callable[[], Message]) -> Any:
    async def call(self: Any, request: Message, grpc_context: Any) -> AsyncIterator[Message]:
        request_id = request_id_of(grpc_context)
        try:
            async for message in method(self, request, grpc_context, request_id):
                yield message
        except Exception as error:
            _tell(error, grpc_context, request_id, method.__name__)
            yield response()

    return _named(call, method)


def _tell(failure: Exception, context: Any, request_id: str, method: str) -> None:
    error = as_status_error(failure, request_id)
    count_error(method, error.code.name)
    send(error, context, request_id)


def _named(call: Any, method: Any) -> Any:
    """Name and docstring of `method`, but the signature of `call`, in which Serve looks for grpc_context."""
    functools.update_wrapper(call, method)
    del call.__wrapped__
    return call
