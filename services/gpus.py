"""Which part of a machine's GPUs each replica of a server gets. A replica uses one GPU at most, and may share it."""

from contextlib import suppress

from services.config import Scale, ServerConfig
from services.strict import ServerConfigError

_PARTS = 10_000  # of a GPU, in which Ray counts: three times a third must not be more than one


def on_gpus(config: ServerConfig, present: int) -> ServerConfig:
    """The same with `gpus` for every service: those that name none share the GPUs that the others leave whole.

    Raises ServerConfigError where those that are named are not there: Ray would wait for them without a word.
    """
    free = [_PARTS] * present
    served = [("models", config.scale.get("models", Scale())), *config.scales.items()]
    for name, scale in (largest := sorted(served, key=lambda each: each[1].gpus or 0, reverse=True)):
        _take(name, scale, scale.replicas, free)
    for name, scale in largest:  # room to grow, where there is some
        with suppress(ServerConfigError):
            _take(name, scale, scale.most_replicas - scale.replicas, free)
    sharing = {service: scale for service, scale in config.scales.items() if scale.gpus is None}
    part = _part(free.count(_PARTS), sum(scale.most_replicas for scale in sharing.values()))
    shared = {service: scale.model_copy(update={"gpus": part}) for service, scale in sharing.items()}
    return config.model_copy(update={"scale": {**config.scale, **shared}})


def _take(name: str, scale: Scale, replicas: int, free: list[int]) -> None:
    """Takes their parts out of the GPUs that are `free`, the fullest first that has room, as Ray does."""
    part, left = round((scale.gpus or 0) * _PARTS), sum(free) / _PARTS
    for _ in range(replicas if part else 0):
        room = [gpu for gpu, parts in enumerate(free) if parts >= part]
        if not room:
            raise ServerConfigError(
                f"{name}: replicas x gpus = {scale.replicas} x {scale.gpus:g}, each of one GPU; of this machine's "
                f"{len(free)} GPUs {left:g} are left for it"
            )
        free[min(room, key=free.__getitem__)] -= part


def _part(gpus: int, replicas: int) -> float:
    """An equal one for each replica, so that the same number of them is on every GPU."""
    if not gpus or not replicas:
        return 0.0
    sharing = -(-replicas // gpus)
    return _PARTS // sharing / _PARTS
