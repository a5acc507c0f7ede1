"""Whether the applications of this server answer now, as Serve's controller sees it."""

import asyncio
import enum
from collections.abc import Iterable

from ray import serve
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ReplicaState


class State(enum.Enum):
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


async def application_states(names: Iterable[str]) -> dict[str, State]:
    """Of all by one question. One that Serve does not know yet is LOADING."""
    known = (await asyncio.to_thread(serve.status)).applications
    return {name: _state(known[name]) if name in known else State.LOADING for name in names}


def _state(status: ApplicationStatusOverview) -> State:
    """READY where at least one replica of each deployment runs, so a service whose replica died is LOADING."""
    if status.status is ApplicationStatus.DEPLOY_FAILED:
        return State.FAILED
    running = [d.replica_states.get(ReplicaState.RUNNING, 0) for d in status.deployments.values()]
    return State.READY if running and all(running) else State.LOADING
