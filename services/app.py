"""Builds the Serve applications, one per gRPC service, and runs those of one server config on this machine.

`models`, `chat`, `translation` and `image` are what a config of Ray Serve has as import_path (services.serve_config);
`running` calls the same ones.
"""

import logging
import os
import random
import re
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from services.config import (
    ChatArgs,
    ImageArgs,
    ModelsArgs,
    Scale,
    ServerConfig,
    Service,
    TranslationArgs,
)
from services.gpus import on_gpus
from services.serve_config import servicer_functions
from services.strict import ServerConfigError
from services.transport import MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from ray.serve import Application  # Ray itself reads ENVIRONMENT when it is imported

HOST = "127.0.0.1"

# Read by Ray's processes when they start; on a cluster every node needs it.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # by default 15: any other program on the machine would starve the replicas
    "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(MAX_MESSAGE_BYTES),
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
}
# What Serve keeps beyond the models' own bounds, so that the model says no and not Serve, whose words are less plain.
_SPARE_REQUESTS = 16
_LISTINGS = 100  # calls of ModelService at once
# A replica that has to go still ends what it answers: as long as request_timeout_s, by default, lets an answer take.
_DRAIN_S = 600


@dataclass(frozen=True)
class Server:
    """One that answers."""

    address: str
    devices: dict[Service, str]  # cuda or cpu: where the models of each service are


class ServerStartError(RuntimeError):
    """A server whose replicas do not start, through no fault of its config."""


def models(args: ModelsArgs) -> "Application":
    """The application of ModelService."""
    from services.models import ModelService

    return _deployment(ModelService, args, bound=_LISTINGS, at_once=_LISTINGS).bind(args.services)


def chat(args: ChatArgs) -> "Application":
    """The application of ChatService."""
    from services.chat import ChatService

    return _holding_models(ChatService, args)


def translation(args: TranslationArgs) -> "Application":
    """The application of TranslationService."""
    from services.translation import TranslationService

    return _holding_models(TranslationService, args)


def image(args: ImageArgs) -> "Application":
    """The application of ImageService."""
    from services.image import ImageService

    return _holding_models(ImageService, args)


BUILDERS: dict[str, Callable[[Any], "Application"]] = {
    "models": models, "chat": chat, "translation": translation, "image": image,
}  # fmt: skip


def applications(config: ServerConfig) -> dict[str, "Application"]:
    """The Serve applications by name: a service without models has none."""
    return {name: BUILDERS[name](args) for name, args in config.arguments().items()}


def _holding_models(service: type, args: ChatArgs | TranslationArgs | ImageArgs) -> "Application":
    bound, at_once = sum(m.bound for m in args.models.values()), sum(m.at_once for m in args.models.values())
    return _deployment(service, args, bound, at_once).bind(args.models, _device(args))


def _device(scale: Scale) -> str:
    return "cuda" if scale.gpus else "cpu"


def _deployment(service: type, args: Scale, bound: int, at_once: int) -> Any:
    """`bound` is how many requests a replica takes at the most, `at_once` how many of them do not wait."""
    from ray import serve

    return serve.deployment(
        **_replicas(args, at_once),
        max_ongoing_requests=bound + _SPARE_REQUESTS,  # Serve's default of 5 would starve the models' batches
        max_queued_requests=_SPARE_REQUESTS,
        ray_actor_options=_resources(args),
        health_check_period_s=2,
        graceful_shutdown_timeout_s=_DRAIN_S,
        # A folder that cannot be served now cannot be served a minute later; but a node may go while its replica loads.
        max_constructor_retry_count=3 if args.cpus else 1,
    )(service)


def _replicas(args: Scale, at_once: int) -> dict[str, Any]:
    """Of a number that may grow, Serve keeps as many as hold the requests of the last half minute without a queue."""
    if args.max_replicas is None:
        return {"num_replicas": args.replicas}
    bounds = {"min_replicas": args.replicas, "max_replicas": args.max_replicas}
    return {"autoscaling_config": {**bounds, "target_ongoing_requests": at_once}}


def _resources(args: Scale) -> dict[str, Any]:
    """Threads are said outright: Ray would derive them from num_cpus, and two full sets starve one another."""
    threads = args.threads or max(1, int(args.cpus))
    return {
        "num_cpus": args.cpus,
        "num_gpus": args.gpus or 0,
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}},
    }


