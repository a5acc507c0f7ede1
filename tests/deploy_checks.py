"""What can be wrong with the manifests: each check gives its findings, `Kind/name path: what is wrong`.

`check` is all of them. This file has those that need Kubernetes' rules alone; deploy_code.py those that look into our
code, deploy_schema.py the schemas.
"""

import re
from collections.abc import Iterator, Mapping

from deploy_build import AGENT_PORT, Container, Object, Pod, at, clusters, name_of, of_kind, pods, readme_blocks
from deploy_code import check_code, check_metrics, check_ray, check_routes, check_serve, check_versions
from deploy_schema import check_schemas

NAMESPACE = "chatforge"
CLUSTER_SCOPED = ("Namespace", "GatewayClass")


def check(objects: list[Object], installed: list[Object] | None = None) -> list[str]:
    """All findings. `installed` is what is in the cluster already, which `objects` may refer to."""
    there = objects + (installed or [])
    found = check_schemas(objects)
    if found:
        return found  # the others expect fields of the right type
    return [
        *check_names(objects),
        *check_pods(objects),
        *check_references(objects, there),
        *check_selectors(objects, there),
        *check_network(objects, there),
        *check_disruption(objects),
        *check_ray(objects),
        *check_versions(objects),
        *check_serve(objects),
        *check_code(objects),
        *check_routes(objects),
        *check_metrics(objects, there),
    ]


def check_names(objects: list[Object]) -> list[str]:
    """All in our namespace; and KubeRay makes a Service NAME-head-svc for every cluster."""

    def wrong(item: Object) -> bool:
        return item["metadata"].get("namespace") != (None if item["kind"] in CLUSTER_SCOPED else NAMESPACE)

    found = [f"{name_of(i)} metadata.namespace: {i['metadata'].get('namespace')!r}" for i in objects if wrong(i)]
    names = [cluster.name for cluster in clusters(objects)]
    return found + [
        f"{cluster.kind}/{cluster.name} metadata.name: another cluster has it, and so the same head Service"
        for cluster in clusters(objects)
        if names.count(cluster.name) > 1
    ]


# ---- pods


def check_pods(objects: list[Object]) -> list[str]:
    """As the restricted Pod Security Standard has it, with requests and limits, and probes that can succeed."""
    return [finding for pod in pods(objects) for finding in _pod_findings(pod)]


def _pod_findings(pod: Pod) -> Iterator[str]:
    security = pod.spec.get("securityContext", {})
    if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
        yield f"{pod.place}.spec.securityContext: must have runAsNonRoot: true and a runAsUser"
    if at(security, "seccompProfile.type") != "RuntimeDefault":
        yield f"{pod.place}.spec.securityContext.seccompProfile: must be RuntimeDefault"
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.spec.get(key):
            yield f"{pod.place}.spec.{key}: must not be set"
    volumes = {volume["name"] for volume in pod.spec.get("volumes", [])} | set(_claimed(pod))
    for container in pod.containers:
        yield from _container_findings(container)
        for i, mount in enumerate(container.spec.get("volumeMounts", [])):
            if mount["name"] not in volumes:
                yield f"{container.place}.volumeMounts[{i}].name: no volume {mount['name']!r}"
        for probe in ("readinessProbe", "livenessProbe", "startupProbe"):
            yield from _probe_findings(pod, container, probe)


def _claimed(pod: Pod) -> list[str]:
    """Volumes of a StatefulSet's claim templates, which its pods have by their names."""
    return ["state"] if pod.place.startswith("StatefulSet/redis") else []


