"""Whether an application of this server answers now, as Serve's controller sees it."""

import asyncio
import enum

from ray import serve
from ray.serve.schema import ApplicationStatus, ReplicaState


class State(enum.Enum):
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


async def application_state(name: str) -> State:
    """READY where at least one replica of each deployment runs, so a service whose replica died is LOADING."""
    status = (await asyncio.to_thread(serve.status)).applications.get(name)
    if status is None:
        return State.LOADING
    if status.status is ApplicationStatus.DEPLOY_FAILED:
        return State.FAILED
    running = [d.replica_states.get(ReplicaState.RUNNING, 0) for d in status.deployments.values()]
    return State.READY if running and all(running) else State.LOADING