@contextmanager
def running(config: ServerConfig, say: Callable[[str], None] = lambda text: None) -> Iterator[Server]:
    """A server that answers inside the block; after it no process or file is left.

    It joins the cluster that RAY_ADDRESS names, or starts one of its own on this machine, where `cpus` mean nothing and
    replicas that name no `gpus` share what there are. Raises ServerConfigError where the port is taken, a GPU is
    missing or a model cannot be loaded, and ServerStartError for whatever else keeps it from starting: the logs are
    then kept, and named.
    """
    _check_port(config.port)
    if not os.environ.get("RAY_ADDRESS"):
        config = config.sharing_one_machine()
    os.environ.update(ENVIRONMENT)
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # of this process: the replicas keep their logs
    scratch = tempfile.mkdtemp(prefix="chatforge-")  # Ray's sockets live there: their paths must stay short
    logs = "" if os.environ.get("RAY_ADDRESS") else f"{scratch}/session_latest/logs"
    failed = False
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        config = _start_ray(config, scratch)
        if logs:
            say(f"logs, until the server ends: {logs}")
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)  # Ray has put one there that aborts
        _deploy(config)
        yield Server(f"{HOST}:{config.port}", {service: _device(scale) for service, scale in config.scales.items()})
    except ServerStartError as error:
        failed = True
        where = f"the logs are kept in {logs}" if logs else "that cluster has the logs"
        raise ServerStartError(f"{error}; {where}") from None
    finally:
        if os.environ.get("RAY_ADDRESS") and ray.is_initialized():
            serve.shutdown()
        ray.shutdown()
        if not failed:
            shutil.rmtree(scratch, ignore_errors=True)


def _start_ray(config: ServerConfig, scratch: str) -> ServerConfig:
    """Joins or starts it; the config with the GPUs that a machine of our own has."""
    import ray
    from ray import serve

    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
        if running := ", ".join(serve.status().applications):
            ray.shutdown()
            raise ServerConfigError(
                f"RAY_ADDRESS: that cluster serves {running} already, which would be replaced, and deleted in the end; "
                "change it there by `serve deploy`, end it by `serve shutdown`, or unset RAY_ADDRESS"
            )
        return config
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=config.object_store_mb << 20,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address=HOST,
        _temp_dir=scratch,
        _metrics_export_port=config.metrics_port,
    )
    import torch

    # A torch without CUDA cannot use those that Ray sees.
    return on_gpus(config, int(ray.cluster_resources().get("GPU", 0)) if torch.cuda.is_available() else 0)


def _deploy(config: ServerConfig) -> None:
    from ray import serve
    from ray.serve.config import gRPCOptions

    serve.start(
        http_options={"host": HOST, "port": free_port()},  # Serve cannot do without; nothing is served there
        grpc_options=gRPCOptions(
            port=config.port,
            grpc_servicer_functions=servicer_functions(config.services),
            request_timeout_s=config.request_timeout_s,
        ),
        logging_config={"enable_access_log": False},
    )
    # The proxy knows an application by its route, even for gRPC.
    targets = [serve.RunTarget(app, name=name, route_prefix=f"/{name}") for name, app in applications(config).items()]
    try:
        serve.run_many(targets)
    except RuntimeError as error:
        raise _startup_error(error) from None


def _startup_error(error: RuntimeError) -> ServerConfigError | ServerStartError:
    """What a replica's constructor said, of a folder or else, without the traceback around it; or what Serve says."""
    from ray import serve

    running = serve.status().applications.values()
    said = "\n".join(text for app in running for text in (app.message, *(d.message for d in app.deployments.values())))
    if mistakes := re.findall(r"^(?:ValueError|\S*ServerConfigError): (.+)$", said, re.MULTILINE):
        return ServerConfigError(mistakes[-1])
    errors = re.findall(r"^\S*(?:Error|Exception)\b.*$", said, re.MULTILINE)
    return ServerStartError(f"no replica could start: {errors[-1] if errors else error}")


def _check_port(port: int) -> None:
    """Serve's proxy only logs that it cannot listen, so we try first: every interface, IPv4 and 6, as it does."""
    dual = socket.has_dualstack_ipv6()
    with socket.socket(socket.AF_INET6 if dual else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if dual:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ServerConfigError(f"port={port}: cannot be listened on ({error.strerror}); choose another") from None


def free_port() -> int:
    """A port that nobody listens on at this moment, below those that Linux gives to whoever asks for any."""
    for port in random.SystemRandom().sample(range(20_000, 32_768), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise ServerConfigError("none of 100 ports from 20000 to 32767 is free; end what listens there")
