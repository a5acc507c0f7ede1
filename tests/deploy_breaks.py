"""A table of what can be broken in the manifests, each with the words of the finding that must name its place."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deploy_build import Object, name_of

LAPTOP, GPU, S3 = "overlays/laptop", "overlays/gpu", "overlays/s3"
TINY, GPT3 = "train/tiny", "train/gpt3-6.7b"
GONE = object()


@dataclass(frozen=True)
class Break:
    """One thing that is made wrong in what a folder builds."""

    what: str
    folder: str
    item: str  # Kind/name
    at: str  # a JSON pointer; empty: the whole object
    value: Any  # what stands there instead, or GONE; a function gets what stood there
    found: str

    def of(self, objects: list[Object]) -> list[Object]:
        """The objects, with this one wrong."""
        (item,) = (item for item in objects if name_of(item) == self.item)
        if not self.at:
            return [other for other in objects if other is not item]
        *parents, last = [part.replace("~1", "/") for part in self.at.split("/")[1:]]
        node: Any = item
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node[part]
        key = int(last) if isinstance(node, list) else last
        if self.value is GONE:
            del node[key]
        else:
            node[key] = self.value(node[key]) if callable(self.value) else copy.deepcopy(self.value)
        return objects


def _swap(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return change


def _breaks(folder: str, item: str, *rows: tuple[str, str, Any, str], at: str = "") -> list[Break]:
    return [Break(what, folder, item, at + path, value, found) for what, path, value, found in rows]


_HEAD, _WORKER = "/headGroupSpec/template/spec", "/workerGroupSpecs/0/template/spec"
_RAYS_OWN_PROBE = {"httpGet": {"path": "/api/healthz", "port": 52365}}
_BOTH_WITH_GPU = {kind: {"cpu": "2", "memory": "8Gi", "nvidia.com/gpu": "1"} for kind in ("requests", "limits")}

BREAKS = [
    *_breaks(
        LAPTOP,
        "RayCluster/interactive",
        ("typo in a field", "/spec/rayVersoin", "2.60.0", "RayCluster/interactive spec.rayVersoin"),
        ("field missing", "/spec/rayVersion", GONE, "RayCluster/interactive spec.rayVersion"),
        ("another Ray version", "/spec/rayVersion", "2.59.0", "RayCluster/interactive spec.rayVersion"),
        ("number for a string", "/spec/headGroupSpec/rayStartParams/num-cpus", 0, "headGroupSpec.rayStartParams"),
        ("unknown start option", "/spec/headGroupSpec/rayStartParams/num_cpus", "0", "rayStartParams.num_cpus"),
        ("no autoscaler for a range", "/spec/workerGroupSpecs/0/maxReplicas", 4, "spec.workerGroupSpecs[0]"),
        ("a second cluster's name", "/metadata/name", "chatforge", "RayCluster/chatforge metadata.name"),
    ),
    *_breaks(
        LAPTOP,
        "RayCluster/interactive",
        ("typo in a container", "/imagePullPolicyy", "Always", "headGroupSpec.template spec.containers[0]"),
        ("may gain rights", "/securityContext/allowPrivilegeEscalation", True, "allowPrivilegeEscalation"),
        ("long port name", "/ports/0/name", "global-control-store", "containers[0].ports[0].name"),
        ("probe path", "/readinessProbe/httpGet/path", "/api/health", "containers[0].readinessProbe"),
        ("probe port", "/livenessProbe/httpGet/port", 52366, "containers[0].livenessProbe"),
        ("no ConfigMap of the name", "/envFrom/0/configMapRef/name", "environmnt", "containers[0].envFrom[0]"),
        at=f"/spec{_HEAD}/containers/0",
    ),
    *_breaks(
        LAPTOP,
        "RayCluster/interactive",
        ("no memory limit", "/resources/limits/memory", GONE, "containers[0].resources.limits.memory"),
        ("more memory than asked for", "/resources/limits/memory", "8Gi", "workerGroupSpecs[0].template: memory"),
        ("mount of no volume", "/volumeMounts/0/name", "run", "containers[0].volumeMounts[0].name"),
        at=f"/spec{_WORKER}/containers/0",
    ),
    *_breaks(
        LAPTOP,
        "RayService/chatforge",
        ("wrong apiVersion", "/apiVersion", "ray.io/v1alpha1", "RayService/chatforge apiVersion"),
        ("unknown upgrade", "/spec/upgradeStrategy/type", "Rolling", "spec.upgradeStrategy.type"),
        ("upgrade of HTTP alone", "/spec/upgradeStrategy/type", "NewClusterWithIncrementalUpgrade", "spec.upgradeSt"),
        ("old cluster gone early", "/spec/rayClusterDeletionDelaySeconds", 600, "spec.rayClusterDeletionDelaySec"),
        ("head in the serve Service", "/spec/excludeHeadPodFromServeSvc", False, "spec.excludeHeadPodFromServeSvc"),
        ("another Service port", "/spec/serveService/spec/ports/1/port", 9001, "spec.serveService.serve-grpc"),
    ),
    *_breaks(
        LAPTOP,
        "RayService/chatforge",
        ("one Redis namespace for two", "/gcsFaultToleranceOptions/externalStorageNamespace", "x", "externalStorageN"),
        ("replicas on the head", "/headGroupSpec/rayStartParams/num-cpus", "2", "rayStartParams.num-cpus"),
        ("may be root", f"{_HEAD}/securityContext/runAsNonRoot", False, "headGroupSpec.template.spec.securityContext"),
        ("no serve port on the head", f"{_HEAD}/containers/0/ports/4", GONE, "headGroupSpec.template ports.serve"),
        ("node's network", f"{_WORKER}/hostNetwork", True, "workerGroupSpecs[0].template.spec.hostNetwork"),
        ("no CPU request", f"{_WORKER}/initContainers/0/resources/requests/cpu", GONE, "resources.requests.cpu"),
        at="/spec/rayClusterConfig",
    ),
    *_breaks(
        LAPTOP,
        "RayService/chatforge",
        ("another gRPC port", "/ports/2/containerPort", 9001, "workerGroupSpecs[0].template ports.serve-grpc"),
        ("tag of another image", "/image", "chatforge:0.1.0-ray2.59.0-cpu", "template.spec.containers[0].image"),
        ("privileged", "/securityContext/privileged", True, "containers[0].securityContext.privileged"),
        ("is root", "/securityContext/runAsUser", 0, "containers[0].securityContext: must not be root"),
        ("probe without Serve", "/readinessProbe", _RAYS_OWN_PROBE, "containers[0].readinessProbe: must ask Serve"),
        at=f"/spec/rayClusterConfig{_WORKER}/containers/0",
    ),
    *_breaks(
        LAPTOP,
        "RayService/chatforge",
        ("import path", "", _swap("services.app:chat", "services.app:chatt"), "applications.chat.import_path"),
        ("servicer function", "", _swap("add_chat_service", "add_chat_servicer"), "grpc_servicer_functions"),
        ("unknown argument", "", _swap("threads: 1", "thread: 1"), "applications.chat.args.thread"),
        ("unknown key of Serve's", "", _swap("proxy_location", "proxy_locations"), "serveConfigV2: proxy_locations"),
        ("streams above the delay", "", _swap("timeout_s: 600", "timeout_s: 900"), "rayClusterDeletionDelaySeconds"),
        ("Serve on another port", "", _swap("port: 9000", "port: 9001"), "template ports.serve-grpc"),
        ("models on no volume", "", _swap("/models/tiny", "/weights/tiny"), "no volume holds /weights/tiny"),
        ("no CPU, so on the head", "", _swap("cpus: 0.8", "cpus: 0"), "applications.chat.args.cpus"),
        ("replica larger than a worker", "", _swap("cpus: 0.8", "cpus: 8"), "applications.chat.args.cpus"),
        ("more replicas than room", "", _swap("cpus: 0.8", "replicas: 3, cpus: 0.8"), "applications: need"),
        ("no YAML", "", _swap("applications:", "applications: ["), "spec.serveConfigV2"),
        at="/spec/serveConfigV2",
    ),
    *_breaks(LAPTOP, "PersistentVolumeClaim/runs", ("no claim", "", GONE, "no PersistentVolumeClaim 'runs'")),
    *_breaks(
        LAPTOP,
        "ConfigMap/environment",
        ("no environment", "", GONE, "no ConfigMap 'environment'"),
        ("another namespace", "/metadata/namespace", "default", "ConfigMap/environment metadata.namespace"),
        ("variable's value", "/data/RAY_worker_niceness", "15", "ConfigMap/environment data.RAY_worker_niceness"),
        ("variable that nobody reads", "/data/CHATFORGE_RUN", "/runs", "ConfigMap/environment data.CHATFORGE_RUN"),
        ("runs on no volume", "/data/CHATFORGE_RUNS", "/data", "none at CHATFORGE_RUNS=/data"),
    ),
    *_breaks(
        LAPTOP,
        "ConfigMap/serve",
        ("a second Serve config", "/data/serve.yaml", _swap("8000", "8001"), "ConfigMap/serve data.serve.yaml"),
    ),
    *_breaks(
        LAPTOP,
        "StatefulSet/redis",
        ("no fixed tag", "/image", "redis:latest", "StatefulSet/redis spec.template.spec.containers[0].image"),
        ("keeps capabilities", "/securityContext/capabilities", GONE, "securityContext.capabilities.drop"),
        ("no such key", "/env/0/valueFrom/secretKeyRef/key", "pass", "spec.containers[0].env[0].secretKeyRef"),
        at="/spec/template/spec/containers/0",
    ),
    *_breaks(
        LAPTOP,
        "Service/redis",
        ("typo in a native kind", "/spec/ports/0/targetport", 6379, "Service/redis spec.ports[0]"),
        ("Redis on another port", "/spec/ports/0/port", 6380, "gcsFaultToleranceOptions.redisAddress"),
        ("Service's selector", "/spec/selector/app.kubernetes.io~1component", "rediss", "Service/redis spec.selector"),
    ),
    *_breaks(
        LAPTOP,
        "Service/grpc",
        ("unknown kind", "/kind", "Servce", "has no v1 Servce"),
        ("Service's target", "/spec/ports/0/targetPort", "serve-grcp", "Service/grpc spec.ports[0].targetPort"),
    ),
    *_breaks(
        LAPTOP,
        "PodDisruptionBudget/serving",
        ("no budget", "", GONE, "RayService/chatforge spec.rayClusterConfig: has no PodDisruptionBudget"),
        ("budget in percent", "/spec/minAvailable", "50%", "PodDisruptionBudget/serving spec.minAvailable"),
        ("budget's selector", "/spec/selector/matchLabels/ray.io~1node-type", "wrker", "serving spec.selector"),
    ),
    *_breaks(LAPTOP, "NetworkPolicy/deny-all", ("nothing denied", "", GONE, "NetworkPolicy: none denies")),
    *_breaks(LAPTOP, "NetworkPolicy/operator", ("operator kept out", "", GONE, "lets KubeRay reach port 8265")),
    *_breaks(
        LAPTOP,
        "NetworkPolicy/serving",
        ("everyone let in", "/spec/ingress/1/from", [{"podSelector": {}}], "spec.ingress[1]: lets everyone in"),
        ("closed port opened", "/spec/ingress/1/ports/0/port", 9001, "NetworkPolicy/serving spec.ingress[1]: nobody"),
        ("Ray's ports closed", "/spec/ingress/0/ports", [{"port": 9000}], "no NetworkPolicy opens all ports"),
        ("policy of no pod", "/spec/podSelector/matchLabels/app.kubernetes.io~1component", "serve", "spec.podSelector"),
    ),
    *_breaks(
        GPU,
        "RayService/chatforge",
        ("autoscaler off", "/spec/rayClusterConfig/enableInTreeAutoscaling", False, "applications.chat.args.max_repl"),
        ("autoscaler's field", "/spec/rayClusterConfig/autoscalerOptions/resources/limit", {}, "autoscalerOptions"),
        ("GPU on the head", f"/spec/rayClusterConfig{_HEAD}/containers/0/resources", _BOTH_WITH_GPU, "its GPU would"),
        ("HTTP/1.1 to gRPC", "/spec/serveService/spec/ports/1/appProtocol", GONE, "spec.rules[0].backendRefs"),
    ),
    *_breaks(
        GPU,
        "RayCluster/interactive",
        ("CPU image on a GPU", "/image", "chatforge:0.1.0-ray2.60.0-cpu", "spec.containers[0].image"),
        ("GPU limit alone", "/resources/requests/nvidia.com~1gpu", GONE, "containers[0].resources: nvidia.com/gpu"),
        at=f"/spec{_WORKER}/containers/0",
    ),
    *_breaks(
        GPU,
        "GRPCRoute/chatforge",
        ("no header on a route", "/rules/0/filters", GONE, "chatforge.v1.ChatService must get the header"),
        ("another application", "/rules/2/filters/0/requestHeaderModifier/set/0/value", "chat", "v1.ImageService must"),
        ("header that is added", "/rules/0/filters/0/requestHeaderModifier/add", [], "requestHeaderModifier.add"),
        ("no such service", "/rules/1/matches/0/method/service", "chatforge.v1.Translation", "nobody serves"),
        ("route to no Service", "/rules/0/backendRefs/0/name", "chatforge", "spec.rules[0].backendRefs"),
        ("route for another host", "/hostnames", ["example.com"], "GRPCRoute/chatforge spec.parentRefs"),
        at="/spec",
    ),
    *_breaks(
        GPU,
        "Gateway/chatforge",
        ("no such class", "/spec/gatewayClassName", "envoy", "Gateway/chatforge spec.gatewayClassName"),
        ("secret that nobody makes", "/spec/listeners/0/tls/certificateRefs/0/name", "tls", "spec.listeners[0].tls"),
        ("no TLS", "/spec/listeners/0/protocol", "HTTP", "Gateway/chatforge spec.listeners[0].protocol"),
    ),
    *_breaks(
        GPU,
        "BackendTrafficPolicy/chatforge",
        ("timeout of no route", "/spec/targetRefs/0/name", "chat", "BackendTrafficPolicy/chatforge spec.targetRefs"),
        ("timeout without a unit", "/spec/timeout/http/requestTimeout", "0", "spec.timeout.http.requestTimeout"),
    ),
    *_breaks(
        GPU,
        "PodMonitor/ray",
        ("nothing scraped", "", GONE, "PodMonitor: none"),
        ("monitor's port", "/spec/podMetricsEndpoints/0/port", "metric", "PodMonitor/ray spec.podMetricsEndpoints[0]"),
    ),
    *_breaks(
        GPU,
        "PrometheusRule/chatforge",
        ("alert's metric", "/spec/groups/0/rules/4/expr", _swap("waiting", "waitng"), "rules[4].expr: nobody"),
        ("alert's field", "/spec/groups/0/rules/0/expression", "1", "groups[0].rules[0].expression"),
    ),
    *_breaks(
        GPU,
        "ConfigMap/dashboard",
        ("panel's metric", "/data/chatforge.json", _swap("prompt_tokens_total", "prompt"), "'Tokens per second'"),
    ),
    *_breaks(
        S3,
        "RayService/chatforge",
        ("no such function", "/0/args/0", _swap("import open_store", "import open_stor"), "initContainers[0].args"),
        at=f"/spec/rayClusterConfig{_WORKER}/initContainers",
    ),
    *_breaks(
        TINY,
        "RayJob/train-tiny",
        ("no such recipe", "/spec/entrypoint", _swap("train tiny", "train tinny"), "spec.entrypoint: recipe 'tinny'"),
        ("no such module", "/spec/entrypoint", _swap("services.cli", "services.clii"), "spec.entrypoint: must be"),
        ("no such command", "/spec/entrypoint", _swap("cli train", "cli trian"), "spec.entrypoint: No such command"),
        ("no such option", "/spec/entrypoint", _swap("--run ", "--rum "), "spec.entrypoint: No such option"),
        ("no such setting", "/spec/entrypoint", _swap(" --run", " --set sft.batch=8 --run"), "sft.batch: no such key"),
        (
            "a command that trains nothing",
            "/spec/entrypoint",
            _swap("train tiny --run tiny", "runs tiny"),
            "entrypoint",
        ),
        ("a run by another name", "/spec/metadata/chatforge_run", "other", "RayJob/train-tiny spec.metadata"),
        ("submitter's image", "/spec/submitterPodTemplate/spec/containers/0/image", "chatforge:1", "spec.submitter"),
    ),
    *_breaks(
        TINY,
        "RayJob/train-tiny",
        ("hook's option", "/exec/command/2", _swap("--reason ", "--why "), "lifecycle.preStop: `ray drain-node`"),
        at=f"/spec/rayClusterSpec{_WORKER}/containers/0/lifecycle/preStop",
    ),
    *_breaks(
        GPU,
        "RayService/chatforge",
        (
            "serving hook's option",
            "/exec/command/2",
            _swap("--reason ", "--why "),
            "lifecycle.preStop: `ray drain-node`",
        ),
        ("less time than it drains", "/exec/command/2", _swap("seconds 660", "seconds 700"), "terminationGracePeriod"),
        at=f"/spec/rayClusterConfig{_WORKER}/containers/0/lifecycle/preStop",
    ),
    *_breaks(
        GPT3,
        "RayJob/train-gpt3-6-7b",
        ("a dot in a cluster's name", "/metadata/name", "train-gpt3-6.7b", "RayJob/train-gpt3-6.7b metadata.name"),
        ("too few GPUs", "/spec/rayClusterSpec/workerGroupSpecs/0/replicas", 7, "workerGroupSpecs: have 56 GPUs"),
    ),
]
