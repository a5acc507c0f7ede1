"""The Dockerfile: what it copies exists, what it installs is what the Makefile installs, and what the pods expect.

CHATFORGE_REPLAY_IMAGE=1 also runs its steps in a fresh virtual environment, which takes minutes and a package index.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
from deploy_build import K8S, ROOT, TRAINING, build, kustomize, pods, readme_blocks

DOCKERFILE = ROOT / "deploy/docker/Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
OF_THE_SYSTEM = ("apt-get", "useradd")  # steps that change more than a Python environment


def instructions() -> list[tuple[str, str]]:
    """(INSTRUCTION, arguments), with lines joined that end in a backslash."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text("utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def arguments_of(instruction: str) -> list[str]:
    return [arguments for name, arguments in instructions() if name == instruction]


def copied() -> list[str]:
    return [source for arguments in arguments_of("COPY") for source in arguments.split()[:-1]]


def test_every_step_is_one_that_docker_knows() -> None:
    known = {"FROM", "RUN", "WORKDIR", "COPY", "ARG", "USER", "ENV", "EXPOSE", "CMD"}
    assert {name for name, _ in instructions()} == known and instructions()[0][0] == "FROM"


def test_what_is_copied_exists_and_is_sent_to_docker() -> None:
    sent = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    assert "*" in sent
    for source in copied():
        assert (ROOT / source).exists() and f"!{source}" in sent
    assert sorted(line[1:] for line in sent if line.startswith("!")) == sorted(copied())


def test_all_of_our_packages_are_copied() -> None:
    setuptools = PROJECT["tool"]["setuptools"]
    folders = {setuptools["package-dir"].get(p.split(".")[0], p).split("/")[0] for p in setuptools["packages"]}
    assert {folder.split(".")[0] for folder in folders} <= set(copied())


def test_torch_comes_first_and_everything_is_pinned() -> None:
    installs = [step for step in arguments_of("RUN") if "pip install" in step]
    assert "torch==" in installs[0] and "TORCH_INDEX" in installs[0]
    assert "--constraint constraints.txt" in installs[1] and "--no-deps ." in installs[2]
    assert (ROOT / "constraints.txt").read_text("utf-8").count("\ntorch==") == 1


def test_the_requirements_are_those_of_pyproject(tmp_path: Path) -> None:
    """The step that writes them, run as it stands."""
    (step,) = (step for step in arguments_of("RUN") if "requirements.txt" in step)
    extras = dict(argument.split("=", 1) for argument in arguments_of("ARG"))["EXTRAS"].strip('"')
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    _run(step.split("&&")[0].replace("python ", f"{sys.executable} ", 1), tmp_path, {"EXTRAS": extras})
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *(d for e in extras.split() for d in project["optional-dependencies"][e])]
    assert (tmp_path / "requirements.txt").read_text("utf-8").split("\n") == [*wanted, ""]


def test_it_has_no_weights() -> None:
    steps = " ".join(arguments_of("RUN"))
    assert not re.search(r"smollm|minilm|huggingface|\.safetensors|\.gguf", steps)


def test_it_has_what_kuberay_needs() -> None:
    assert any("apt-get install" in step and {"bash", "wget"} <= set(step.split()) for step in arguments_of("RUN"))


def test_its_python_is_the_projects() -> None:
    python = re.fullmatch(r"python:(3\.\d+)-slim-\w+", arguments_of("FROM")[0])
    assert python and f"PYTHON ?= python{python[1]}\n" in (ROOT / "Makefile").read_text("utf-8")


@pytest.mark.skipif(kustomize() is None, reason="neither kubectl nor kustomize is installed: nothing is built")
@pytest.mark.parametrize("folder", ["overlays/gpu", TRAINING[0]])
def test_its_user_and_ports_are_the_pods(folder: str) -> None:
    ours = [pod for pod in pods(build(K8S / folder)) if "chatforge" in pod.containers[-1].spec["image"]]
    (user,) = arguments_of("USER")
    assert {str(pod.spec["securityContext"]["runAsUser"]) for pod in ours} == {user}
    assert any(f"useradd --uid {user} " in step for step in arguments_of("RUN"))
    assert {str(port) for pod in ours for port in pod.ports.values()} <= set(arguments_of("EXPOSE")[0].split())


def test_the_readmes_build_commands_make_the_tags_that_are_used() -> None:
    text = "\n".join(readme_blocks("console")).replace("\\\n", " ")
    builds = [shlex.split(line) for line in text.splitlines() if line.startswith("docker build ")]
    given = {word.split("=")[0] for build in builds for word in build if re.match(r"[A-Z_]+=", word)}
    assert given <= {argument.split("=")[0] for argument in arguments_of("ARG")}
    assert all(build[build.index("-f") + 1] == "deploy/docker/Dockerfile" and build[-1] == "." for build in builds)
    manifests = "\n".join(path.read_text("utf-8") for path in K8S.rglob("*.yaml"))
    used = set(re.findall(r"image: (chatforge:\S+)", manifests))
    used |= {f"chatforge:{tag}" for tag in re.findall(r"name: chatforge, newTag: (\S+)", manifests)}
    assert used and used <= {build[build.index("-t") + 1] for build in builds}


@pytest.mark.timeout(3600)
@pytest.mark.skipif(not os.environ.get("CHATFORGE_REPLAY_IMAGE"), reason="takes minutes: set CHATFORGE_REPLAY_IMAGE=1")
def test_replay_of_its_steps(tmp_path: Path) -> None:
    """Every step in order, in a fresh virtual environment; those of the system are left out."""
    venv.create(tmp_path / "venv", with_pip=True)
    settings = {"PATH": f"{tmp_path}/venv/bin:{os.environ['PATH']}", "HOME": str(tmp_path), "PYTHONPATH": ""}
    here = tmp_path
    for name, arguments in instructions():
        match name:
            case "WORKDIR":
                here = tmp_path / arguments.strip("/")
                here.mkdir(parents=True)
            case "ARG":
                key, _, value = arguments.partition("=")
                settings[key] = os.environ.get(key, value.strip('"'))
            case "COPY":
                *sources, target = arguments.split()
                for source in sources:
                    _copy(ROOT / source, here / target)
            case "RUN" if not arguments.startswith(OF_THE_SYSTEM):
                _run(arguments, here, settings)
    for command in ("chatforge --help", "ray --version"):
        _run(command, here, settings)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


def _run(step: str, folder: Path, settings: dict[str, str]) -> None:
    done = subprocess.run(["sh", "-c", step], cwd=folder, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, f"{step}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
