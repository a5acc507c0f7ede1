"""Reads a config of Ray Serve, the one that a cluster is given, as a server's config.

    proxy_location: EveryNode
    http_options: {host: 0.0.0.0, port: 8000}
    grpc_options:
      port: 9000
      request_timeout_s: 600
      grpc_servicer_functions: # one for each application, in any order, then these two
      - services.proxy.add_chat_service
      - services.proxy.add_model_service
      - services.proxy.add_health_service
    logging_config: {enable_access_log: false}
    applications:
    - {name: models, route_prefix: /models, import_path: "services.app:models",
       args: {services: {chat: [assistant]}, cpus: 0.1}}
    - {name: chat, route_prefix: /chat, import_path: "services.app:chat",
       args: {models: {assistant: {model: /models/assistant}}, replicas: 2, max_replicas: 8, cpus: 4, gpus: 1}}

The names of the applications are fixed: models, chat, translation and image. Their `args` are services.config's
ModelsArgs, ChatArgs, TranslationArgs and ImageArgs, which hold all that a deployment may be told: `replicas`,
`max_replicas`, and `threads`, `cpus` and `gpus` per replica. With `max_replicas` Serve keeps as many replicas as answer
the requests of the last half minute without a queue. A replica with `cpus: 0` may be put on any node, a head with
`num-cpus: 0` included; one with more goes where they are free. A replica uses one GPU at most: `gpus: 1` has one to
itself, two with `gpus: 0.5` may share one.

On a cluster the replica looks at its model's folder when it starts, and every node has services.app.ENVIRONMENT in its
environment. `chatforge serve FILE` looks at the folders first, and starts all of it on one machine: `cpus` mean nothing
there, nor do proxy_location, http_options and logging_config, and services that name no `gpus` share the machine's.
"""

from collections.abc import Iterable
from typing import Any, Literal

from services.address import DEFAULT_PORT
from services.config import SERVICE_ARGS, ModelsArgs, Scale, Service
from services.strict import ServerConfigError, Strict, nearest, validated

_ARGS: dict[str, type[Scale]] = {"models": ModelsArgs, **SERVICE_ARGS}


class _Http(Strict):
    host: str = "0.0.0.0"
    port: int = 8000


class _Grpc(Strict):
    port: int = DEFAULT_PORT
    request_timeout_s: float  # Serve would let a request without one hold its place for ever
    grpc_servicer_functions: list[str]


class _Logging(Strict):
    encoding: Literal["TEXT", "JSON"] = "TEXT"
    log_level: str = "INFO"
    enable_access_log: bool = True


class _Application(Strict):
    name: Literal[Service, "models"]
    import_path: str
    route_prefix: str
    args: dict[str, Any]


class _Document(Strict):
    """Serve's own schema would pass over a key that it does not know."""

    applications: list[_Application]
    grpc_options: _Grpc
    proxy_location: Literal["EveryNode", "HeadOnly"] = "EveryNode"
    http_options: _Http = _Http()
    logging_config: _Logging = _Logging()


def servicer_functions(services: Iterable[str]) -> list[str]:
    """Those for Serve's proxy; that of health comes last, since it looks at the others."""
    return [f"services.proxy.add_{name}_service" for name in (*services, "model", "health")]


def short_form(tree: dict[str, Any]) -> dict[str, Any]:
    """The document as a tree of ServerConfig.

    Raises ServerConfigError with the key, the value and the valid one.
    """
    document = validated(_Document, tree)
    args: dict[str, dict[str, Any]] = {}
    for application in document.applications:
        _check(application)
        if application.name in args:
            raise ServerConfigError(f"applications: {application.name!r} is there twice; leave one")
        args[application.name] = application.args
    models = {service: args[service]["models"] for service in SERVICE_ARGS if service in args}
    _check_listed(args, {service: sorted(held) for service, held in models.items()})
    grpc = document.grpc_options
    _check_servicers(grpc.grpc_servicer_functions, servicer_functions(models))
    scale = {name: {k: v for k, v in given.items() if k in Scale.model_fields} for name, given in args.items()}
    return {**models, "scale": scale, "port": grpc.port, "request_timeout_s": grpc.request_timeout_s}


def _check(application: _Application) -> None:
    at, name = f"applications.{application.name}", application.name
    for key, given, valid in (
        ("import_path", application.import_path, f"services.app:{name}"),
        ("route_prefix", application.route_prefix, f"/{name}"),  # Serve's proxy finds it by that, even for gRPC
    ):
        if given != valid:
            raise ServerConfigError(f"{at}.{key}={given!r}: must be {valid!r}")
    validated(_ARGS[name], application.args, f"{at}.args.")


def _check_listed(args: dict[str, dict[str, Any]], services: dict[str, list[str]]) -> None:
    if "models" not in args:
        raise ServerConfigError(f"applications: has none called 'models'; add it with services={services}")
    listed = args["models"]["services"]
    if {service: sorted(names) for service, names in listed.items()} != services:
        raise ServerConfigError(
            f"applications.models.args.services={listed}: the other applications hold {services}; say the same"
        )


def _check_servicers(given: list[str], needed: list[str]) -> None:
    at = "grpc_options.grpc_servicer_functions"
    if strange := [function for function in given if function not in needed]:
        raise ServerConfigError(
            f"{at}={strange[0]!r}: belongs to no application here; valid: {', '.join(needed)}"
            f"{nearest(strange[0], needed)}"
        )
    if missing := [function for function in needed if function not in given]:
        raise ServerConfigError(f"{at}: lacks {missing[0]!r}, without which its service is not served")
    if given[-1] != needed[-1]:
        raise ServerConfigError(f"{at}={given[-1]!r}: {needed[-1]!r} must be the last, since it looks at the others")
