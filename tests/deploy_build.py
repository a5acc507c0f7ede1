"""The manifests as kustomize builds them, and the pods that Kubernetes and KubeRay make of them."""

import functools
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
K8S = ROOT / "deploy/k8s"
README = ROOT / "deploy/README.md"
OVERLAYS = [f"overlays/{path.name}" for path in sorted((K8S / "overlays").iterdir())]
TRAINING = [f"train/{path.name}" for path in sorted((K8S / "train").iterdir()) if path.name != "base"]
# Where each kind of KubeRay's holds the spec of its cluster.
CLUSTER_SPEC = {"RayCluster": "spec", "RayJob": "spec.rayClusterSpec", "RayService": "spec.rayClusterConfig"}
AGENT_PORT = 52365  # of Ray's agent on every node, which KubeRay's users do not declare

Object = dict[str, Any]


@dataclass(frozen=True)
class Container:
    """One container of a pod."""

    place: str
    spec: Object


@dataclass(frozen=True)
class Pod:
    """The pods of one template."""

    place: str  # Kind/name and the path in it
    template: Object
    labels: dict[str, str]  # those that KubeRay adds included
    node: str = ""  # head or worker, of a Ray cluster

    @property
    def spec(self) -> Object:
        return self.template.get("spec", {})

    @property
    def containers(self) -> list[Container]:
        lists = ("initContainers", "containers")
        return [
            Container(f"{self.place}.spec.{key}[{i}]", spec)
            for key in lists
            for i, spec in enumerate(self.spec.get(key, []))
        ]

    @property
    def ports(self) -> dict[str, int]:
        """Declared ports by name."""
        return {p.get("name", ""): p["containerPort"] for c in self.containers for p in c.spec.get("ports", [])}


@dataclass(frozen=True)
class Cluster:
    """The Ray cluster of a RayCluster, RayJob or RayService."""

    place: str
    kind: str
    name: str
    spec: Object

    @property
    def head(self) -> Pod:
        return self._pod("headGroupSpec", self.spec.get("headGroupSpec", {}), "head", "headgroup")

    @property
    def groups(self) -> list[tuple[Object, Pod]]:
        """Worker groups, each with its pods."""
        groups = self.spec.get("workerGroupSpecs", [])
        return [
            (group, self._pod(f"workerGroupSpecs[{i}]", group, "worker", group.get("groupName", "")))
            for i, group in enumerate(groups)
        ]

    @property
    def pods(self) -> list[Pod]:
        return [self.head, *(pod for _, pod in self.groups)]

    def _pod(self, path: str, group: Object, node: str, name: str) -> Pod:
        template = group.get("template", {})
        kuberay = {"is-ray-node": "yes", "node-type": node, "group": name, "cluster": self.name}
        labels = template.get("metadata", {}).get("labels", {}) | {f"ray.io/{k}": v for k, v in kuberay.items()}
        return Pod(f"{self.place}.{path}.template", template, labels, node)


def kustomize() -> list[str] | None:
    """The command that builds a folder, where this machine has one."""
    if shutil.which("kubectl"):
        return ["kubectl", "kustomize"]
    return ["kustomize", "build"] if shutil.which("kustomize") else None


@functools.cache
def build_text(folder: Path) -> str:
    """What `kubectl apply -k FOLDER` would send. Raises AssertionError with kustomize's words where it cannot."""
    command = kustomize()
    assert command, "neither kubectl nor kustomize is installed"
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(folder: Path) -> list[Object]:
    """The same as objects, the caller's own."""
    return list(yaml.safe_load_all(build_text(folder)))


def readme_blocks(language: str) -> list[str]:
    """The code blocks of deploy/README.md in one language."""
    return re.findall(rf"```{language}\n(.*?)```", README.read_text("utf-8"), re.DOTALL)


def name_of(item: Object) -> str:
    """Kind/name, with which every finding begins."""
    return f"{item.get('kind')}/{item.get('metadata', {}).get('name')}"


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [item for item in objects if item.get("kind") in kinds]


def at(item: Object, path: str) -> Any:
    """The value at a dotted path; an empty mapping where there is none."""
    for key in path.split("."):
        item = item.get(key) or {}
    return item


def clusters(objects: list[Object]) -> list[Cluster]:
    return [
        Cluster(f"{name_of(item)} {path}", item["kind"], item["metadata"]["name"], at(item, path))
        for item in objects
        if (path := CLUSTER_SPEC.get(item.get("kind", "")))
    ]


def pods(objects: list[Object]) -> list[Pod]:
    """Of every template: Ray's, the jobs' submitters, and those of Kubernetes' own kinds."""
    return [*(pod for cluster in clusters(objects) for pod in cluster.pods), *_plain_pods(objects)]


def _plain_pods(objects: list[Object]) -> Iterator[Pod]:
    paths = {"RayJob": "spec.submitterPodTemplate", "StatefulSet": "spec.template", "Deployment": "spec.template"}
    for item in objects:
        if path := paths.get(item.get("kind", "")):
            template = at(item, path)
            yield Pod(f"{name_of(item)} {path}", template, template.get("metadata", {}).get("labels", {}))
