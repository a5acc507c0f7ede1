"""Schemas, as strict as the API server's, of every object that the manifests hold.

Kubernetes' own kinds are checked by kubernetes-validate's copies of its OpenAPI; those of KubeRay 1.6.2, of the Gateway
API 1, of Envoy Gateway and of the Prometheus operator by the models below, which have the fields that we use and no
others: a field that is not here is a mistake, or one to look up and add. Pod templates are checked as Pods.
"""

import functools
import json
from typing import Annotated, Any, Literal

import importlib_resources
from deploy_build import Object, Pod, at, name_of, pods
from jsonschema import Draft202012Validator
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from referencing import Registry, Resource

KUBERNETES = "1.32"  # the oldest that the manifests are held against

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
Port = Annotated[int, Field(gt=0, lt=65536)]
Count = Annotated[int, Field(ge=0)]
Duration = Annotated[str, Field(pattern=r"^([0-9]{1,5}(h|m|s|ms)){1,4}$")]
Strings = dict[str, str]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(_Strict):
    name: Name
    namespace: Name | None = None
    labels: Strings = {}
    annotations: Strings = {}


# ---- KubeRay


class RayName(Metadata):
    name: Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=47)]  # a DNS-1035 label


class Auth(_Strict):
    mode: Literal["token"]


class Redis(_Strict):
    redisAddress: str
    redisPassword: dict[Literal["valueFrom"], Any]


class Autoscaler(_Strict):
    version: Literal["v2"]
    idleTimeoutSeconds: Count
    resources: dict[str, Any]
    securityContext: dict[str, Any]


class Head(_Strict):
    rayStartParams: Strings
    template: dict[str, Any]


class Workers(_Strict):
    groupName: Name
    replicas: Count
    minReplicas: Count
    maxReplicas: Count
    rayStartParams: Strings
    template: dict[str, Any]


class ClusterSpec(_Strict):
    rayVersion: str
    authOptions: Auth
    headGroupSpec: Head
    workerGroupSpecs: Annotated[list[Workers], Field(min_length=1)]
    gcsFaultToleranceOptions: Redis | None = None
    enableInTreeAutoscaling: bool | None = None
    autoscalerOptions: Autoscaler | None = None
    suspend: bool | None = None


class JobSpec(_Strict):
    entrypoint: str
    metadata: Strings
    backoffLimit: Count
    preRunningDeadlineSeconds: Annotated[int, Field(ge=1)]
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: Count
    submitterPodTemplate: dict[str, Any]
    rayClusterSpec: ClusterSpec


class ServePort(_Strict):
    name: str
    port: Port
    appProtocol: str | None = None


class ServeService(_Strict):
    class Spec(_Strict):
        ports: list[ServePort]

    metadata: Metadata
    spec: Spec


class Upgrade(_Strict):
    type: Literal["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]


class ServiceSpec(_Strict):
    serveConfigV2: str
    upgradeStrategy: Upgrade
    rayClusterDeletionDelaySeconds: Count
    excludeHeadPodFromServeSvc: bool
    serveService: ServeService
    rayClusterConfig: ClusterSpec


# ---- Gateway API, Envoy Gateway


class GatewayClassSpec(_Strict):
    controllerName: Annotated[str, Field(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9/._-]+$")]


class SecretRef(_Strict):
    kind: Literal["Secret"]
    name: Name


class Tls(_Strict):
    mode: Literal["Terminate"]
    certificateRefs: Annotated[list[SecretRef], Field(min_length=1)]


class AllowedRoutes(_Strict):
    namespaces: dict[Literal["from"], Literal["Same"]]
    kinds: list[dict[Literal["kind"], Literal["GRPCRoute"]]]


class Listener(_Strict):
    name: Name
    protocol: Literal["HTTPS"]
    port: Port
    hostname: Name
    tls: Tls
    allowedRoutes: AllowedRoutes


class GatewaySpec(_Strict):
    gatewayClassName: Name
    listeners: Annotated[list[Listener], Field(min_length=1)]


class Method(_Strict):
    service: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z_0-9.]*$")]
    method: str | None = None


class Match(_Strict):
    method: Method


class Header(_Strict):
    name: Name
    value: Annotated[str, Field(min_length=1)]


class HeaderModifier(_Strict):
    set: list[Header]


class Filter(_Strict):
    type: Literal["RequestHeaderModifier"]
    requestHeaderModifier: HeaderModifier


class Backend(_Strict):
    name: Name
    port: Port


class Rule(_Strict):
    matches: Annotated[list[Match], Field(min_length=1)]
    filters: list[Filter] = []
    backendRefs: Annotated[list[Backend], Field(min_length=1)]


class ParentRef(_Strict):
    name: Name
    sectionName: Name


class RouteSpec(_Strict):
    parentRefs: list[ParentRef]
    hostnames: list[Name]
    rules: Annotated[list[Rule], Field(min_length=1, max_length=16)]


class TargetRef(_Strict):
    group: Literal["gateway.networking.k8s.io"]
    kind: Literal["GRPCRoute"]
    name: Name


class HttpTimeout(_Strict):
    requestTimeout: Duration


class TrafficPolicySpec(_Strict):
    targetRefs: list[TargetRef]
    timeout: dict[Literal["http"], HttpTimeout]


# ---- Prometheus operator


class Relabeling(_Strict):
    sourceLabels: list[Annotated[str, Field(pattern=r"^[a-zA-Z_][a-zA-Z0-9_]*$")]]
    targetLabel: str


class MetricsEndpoint(_Strict):
    port: str
    interval: Duration
    relabelings: list[Relabeling] = []


class Selector(_Strict):
    matchLabels: Annotated[Strings, Field(min_length=1)]


class PodMonitorSpec(_Strict):
    selector: Selector
    podMetricsEndpoints: Annotated[list[MetricsEndpoint], Field(min_length=1)]


class Alert(_Strict):
    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=False)

    alert: str
    expr: str
    for_: Annotated[Duration, Field(alias="for")]
    labels: dict[Literal["severity"], Literal["critical", "warning"]]
    annotations: dict[Literal["summary", "runbook"], str]


