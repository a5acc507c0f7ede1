"""Checks of what the manifests name in our code and in Ray: modules, commands, recipes, ports, versions, metrics."""

import ast
import functools
import importlib
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import typer
import yaml
from deploy_build import ROOT, Cluster, Object, Pod, at, clusters, name_of, of_kind, pods

from services.app import ENVIRONMENT
from services.proxy import APPLICATIONS
from services.serve_config import short_form
from services.strict import ServerConfigError
from training.config import ConfigError
from training.recipe import load_recipe

UsageError = typer.BadParameter.__bases__[0]  # typer's own copy of click's


def check_ray(objects: list[Object]) -> list[str]:
    """What KubeRay and Ray want, and no schema says."""
    found = [
        f"{name_of(item)} spec.{field}: must be {wanted!r}"
        for item in of_kind(objects, "RayService")
        for field, wanted in (("upgradeStrategy.type", "NewCluster"), ("excludeHeadPodFromServeSvc", True))
        if at(item, f"spec.{field}") != wanted
    ]
    for cluster in clusters(objects):
        found += [*_head_findings(cluster), *_group_findings(cluster)]
        for pod in cluster.pods:
            found += _hook_findings(pod)
        if cluster.kind == "RayService":
            found += [finding for _, pod in cluster.groups for finding in _readiness_findings(pod)]
    return found


