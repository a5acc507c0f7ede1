"""deploy/README.md is true: its commands parse, what they name exists, and what runs here says what it shows."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from deploy_build import K8S, OVERLAYS, README, ROOT, TRAINING, build, kustomize, of_kind, readme_blocks
from deploy_code import parse_command

TEXT = README.read_text("utf-8")
CONSOLE = "\n".join(readme_blocks("console")).replace("\\\n", " ")
LINES = [line.strip().removeprefix("$ ") for line in CONSOLE.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("chatforge ")]

built = pytest.mark.skipif(kustomize() is None, reason="neither kubectl nor kustomize is installed: nothing is built")


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_ours_parses(line: str) -> None:
    parse_command(shlex.split(line, comments=True)[1:])


def test_there_are_commands_to_check() -> None:
    assert {line.split()[1] for line in COMMANDS} >= {"chat", "translate", "draw", "submit", "jobs", "logs", "stop"}


def test_every_folder_and_file_that_is_named_exists() -> None:
    named = re.findall(r"(?:-k|-f|kustomize) (deploy/[^\s$]+)(?=\s|$)", CONSOLE)
    named += [f"deploy/{path}" for path in re.findall(r"`((?:k8s|docker)/[\w./-]+)`", TEXT) if "mine" not in path]
    named += [f"deploy/k8s/{path}" for path in re.findall(r"`((?:base|components)/[\w./-]+)`", TEXT)]
    named += re.findall(r"`((?:services|tests|training)/[\w./]+)`", TEXT)
    assert len(named) > 20 and [path for path in named if not (ROOT / path).exists()] == []


@built
def test_every_object_that_is_named_exists() -> None:
    objects = [item for folder in (*OVERLAYS, *TRAINING) for item in build(K8S / folder)]
    there = {f"{item['kind'].lower()}/{item['metadata']['name']}" for item in objects}
    for kind in ("RayCluster", "RayService"):
        there |= {f"service/{item['metadata']['name']}-head-svc" for item in of_kind(objects, kind)}
    there |= {f"service/{item['spec']['serveService']['metadata']['name']}" for item in of_kind(objects, "RayService")}
    there |= {f"secret/{item['metadata']['name']}" for item in of_kind(objects, "RayCluster")}  # KubeRay's, the token
    there |= {f"job/{item['metadata']['name']}" for item in of_kind(objects, "RayJob")}  # KubeRay's, the submitter
    kinds = "service|raycluster|rayservice|rayjob|job|gateway|secret"
    lines = [line for line in LINES if "kubectl" in line and "create secret" not in line]
    named = re.findall(rf"\b({kinds})[/ ]([a-z][\w.-]*)(?=[\s\"]|$)", "\n".join(lines))
    assert len(named) > 6 and {"/".join(pair) for pair in named} <= there


def test_recipes_stand_in_the_table_with_their_pods() -> None:
    rows = re.findall(r"^\| (`[a-z0-9.-]+`(?:, `[a-z0-9.-]+`)*) \| a head, ", TEXT, re.MULTILINE)
    assert sorted(re.findall(r"`([^`]+)`", " ".join(rows))) == [Path(folder).name for folder in TRAINING]


MINUTES = "REPLAY|KILL"  # what these variables ask for takes too long to be run here


@built
@pytest.mark.parametrize(
    "block", [b for b in readme_blocks("console") if b.startswith("$ ") and not re.search(MINUTES, b)]
)
def test_what_runs_here_says_what_is_shown(block: str, tmp_path: Path) -> None:
    command, _, shown = block.removeprefix("$ ").partition("\n")
    (tmp_path / "chatforge").write_text(f'#!/bin/sh\nexec {sys.executable} -m services.cli "$@"\n')
    (tmp_path / "chatforge").chmod(0o755)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "proto")])
    settings = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": paths, "TERM": "dumb"}
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=settings, capture_output=True, text=True)
    assert done.stdout + done.stderr == shown
