"""The manifests are right, every overlay and job; and what would be wrong with them is found, by a table of breaks."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from deploy_breaks import BREAKS, GPU, LAPTOP, S3, TINY, Break
from deploy_build import K8S, OVERLAYS, TRAINING, Object, build, kustomize, name_of, readme_blocks
from deploy_checks import check
from ray.serve.schema import ServeDeploySchema

from services.serve_config import short_form
from services.strict import ServerConfigError
from training.recipe import shipped_recipes
from training.store import open_store

SERVE_FILES = sorted(K8S.rglob("serve.yaml"))

built = pytest.mark.skipif(kustomize() is None, reason="neither kubectl nor kustomize is installed: nothing is built")


def installed_beside(folder: str) -> list[Object]:
    """What is in the cluster with it: an overlay has jobs, a job has its overlay."""
    return build(K8S / (TINY if folder.startswith("overlays/") else LAPTOP))


# ---- as they are


@built
@pytest.mark.parametrize("folder", [*OVERLAYS, *TRAINING])
def test_nothing_is_found(folder: str) -> None:
    assert check(build(K8S / folder), installed_beside(folder)) == []


@built
def test_what_is_built_is_what_the_issue_asks_for() -> None:
    kinds = {item["kind"] for item in build(K8S / GPU)}
    assert {"Namespace", "RayCluster", "RayService", "PersistentVolumeClaim", "StatefulSet", "NetworkPolicy"} <= kinds
    assert {"PodDisruptionBudget", "Gateway", "GRPCRoute", "PodMonitor", "PrometheusRule"} <= kinds
    assert [item["kind"] for item in build(K8S / TINY)] == ["RayJob"]


@built
@pytest.mark.parametrize("folder, file", [(LAPTOP, "base/serve.yaml"), (GPU, "overlays/gpu/serve/serve.yaml")])
def test_the_one_serve_config_is_what_ray_service_gets(folder: str, file: str) -> None:
    (service,) = (item for item in build(K8S / folder) if item["kind"] == "RayService")
    assert service["spec"]["serveConfigV2"] == (K8S / file).read_text("utf-8")


def test_every_shipped_recipe_has_a_job() -> None:
    assert [Path(folder).name for folder in TRAINING] == shipped_recipes()


@pytest.mark.parametrize("file", SERVE_FILES, ids=lambda path: str(path.relative_to(K8S)))
def test_serve_configs_are_rays_and_ours(file: Path) -> None:
    tree = yaml.safe_load(file.read_text("utf-8"))
    names = [application.name for application in ServeDeploySchema.model_validate(tree).applications]
    assert names == ["models", "chat", "translation", "image"] and short_form(tree)["port"] == 9000


def test_a_broken_serve_config_is_told_by_its_key() -> None:
    tree = yaml.safe_load(SERVE_FILES[0].read_text("utf-8"))
    tree["applications"][1]["args"]["replica"] = 2
    with pytest.raises(ServerConfigError, match=r"applications\.chat\.args\.replica: no such key"):
        short_form(tree)


@built
def test_a_worker_fetches_its_models_out_of_the_bucket(tmp_path: Path) -> None:
    """The init container's own code, with folders in the places of the pod's, and of the bucket."""
    (service,) = (item for item in build(K8S / S3) if item["kind"] == "RayService")
    pod = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]
    (code,) = pod["initContainers"][0]["args"]
    models, served, bucket = tmp_path / "models", tmp_path / "serve.yaml", f"file://{tmp_path}/bucket"
    served.write_text(service["spec"]["serveConfigV2"], "utf-8")
    named = ["assistant/ppo/model", "translation-base/translation/model", "image-sd/image/model"]
    for name in named:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(name, "utf-8")
        open_store(bucket).push(tmp_path / name, name)
    code = code.replace('"/models"', repr(str(models))).replace('"/etc/serve/serve.yaml"', repr(str(served)))
    settings = os.environ | {"CHATFORGE_RUNS": bucket}
    subprocess.run([sys.executable, "-c", code], env=settings, timeout=60, check=True)
    assert {path.relative_to(models).as_posix() for path in models.rglob("*.json")} == {
        f"{name}/config.json" for name in named
    }


@built
def test_the_samples_of_the_readme_are_right(tmp_path: Path) -> None:
    """A recipe with its runs in a bucket, whose pods refer to what overlays/s3 installs; another registry, HAProxy."""
    shutil.copytree(K8S, tmp_path / "deploy/k8s")
    mine, overlay = (build(_written(sample, tmp_path)) for sample in readme_blocks("yaml"))
    assert [name_of(item) for item in mine] == ["RayJob/train-mine"]
    assert check(mine, build(K8S / S3)) == []
    text = yaml.safe_dump_all(overlay)
    assert "image: registry.example.com/chatforge:" in text and "image: chatforge" not in text
    assert "RAY_SERVE_ENABLE_HA_PROXY: '1'" in text


def _written(sample: str, root: Path) -> Path:
    """The folder of a sample, whose first line says where it stands."""
    path = sample.splitlines()[0].removeprefix("# ")
    file = root / ("deploy" if path.startswith("k8s/") else "") / path
    file.parent.mkdir()
    file.write_text(sample, "utf-8")
    return file.parent


# ---- and broken


@built
@pytest.mark.parametrize("broken", BREAKS, ids=lambda broken: broken.what)
def test_a_broken_manifest_is_found(broken: Break) -> None:
    findings = check(broken.of(build(K8S / broken.folder)), installed_beside(broken.folder))
    assert any(broken.found in finding for finding in findings), findings


def test_there_are_enough_of_them() -> None:
    assert len({broken.what for broken in BREAKS}) == len(BREAKS) >= 25