def _container_findings(container: Container) -> Iterator[str]:
    place, spec = container.place, container.spec
    security = spec.get("securityContext", {})
    if security.get("allowPrivilegeEscalation") is not False:
        yield f"{place}.securityContext.allowPrivilegeEscalation: must be false"
    if security.get("privileged"):
        yield f"{place}.securityContext.privileged: must not be set"
    if security.get("runAsNonRoot") is False or security.get("runAsUser") == 0:
        yield f"{place}.securityContext: must not be root"
    if "ALL" not in at(security, "capabilities.drop"):
        yield f"{place}.securityContext.capabilities.drop: must have ALL"
    for kind in ("requests", "limits"):
        for resource in ("cpu", "memory"):
            if not at(spec, f"resources.{kind}").get(resource):
                yield f"{place}.resources.{kind}.{resource}: is not given"
    gpus = {kind: at(spec, f"resources.{kind}").get("nvidia.com/gpu") for kind in ("requests", "limits")}
    if gpus["requests"] != gpus["limits"]:
        yield f"{place}.resources: nvidia.com/gpu must be the same in requests and limits"
    if not re.fullmatch(r"[^:@]+:[^:@]+", spec["image"]) or spec["image"].endswith(":latest"):
        yield f"{place}.image: {spec['image']!r} has no fixed tag"
    for i, port in enumerate(spec.get("ports", [])):
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?", port.get("name", "")):
            yield f"{place}.ports[{i}].name: {port.get('name')!r} is no port name of at most 15 characters"


def _probe_findings(pod: Pod, container: Container, name: str) -> Iterator[str]:
    """A probe asks a port that the pod has; the paths are those that Ray answers."""
    probe, place = container.spec.get(name, {}), f"{container.place}.{name}"
    asked = [(get["port"], get.get("path", "/")) for get in [probe.get("httpGet")] if get]
    command = " ".join(at(probe, "exec").get("command", []))
    asked += [(int(port), path) for port, path in re.findall(r"http://localhost:(\d+)(/\S*)", command)]
    known = {AGENT_PORT: ("/api/healthz", "/api/local_raylet_healthz"), pod.ports.get("serve"): ("/-/healthz",)}
    for port, path in asked:
        if port not in known:
            yield f"{place}: nothing listens for HTTP on port {port}"
        elif path not in known[port]:
            yield f"{place}: Ray has no {path} on port {port}"


# ---- references


def check_references(objects: list[Object], there: list[Object]) -> list[str]:
    """ConfigMaps, Secrets, claims, Services and gateways that are named exist; Services' ports are their pods'."""
    found = [finding for pod in pods(objects) for finding in _pod_references(pod, there)]
    for cluster in clusters(objects):
        if redis := at(cluster.spec, "gcsFaultToleranceOptions"):
            place = f"{cluster.place}.gcsFaultToleranceOptions"
            found += _secret_key(place, at(redis, "redisPassword.valueFrom"))
            if redis["redisAddress"] not in _services(there):
                found.append(f"{place}.redisAddress: no Service {redis['redisAddress']}")
    return found + list(_gateway_references(objects, there))


def _pod_references(pod: Pod, there: list[Object]) -> Iterator[str]:
    claims, configs = (_names(there, kind) for kind in ("PersistentVolumeClaim", "ConfigMap"))
    for i, volume in enumerate(pod.spec.get("volumes", [])):
        place = f"{pod.place}.spec.volumes[{i}]"
        if (claim := at(volume, "persistentVolumeClaim").get("claimName")) and claim not in claims:
            yield f"{place}: no PersistentVolumeClaim {claim!r}"
        if (config := at(volume, "configMap").get("name")) and config not in configs:
            yield f"{place}: no ConfigMap {config!r}"
        if secret := at(volume, "secret").get("secretName"):
            yield from _secret(place, secret)
    for container in pod.containers:
        for i, source in enumerate(container.spec.get("envFrom", [])):
            place = f"{container.place}.envFrom[{i}]"
            if (config := at(source, "configMapRef").get("name")) and config not in configs:
                yield f"{place}: no ConfigMap {config!r}"
            if (secret := at(source, "secretRef")) and not secret.get("optional"):
                yield from _secret(place, secret["name"])
        for i, variable in enumerate(container.spec.get("env", [])):
            yield from _secret_key(f"{container.place}.env[{i}]", variable.get("valueFrom", {}))


def _names(objects: list[Object], kind: str) -> set[str]:
    return {item["metadata"]["name"] for item in of_kind(objects, kind)}