def _head_findings(cluster: Cluster) -> Iterator[str]:
    if cluster.spec["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        yield f"{cluster.place}.headGroupSpec.rayStartParams.num-cpus: must be '0': the head runs no replicas"
    if _gpus(cluster.head.spec["containers"][0]):
        yield f"{cluster.place}.headGroupSpec.template: its GPU would be idle"


def _group_findings(cluster: Cluster) -> Iterator[str]:
    groups = {f"workerGroupSpecs[{i}]": group for i, (group, _) in enumerate(cluster.groups)}
    for path, group in groups.items():
        low, now, high = group["minReplicas"], group["replicas"], group["maxReplicas"]
        if not low <= now <= high or not (cluster.spec.get("enableInTreeAutoscaling") or low == now == high):
            yield f"{cluster.place}.{path}: minReplicas={low}, replicas={now}, maxReplicas={high} without an autoscaler"
    for path, group in {"headGroupSpec": cluster.spec["headGroupSpec"], **groups}.items():
        for name in group["rayStartParams"].keys() - _options_of("start"):
            yield f"{cluster.place}.{path}.rayStartParams.{name}: `ray start` has no such option"
        resources = group["template"]["spec"]["containers"][0]["resources"]
        if at(resources, "requests.memory") != at(resources, "limits.memory"):
            yield f"{cluster.place}.{path}.template: memory must be the same in requests and limits: Ray counts on it"


def _hook_findings(pod: Pod) -> Iterator[str]:
    """The `ray` commands of a preStop hook have the options that it gives them."""
    hook = " ".join(at(pod.spec["containers"][0], "lifecycle.preStop.exec").get("command", []))
    for command, options in re.findall(r"\bray ([a-z][a-z-]+)((?:[^\n|;&]|\\\n)*)", hook):
        for option in set(re.findall(r"--([a-z-]+)", options)) - _options_of(command):
            yield f"{pod.place}.spec.containers[0].lifecycle.preStop: `ray {command}` has no --{option}"
    grace = pod.spec.get("terminationGracePeriodSeconds", 30)
    if any(int(seconds) >= grace for seconds in re.findall(r"--deadline-remaining-seconds (\d+)", hook)):
        yield f"{pod.place}.spec.terminationGracePeriodSeconds: {grace} is less than its preStop hook gives Ray"


def _readiness_findings(pod: Pod) -> Iterator[str]:
    probe = at(pod.spec["containers"][0], "readinessProbe.exec").get("command", [])
    asks = f"http://localhost:{pod.ports.get('serve')}/-/healthz"
    if probe[:2] != ["bash", "-c"] or "wget" not in probe[-1] or asks not in probe[-1]:
        yield f"{pod.place}.spec.containers[0].readinessProbe: must ask Serve's proxy by bash and wget: {asks}"


@functools.cache
def _options_of(command: str) -> set[str]:
    """The long options of a command of Ray's; none of one that it does not have."""
    from ray.scripts.scripts import cli

    parameters = cli.commands[command].params if command in cli.commands else []
    return {name.lstrip("-") for option in parameters for name in option.opts}


def _gpus(container: Object) -> int:
    return int(at(container, "resources.limits").get("nvidia.com/gpu", 0))


# ---- versions


def check_versions(objects: list[Object]) -> list[str]:
    """Ray's version is that of constraints.txt, which is what the image holds; a pod with a GPU has CUDA's image."""
    pinned = _pinned("ray")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    found = []
    for cluster in clusters(objects):
        if cluster.spec["rayVersion"] != pinned:
            found.append(f"{cluster.place}.rayVersion: {cluster.spec['rayVersion']} is not constraints.txt's {pinned}")
        gpu = any(_gpus(c.spec) for pod in cluster.pods for c in pod.containers)
        wanted = f"chatforge:{version}-ray{pinned}-{'cuda' if gpu else 'cpu'}"
        submitter = f"{cluster.kind}/{cluster.name} spec.submitterPodTemplate"
        for pod in cluster.pods + [pod for pod in pods(objects) if pod.place == submitter]:
            for container in pod.containers:
                if container.spec["image"] != wanted:
                    found.append(f"{container.place}.image: {container.spec['image']!r} is not {wanted!r}")
    return found


def _pinned(package: str) -> str:
    constraints = (ROOT / "constraints.txt").read_text("utf-8")
    (version,) = re.findall(rf"^{package}==(\S+)$", constraints, re.MULTILINE)
    return version


# ---- the Serve config


def check_serve(objects: list[Object]) -> list[str]:
    """serveConfigV2 is what Serve and our code take, and the pods around it are those it needs."""
    found = []
    for item in of_kind(objects, "RayService"):
        place = f"{name_of(item)} spec.serveConfigV2"
        try:
            tree = yaml.safe_load(item["spec"]["serveConfigV2"])
            short_form(tree)
        except (ServerConfigError, yaml.YAMLError) as error:
            found += [f"{place}: {line}" for line in str(error).splitlines()]
            continue
        (cluster,) = clusters([item])
        found += [f"{place}: {text}" for text in _unimportable(tree)]
        found += [f"{place}: {text}" for text in _capacity(tree, cluster)]
        found += list(_around(tree, item, cluster, objects))
    return found


def _unimportable(tree: Object) -> Iterator[str]:
    names = [application["import_path"].replace(":", ".") for application in tree["applications"]]
    for name in names + tree["grpc_options"]["grpc_servicer_functions"]:
        module, _, attribute = name.rpartition(".")
        if not callable(getattr(importlib.import_module(module), attribute, None)):
            yield f"{name}: is nothing that can be called"


def _capacity(tree: Object, cluster: Cluster) -> Iterator[str]:
    """Every replica fits a worker, and all of them the most workers that there may be."""
    (group, pod), *_ = cluster.groups
    limits = pod.spec["containers"][0]["resources"]["limits"]
    worker = {"cpus": _cpus(limits["cpu"]), "gpus": float(limits.get("nvidia.com/gpu", 0))}
    needed = {"cpus": 0.0, "gpus": 0.0}
    for application in tree["applications"]:
        args, name = application["args"], application["name"]
        most = args.get("max_replicas", args.get("replicas", 1))
        if most > args.get("replicas", 1) and not cluster.spec.get("enableInTreeAutoscaling"):
            yield f"applications.{name}.args.max_replicas: nothing starts the pods for them: enableInTreeAutoscaling"
        if not args.get("cpus"):
            yield f"applications.{name}.args.cpus: must be above 0, or Ray may put replicas on the head"
        for resource in needed:
            if args.get(resource, 0) > worker[resource]:
                yield f"applications.{name}.args.{resource}: no worker has as many: {worker[resource]}"
            needed[resource] += most * args.get(resource, 0)
    for resource, amount in needed.items():
        if amount > group["maxReplicas"] * worker[resource]:
            yield f"applications: need {amount:g} {resource}, and {group['maxReplicas']} workers have less"


def _cpus(quantity: str) -> float:
    return float(quantity.removesuffix("m")) / 1000 if quantity.endswith("m") else float(quantity)


def _around(tree: Object, item: Object, cluster: Cluster, objects: list[Object]) -> Iterator[str]:
    ports = {"serve": tree["http_options"]["port"], "serve-grpc": tree["grpc_options"]["port"]}
    service = {port["name"]: port["port"] for port in item["spec"]["serveService"]["spec"]["ports"]}
    declared = [(f"{pod.place} ports", pod.ports) for pod in cluster.pods]
    for place, given in [*declared, (f"{name_of(item)} spec.serveService", service)]:
        for name, port in ports.items():
            if given.get(name) != port:
                yield f"{place}.{name}: {given.get(name)} is not serve.yaml's {port}"
    stream, delay = tree["grpc_options"]["request_timeout_s"], item["spec"]["rayClusterDeletionDelaySeconds"]
    if delay <= stream:
        yield f"{name_of(item)} spec.rayClusterDeletionDelaySeconds: {delay} cuts streams of up to {stream} s"
    (config,) = (i for i in of_kind(objects, "ConfigMap") if i["metadata"]["name"] == "serve")
    if config["data"]["serve.yaml"] != item["spec"]["serveConfigV2"]:
        yield f"{name_of(config)} data.serve.yaml: is not what {name_of(item)} has in serveConfigV2"
    folders = re.findall(r"model: (/[^],}\s]+)", item["spec"]["serveConfigV2"])
    for _, pod in cluster.groups:
        mounts = [mount["mountPath"] + "/" for mount in pod.spec["containers"][0].get("volumeMounts", [])]
        for folder in folders:
            if not folder.startswith(tuple(mounts)):
                yield f"{pod.place}.spec.containers[0].volumeMounts: no volume holds {folder}"


# ---- commands and recipes


def check_code(objects: list[Object]) -> list[str]:
    """Commands parse, recipes load and get the GPUs they ask for, the environment is what our code reads."""
    found = [finding for item in of_kind(objects, "RayJob") for finding in _job_findings(item)]
    for item in of_kind(objects, "ConfigMap"):
        if item["metadata"]["name"] == "environment":
            found += list(_environment_findings(item, objects))
    for pod in pods(objects):
        for container in pod.containers:
            if container.spec.get("command") == ["python", "-c"]:
                found += [f"{container.place}.args: {text}" for text in _strange_imports(container.spec["args"][0])]
    return found


def _job_findings(item: Object) -> Iterator[str]:
    place = f"{name_of(item)} spec.entrypoint"
    words = shlex.split(item["spec"]["entrypoint"])
    try:
        command, given = parse_command(words[3:])
        if [*words[:3], command] != ["python", "-m", "services.cli", "train"]:
            yield f"{place}: must be `python -m services.cli train ...`"
            return
        recipe = load_recipe(given["recipe"], list(given["set_"]))
    except (UsageError, ConfigError) as error:
        yield f"{place}: {error}"
        return
    told = {"chatforge_run": given["run"], "chatforge_recipe": given["recipe"]}
    if item["spec"]["metadata"] != told:
        yield f"{name_of(item)} spec.metadata: is not {told}, as the entrypoint has it"
    (cluster,) = clusters([item])
    gpus = sum(group["replicas"] * _gpus(pod.spec["containers"][0]) for group, pod in cluster.groups)
    wanted = recipe.worker_range[-1] if recipe.device == "cuda" else 0
    if gpus != wanted:
        yield f"{cluster.place}.workerGroupSpecs: have {gpus} GPUs; recipe {recipe.name} needs {wanted}"


def parse_command(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """The name of a chatforge command and its parameters; raises UsageError where it does not parse."""
    from services.cli import app

    group = typer.main.get_command(app)
    with group.make_context("chatforge", list(arguments)) as context:
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        if hasattr(command, "resolve_command"):  # a group of commands
            with command.make_context(name, rest, parent=context) as inner:
                name, command, rest = command.resolve_command(inner, [*inner._protected_args, *inner.args])
        return str(name), command.make_context(name, rest, parent=context).params


def _environment_findings(item: Object, objects: list[Object]) -> Iterator[str]:
    data = item["data"]
    for name, value in ENVIRONMENT.items():
        if data.get(name) != value:
            yield f"{name_of(item)} data.{name}: {data.get(name)!r} is not services.app's {value!r}"
    for name in data:
        if name.startswith("CHATFORGE_") and not re.search(rf"\b{name}\b", _sources()):
            yield f"{name_of(item)} data.{name}: nothing reads it"
    runs = data.get("CHATFORGE_RUNS", "")
    for cluster in clusters(objects):
        for pod in cluster.pods if cluster.kind != "RayService" else []:
            mounts = [mount["mountPath"] for mount in pod.spec["containers"][0].get("volumeMounts", [])]
            if runs.startswith("/") and runs not in mounts:
                yield f"{pod.place}.spec.containers[0].volumeMounts: none at CHATFORGE_RUNS={runs}"


@functools.cache
def _sources() -> str:
    """All of our Python."""
    files = [path for package in ("services", "training") for path in sorted((ROOT / package).rglob("*.py"))]
    return "\n".join(path.read_text("utf-8") for path in files)


def _strange_imports(code: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module:
            try:
                module = importlib.import_module(node.module)
            except ModuleNotFoundError as error:
                yield str(error)
                continue
            yield from (f"{node.module} has no {a.name}" for a in node.names if not hasattr(module, a.name))


# ---- the way in

_OF_THE_PROXY = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


def check_routes(objects: list[Object]) -> list[str]:
    """Each service's calls get the application that Serve knows it by."""
    found = []
    for route in of_kind(objects, "GRPCRoute"):
        named = {}
        for rule in route["spec"]["rules"]:
            headers = [h for f in rule.get("filters", []) for h in f["requestHeaderModifier"]["set"]]
            for match in rule["matches"]:
                named[match["method"]["service"]] = {header["name"]: header["value"] for header in headers}
        for service, application in APPLICATIONS.items():
            if named.get(service) != {"application": application}:
                found.append(f"{name_of(route)} spec.rules: {service} must get the header application: {application}")
        for strange in named.keys() - APPLICATIONS.keys() - _OF_THE_PROXY:
            found.append(f"{name_of(route)} spec.rules: nobody serves {strange}")
    return found


# ---- metrics

_OTHERS = {"kubelet_volume_stats_available_bytes", "kubelet_volume_stats_capacity_bytes"}  # Kubernetes' own
_METRIC = re.compile(r"\b((?:ray|kubelet)_[a-z_]+)\b")


def check_metrics(objects: list[Object], there: list[Object]) -> list[str]:
    """Every metric that an alert or a panel asks for is published, by us or by Ray."""
    found = []
    for rule in of_kind(objects, "PrometheusRule"):
        for group in rule["spec"]["groups"]:
            for i, alert in enumerate(group["rules"]):
                found += _strange_metrics(f"{name_of(rule)} {group['name']}.rules[{i}].expr", alert["expr"])
    for item in of_kind(objects, "ConfigMap"):
        if "grafana_dashboard" in item["metadata"].get("labels", {}):
            for name, text in item["data"].items():
                for panel in json.loads(text)["panels"]:
                    for target in panel["targets"]:
                        found += _strange_metrics(f"{name_of(item)} {name} panel {panel['title']!r}", target["expr"])
    if of_kind(there, "PrometheusRule") and not of_kind(there, "PodMonitor"):
        found.append("PodMonitor: none, and so no metric for the alerts")
    return found


def _strange_metrics(place: str, expression: str) -> list[str]:
    return [f"{place}: nobody publishes {name}" for name in _METRIC.findall(expression) if name not in published()]


@functools.cache
def published() -> frozenset[str]:
    """Names as Prometheus sees them: those of services/metrics.py, and those that Ray's own dashboards show."""
    folder = Path(ray.__file__).parent / "dashboard/modules/metrics/dashboards"
    names = {name for path in folder.glob("*.py") for name in _METRIC.findall(path.read_text("utf-8"))}
    suffixes = {"Gauge": [""], "Counter": ["_total"], "Histogram": ["_bucket", "_sum", "_count"]}
    for node in ast.walk(ast.parse((ROOT / "services/metrics.py").read_text("utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in suffixes:
            base = ast.literal_eval(node.args[0])
            names |= {f"ray_{base}{suffix}" for suffix in suffixes[node.func.id]}
    return frozenset(names | _OTHERS)