class AlertGroup(_Strict):
    name: str
    rules: Annotated[list[Alert], Field(min_length=1)]


class RuleSpec(_Strict):
    groups: list[AlertGroup]


# apiVersion, metadata and spec of every kind that Kubernetes itself does not have.
CUSTOM: dict[str, tuple[str, type[Metadata], type[_Strict]]] = {
    "RayCluster": ("ray.io/v1", RayName, ClusterSpec),
    "RayJob": ("ray.io/v1", RayName, JobSpec),
    "RayService": ("ray.io/v1", RayName, ServiceSpec),
    "GatewayClass": ("gateway.networking.k8s.io/v1", Metadata, GatewayClassSpec),
    "Gateway": ("gateway.networking.k8s.io/v1", Metadata, GatewaySpec),
    "GRPCRoute": ("gateway.networking.k8s.io/v1", Metadata, RouteSpec),
    "BackendTrafficPolicy": ("gateway.envoyproxy.io/v1alpha1", Metadata, TrafficPolicySpec),
    "PodMonitor": ("monitoring.coreos.com/v1", Metadata, PodMonitorSpec),
    "PrometheusRule": ("monitoring.coreos.com/v1", Metadata, RuleSpec),
}


def check_schemas(objects: list[Object]) -> list[str]:
    """Every object against its kind's schema, every pod template as a Pod."""
    found = [finding for item in objects for finding in _object_findings(item)]
    found += [finding for pod in pods(objects) for finding in _pod_findings(pod)]
    return found + [finding for item in objects for finding in _autoscaler_findings(item)]


def _object_findings(item: Object) -> list[str]:
    if item.get("kind") not in CUSTOM:
        return _native_findings(item, name_of(item))
    version, metadata, spec = CUSTOM[item["kind"]]
    strange = item.keys() - {"apiVersion", "kind", "metadata", "spec"}
    found = [f"{name_of(item)} {key}: no such field" for key in strange]
    if item.get("apiVersion") != version:
        found.append(f"{name_of(item)} apiVersion: {item.get('apiVersion')!r} is not {version!r}")
    for key, model in (("metadata", metadata), ("spec", spec)):
        try:
            model.model_validate(item.get(key))
        except ValidationError as error:
            found += [f"{name_of(item)} {_path(key, e['loc'])}: {e['msg']}" for e in error.errors()]
    return found


def _pod_findings(pod: Pod) -> list[str]:
    metadata = {"name": "pod", **pod.template.get("metadata", {})}
    strange = pod.template.keys() - {"metadata", "spec"}
    found = [f"{pod.place}.{key}: no such field" for key in strange]
    whole = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod.spec}
    return found + _native_findings(whole, pod.place)


def _autoscaler_findings(item: Object) -> list[str]:
    """The container that KubeRay puts beside the head."""
    for path in ("spec.autoscalerOptions", "spec.rayClusterConfig.autoscalerOptions"):
        if options := at(item, path):
            fields = {key: options.get(key, {}) for key in ("resources", "securityContext")}
            container = {"name": "autoscaler", "image": "ray", **fields}
            template = {"spec": {"containers": [container]}}
            return _pod_findings(Pod(f"{name_of(item)} {path}", template, {}))
    return []


def _native_findings(item: Object, place: str) -> list[str]:
    group, _, version = item.get("apiVersion", "").rpartition("/")
    validator = _validator(item.get("kind", ""), f"{group.split('.')[0]}-{version}" if group else version)
    if validator is None:
        return [f"{place}: Kubernetes {KUBERNETES} has no {item.get('apiVersion')} {item.get('kind')}"]
    errors = sorted(validator.iter_errors(item), key=lambda error: list(map(str, error.absolute_path)))
    return [f"{place} {_path('', tuple(error.absolute_path))}: {error.message}" for error in errors]


@functools.cache
def _validator(kind: str, version: str) -> Draft202012Validator | None:
    """As kubernetes_validate.validate(strict=True) makes one at every call, and reads 15 MB of JSON for it."""
    schema = _schemas() / f"{kind.lower()}-{version}.json"
    if not schema.is_file():
        return None
    return Draft202012Validator(json.loads(schema.read_text()), registry=_definitions())


@functools.cache
def _definitions() -> Registry:
    text = (_schemas() / "_definitions.json").read_text()
    resource = Resource.from_contents(json.loads(text))
    return resource @ Registry()


def _schemas() -> Any:
    folder = f"kubernetes-json-schema/v{KUBERNETES}.0-local-strict"
    return importlib_resources.files("kubernetes_validate").joinpath(folder)


def _path(root: str, parts: tuple[Any, ...]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return (root + text).strip(".")
