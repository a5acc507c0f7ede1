"""Runs in a store over several Ray nodes, each with a disk of its own: what one writes no other sees but by the store.

Ten minutes, so it is asked for: KILL=rest.
"""

import os
import random
import subprocess
import sys
import time

import nodes
import pytest
import yaml
from nano import TRAINED, nano, trajectory, write_data
from s3 import s3_server

from training.run import Run
from training.store import open_store

WAIT = 240  # seconds for one thing to happen, on a busy machine
pytestmark = [
    pytest.mark.skipif(os.environ.get("KILL") != "rest", reason="takes ten minutes: KILL=rest asks for it"),
    pytest.mark.timeout(3000),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The driver's node, where no worker fits, and two for a worker each. AWS_ENDPOINT_URL leads all to one store."""
    if not nodes.can_have_namespaces():
        pytest.skip("nodes cannot have disks of their own here")
    folder = tmp_path_factory.mktemp("own")
    (folder / "disk").mkdir()
    with (
        nodes.cluster(nodes=0, disk=folder / "disk") as made,
        s3_server(folder / "s3.log", host=f"{made.subnet}.1") as s3,
        pytest.MonkeyPatch.context() as patch,
    ):
        settings = {"CHATFORGE_CACHE": str(folder / "disk" / "cache"), "HOME": str(folder / "disk")}
        for name, value in {**s3.env, **settings, "AWS_EC2_METADATA_DISABLED": "true"}.items():
            patch.setenv(name, value)
        s3.bucket("shared")
        for cpus in (0, 1, 1):
            made.add(cpus)
        yield made


@pytest.fixture(scope="module")
def folder(cluster, tmp_path_factory, tiny_world):
    """Where the recipe is, which names everything it reads by a URI."""
    folder = tmp_path_factory.mktemp("recipes")
    write_data(folder)
    store = open_store("s3://shared/data")
    here = {path.name: path for path in (tiny_world.corpus, tiny_world.chats, tiny_world.rankings, tiny_world.prompts)}
    for name, path in (here | {path.name: path for path in folder.iterdir()}).items():
        store.write(name, path.read_bytes())
    recipe = nano(tiny_world, folder)
    for stage in (stage for stage in recipe.values() if isinstance(stage, dict)):
        for key in {"text", "chats", "rankings", "prompts", "pairs", "images"} & set(stage):
            stage[key] = [f"s3://shared/data/{source.rpartition('/')[2]}" for source in stage[key]]
    (folder / "nano.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    return folder


def start(folder, run, runs, before=(), env=None):
    words = ["train", "nano.yaml", "--run", run, "--runs", runs, "--workers", "2"]
    log = (folder / f"{run}.log").open("a")
    command = [*before, sys.executable, "-m", "services.cli", *words]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)


def said(folder, run):
    return (folder / f"{run}.log").read_text()


def finish(process, folder, run):
    assert process.wait(3 * WAIT) == 0, said(folder, run)[-3000:]


def wait_for_step(cluster, folder, stage, step, process):
    """The disk of the first worker's node shows it: the store learns of it later."""

    def taken():
        roots = cluster.scratch.glob("disk-*/cache/runs/s3/shared/runs/killed")
        return any(line["step"] >= step for root in roots for line in Run(root, stage).metrics())

    deadline = time.monotonic() + WAIT
    while not taken():
        assert process.poll() is None and time.monotonic() < deadline, said(folder, "killed")[-3000:]
        time.sleep(0.02)


def test_in_every_stage_a_node_is_lost_with_its_disk(cluster, folder, tmp_path):
    """And another joins, whose disk is empty: the numbers are those of two workers in a folder, undisturbed."""
    finish(start(folder, "undisturbed", str(tmp_path)), folder, "undisturbed")
    chance, workers = random.Random(time.time()), [1, 2]
    process = start(folder, "killed", "s3://shared/runs", cluster.command(0), cluster.env)
    for stage in TRAINED:
        step, node = chance.randint(5, 12), chance.choice(workers)
        print(f"{stage}: node {node} at step {step}")
        wait_for_step(cluster, folder, stage, step, process)
        cluster.kill(node)
        workers.remove(node)
        workers.append(cluster.add(1))
    finish(process, folder, "killed")
    assert said(folder, "killed").count("a worker died") == len(TRAINED)
    there = open_store("s3://shared/runs/killed")
    for stage in TRAINED:
        run = Run(tmp_path / "killed", stage)
        run.folder.mkdir(parents=True)
        (run.folder / "metrics.jsonl").write_bytes(there.read(f"{stage}/metrics.jsonl"))
        killed, whole = trajectory(tmp_path / "killed", stage), trajectory(tmp_path / "undisturbed", stage)
        assert [set(line) for line in killed] == [set(line) for line in whole]
        for one, other in zip(killed, whole, strict=True):
            assert one == pytest.approx(other, rel=1e-3, abs=1e-3), stage