def made_secrets() -> dict[str, set[str]]:
    """The Secrets that README.md makes, with their keys: manifests hold none."""
    text = "\n".join(readme_blocks("console")).replace("\\\n", " ")
    made: dict[str, set[str]] = {}
    for kind, name, options in re.findall(r"create secret (generic|tls) (\S+)(.*)", text):
        keys = re.findall(r"--from-(?:literal|file)=(\w+)=", options)
        made.setdefault(name, set()).update(keys if kind == "generic" else {"tls.crt", "tls.key"})
    return made


def _secret(place: str, name: str) -> list[str]:
    return [] if name in made_secrets() else [f"{place}: no Secret {name!r} is made in README.md"]


def _secret_key(place: str, source: Object) -> list[str]:
    reference = source.get("secretKeyRef", {})
    if not reference or reference["key"] in made_secrets().get(reference["name"], ()):
        return []
    return [f"{place}.secretKeyRef: no key {reference['key']!r} in a Secret {reference['name']!r} that README.md makes"]


def _services(there: list[Object]) -> dict[str, str]:
    """Every NAME:PORT that answers, with its appProtocol: our Services, and those that KubeRay makes."""
    ports = {
        f"{item['metadata']['name']}:{port['port']}": port.get("appProtocol", "")
        for item in of_kind(there, "Service")
        for port in item["spec"]["ports"]
    }
    for item in of_kind(there, "RayService"):
        service = item["spec"]["serveService"]
        for port in service["spec"]["ports"]:
            ports[f"{service['metadata']['name']}:{port['port']}"] = port.get("appProtocol", "")
    return ports


def _gateway_references(objects: list[Object], there: list[Object]) -> Iterator[str]:
    services = _services(there)
    for route in of_kind(objects, "GRPCRoute"):
        for i, rule in enumerate(route["spec"]["rules"]):
            for backend in rule["backendRefs"]:
                name, place = f"{backend['name']}:{backend['port']}", f"{name_of(route)} spec.rules[{i}].backendRefs"
                if name not in services:
                    yield f"{place}: no Service {name}"
                elif services[name] != "kubernetes.io/h2c":
                    yield f"{place}: {name} has no appProtocol kubernetes.io/h2c, so the gateway speaks HTTP/1.1 to it"
        listeners = {
            (gateway["metadata"]["name"], listener["name"]): listener["hostname"]
            for gateway in of_kind(there, "Gateway")
            for listener in gateway["spec"]["listeners"]
        }
        for parent in route["spec"]["parentRefs"]:
            hostname = listeners.get((parent["name"], parent["sectionName"]))
            if hostname not in route["spec"]["hostnames"]:
                yield f"{name_of(route)} spec.parentRefs: no listener {parent} for {route['spec']['hostnames']}"
    for gateway in of_kind(objects, "Gateway"):
        if gateway["spec"]["gatewayClassName"] not in _names(there, "GatewayClass"):
            yield f"{name_of(gateway)} spec.gatewayClassName: no GatewayClass {gateway['spec']['gatewayClassName']!r}"
        for i, listener in enumerate(gateway["spec"]["listeners"]):
            for reference in listener["tls"]["certificateRefs"]:
                yield from _secret(f"{name_of(gateway)} spec.listeners[{i}].tls", reference["name"])
    for policy in of_kind(objects, "BackendTrafficPolicy"):
        for target in policy["spec"]["targetRefs"]:
            if target["name"] not in _names(there, "GRPCRoute"):
                yield f"{name_of(policy)} spec.targetRefs: no GRPCRoute {target['name']!r}"


# ---- selectors


def selected(selector: Mapping[str, str], there: list[Object]) -> list[Pod]:
    """The pods that have all of these labels."""
    return [pod for pod in pods(there) if selector.items() <= pod.labels.items()]


