"""grpc.health.v1, answered by the proxy itself: SERVING where a service's replicas run.

The empty name is the whole server; other names are those of the services.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.state import State, application_states

HEALTH_SERVICE = "grpc.health.v1.Health"
_WATCH_PERIOD_S = 1.0


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Asks Serve's controller at every call, so what it says is never older than the call."""

    def __init__(self, applications: dict[str, str]) -> None:
        """`applications` has the application of every service."""
        self._applications = applications

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        status = await self._status(request.service)
        if status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"service: {request.service!r} is not served here")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        last = None
        while True:
            if (status := await self._status(request.service)) != last:
                yield health_pb2.HealthCheckResponse(status=status)
            last = status
            await asyncio.sleep(_WATCH_PERIOD_S)

    async def _status(self, service: str) -> Any:
        if service and service not in self._applications:
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        asked = [self._applications[service]] if service else self._applications.values()
        ready = all(state is State.READY for state in (await application_states(asked)).values())
        return health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING


def add_health_servicer(applications: dict[str, str], server: Any) -> None:
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(applications), server)
