"""Builds the Serve applications of one server config, and runs them: one application per gRPC service."""

import logging
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from services.config import ServerConfig, ServerConfigError
from services.transport import MAX_MESSAGE_BYTES

HOST = "127.0.0.1"

# Read by Ray's processes when they start.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # by default 15: any other program on the machine would starve the replicas
    "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(MAX_MESSAGE_BYTES),
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
}
# What Serve keeps beyond the models' own bounds, so that the model says no and not Serve, whose words are less plain.
_SPARE_REQUESTS = 16


def applications(config: ServerConfig) -> dict[str, Any]:
    """The Serve applications by name: a service without models has none."""
    from ray import serve

    from services.models import ModelService

    models = serve.deployment(
        max_ongoing_requests=100,
        max_queued_requests=100,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=1,
    )(ModelService)
    made = {"models": models.bind(config.services)}
    if config.chat:
        from services.chat import ChatService

        answers = sum(m.max_num_seqs + m.max_waiting for m in config.chat.values())
        made["chat"] = _application(ChatService, config, config.chat, answers)
    if config.translation:
        from services.translation import TranslationService

        # A sentence is a token at least.
        sentences = sum(m.max_batch_tokens + m.max_waiting for m in config.translation.values())
        made["translation"] = _application(TranslationService, config, config.translation, sentences)
    if config.image:
        from services.image import ImageService

        # A request is an image at least.
        images = sum(m.max_batch + m.max_waiting for m in config.image.values())
        made["image"] = _application(ImageService, config, config.image, images)
    return made


def _application(service: type, config: ServerConfig, models: Mapping[str, Any], bound: int) -> Any:
    """The application of a service that holds models; `bound` is how many requests they take at once, at the most."""
    from ray import serve

    deployment = serve.deployment(
        num_replicas=config.replicas,
        max_ongoing_requests=bound + _SPARE_REQUESTS,  # Serve's default of 5 would starve the models' batches
        max_queued_requests=_SPARE_REQUESTS,
        ray_actor_options=_resources(config),
        health_check_period_s=2,
        graceful_shutdown_timeout_s=5,
        max_constructor_retry_count=1,  # a folder that cannot be served now cannot be served a minute later
    )(service)
    # A replica may run elsewhere: paths are made absolute where they were given.
    held = {name: m.model_copy(update={"model": str(m.folder.resolve())}) for name, m in models.items()}
    return deployment.bind(held, "cuda" if config.gpus_per_replica else "cpu")


def _resources(config: ServerConfig) -> dict[str, Any]:
    """Threads are said outright: Ray would derive them from num_cpus, and two full sets starve one another."""
    replicas = config.replicas * len(config.services)
    threads = config.threads or max(1, len(os.sched_getaffinity(0)) // replicas)
    return {
        "num_cpus": 0,
        "num_gpus": config.gpus_per_replica,
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}},
    }


@contextmanager
def running(config: ServerConfig) -> Iterator[str]:
    """A server that answers inside the block, at the address it yields; after it no process or file is left.

    It joins the cluster that RAY_ADDRESS names, or starts one of its own. Raises ServerConfigError where the port is
    taken or a model cannot be loaded.
    """
    _check_port(config.port)
    os.environ.update(_ENVIRONMENT)
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # of this process: the replicas keep their logs
    scratch = tempfile.mkdtemp(prefix="chatforge-")  # Ray's sockets live there: their paths must stay short
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        _start_ray(config, scratch)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)  # Ray has put one there that aborts
        _deploy(config)
        yield f"{HOST}:{config.port}"
    finally:
        if os.environ.get("RAY_ADDRESS") and ray.is_initialized():
            serve.shutdown()
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


def _start_ray(config: ServerConfig, scratch: str) -> None:
    import ray

    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
        return
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


def _deploy(config: ServerConfig) -> None:
    from ray import serve
    from ray.serve.config import gRPCOptions

    serve.start(
        http_options={"host": HOST, "port": free_port()},  # Serve cannot do without; nothing is served there
        grpc_options=gRPCOptions(
            port=config.port,
            grpc_servicer_functions=_servicer_functions(config),
            request_timeout_s=config.request_timeout_s,
        ),
        logging_config={"enable_access_log": False},
    )
    # The proxy knows an application by its route, even for gRPC.
    targets = [serve.RunTarget(app, name=name, route_prefix=f"/{name}") for name, app in applications(config).items()]
    try:
        serve.run_many(targets)
    except RuntimeError as error:
        raise _startup_error() or error from None


def _servicer_functions(config: ServerConfig) -> list[str]:
    """Those of the services that there are; that of health comes last, since it looks at the others."""
    return [f"services.proxy.add_{name}_service" for name in (*config.services, "model", "health")]


def _startup_error() -> ServerConfigError | None:
    """What a replica's constructor said of a folder, without the traceback around it."""
    from ray import serve

    said = [d.message for app in serve.status().applications.values() for d in app.deployments.values()]
    found = re.findall(r"^(?:ValueError|\S*ServerConfigError): (.+)$", "\n".join(said), re.MULTILINE)
    return ServerConfigError(found[-1]) if found else None


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
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