def check_selectors(objects: list[Object], there: list[Object]) -> list[str]:
    """Every selector finds pods, and ports that are named are theirs."""
    found = []
    for item in of_kind(objects, "Service", "PodDisruptionBudget", "NetworkPolicy", "PodMonitor", "StatefulSet"):
        for path in ("spec.selector", "spec.podSelector"):
            selector = at(item, path).get("matchLabels") or (at(item, path) if item["kind"] == "Service" else {})
            if selector and not selected(selector, there):
                found.append(f"{name_of(item)} {path}: selects no pod: {selector}")
    for service in of_kind(objects, "Service"):
        for i, port in enumerate(service["spec"]["ports"]):
            for pod in selected(service["spec"]["selector"], there):
                target = port.get("targetPort", port["port"])
                if target not in pod.ports and target not in pod.ports.values():
                    found.append(f"{name_of(service)} spec.ports[{i}].targetPort: {pod.place} has no port {target!r}")
    for monitor in of_kind(objects, "PodMonitor"):
        for i, endpoint in enumerate(monitor["spec"]["podMetricsEndpoints"]):
            for pod in selected(monitor["spec"]["selector"]["matchLabels"], there):
                if endpoint["port"] not in pod.ports:
                    found.append(f"{name_of(monitor)} spec.podMetricsEndpoints[{i}].port: {pod.place} has none")
    return found


# ---- network and disruption


def check_network(objects: list[Object], there: list[Object]) -> list[str]:
    """Nothing is open that is not named, what is named is listened on, and what must reach a pod may."""
    found = list(_open_ports(objects, there))
    policies = of_kind(there, "NetworkPolicy")
    if not any(policy["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"]} for policy in policies):
        found.append("NetworkPolicy: none denies what no other one allows")
    for cluster in clusters(objects):
        for port in (8265, AGENT_PORT):
            if not _reaches("kuberay-system", port, cluster.head, policies):
                found.append(f"{cluster.place}: no NetworkPolicy lets KubeRay reach port {port} of its head")
        for pod in cluster.pods:
            component = {"app.kubernetes.io/component": pod.labels.get("app.kubernetes.io/component", "")}
            if not any(_all_ports_from(component, policy, pod) for policy in policies):
                found.append(f"{pod.place}: no NetworkPolicy opens all ports between the pods of {component}")
    return found


def _open_ports(objects: list[Object], there: list[Object]) -> Iterator[str]:
    for policy in of_kind(objects, "NetworkPolicy"):
        for i, rule in enumerate(policy["spec"].get("ingress", [])):
            place = f"{name_of(policy)} spec.ingress[{i}]"
            if any(
                not peer.get("podSelector") and not peer.get("namespaceSelector") for peer in rule.get("from", [{}])
            ):
                yield f"{place}: lets everyone in"
            for peer in rule.get("from", []):
                labels = at(peer, "podSelector.matchLabels")
                if labels and "namespaceSelector" not in peer and not selected(labels, there):
                    yield f"{place}: selects no pod: {labels}"
            chosen = selected(at(policy, "spec.podSelector.matchLabels"), there)
            declared = {AGENT_PORT, *(port for pod in chosen for port in pod.ports.values())}
            for port in rule.get("ports", []):
                if port["port"] not in declared:
                    yield f"{place}: nobody listens on port {port['port']}"


def _applies(policy: Object, pod: Pod) -> bool:
    return at(policy, "spec.podSelector.matchLabels").items() <= pod.labels.items()


def _reaches(namespace: str, port: int, pod: Pod, policies: list[Object]) -> bool:
    peer = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}}
    return any(
        peer in rule["from"] and {"port": port} in rule.get("ports", [])
        for policy in policies
        if _applies(policy, pod)
        for rule in policy["spec"].get("ingress", [])
    )


def _all_ports_from(labels: Mapping[str, str], policy: Object, pod: Pod) -> bool:
    rule = {"from": [{"podSelector": {"matchLabels": dict(labels)}}]}
    return _applies(policy, pod) and rule in policy["spec"].get("ingress", [])


def check_disruption(objects: list[Object]) -> list[str]:
    """Serving has a budget, in the one form that Kubernetes takes for the pods of a RayCluster."""
    found = []
    for budget in of_kind(objects, "PodDisruptionBudget"):
        least = budget["spec"].get("minAvailable")
        if not isinstance(least, int) or "maxUnavailable" in budget["spec"]:
            found.append(f"{name_of(budget)} spec.minAvailable: must be an integer: a RayCluster has no scale")
    serving = [c for c in clusters(objects) if c.kind == "RayService"]
    if serving and not of_kind(objects, "PodDisruptionBudget"):
        found.append(f"{serving[0].place}: has no PodDisruptionBudget")
    return found
