"""A worker's node is killed in every stage, and another joins: the numbers of the run that nobody disturbed.

Several minutes, so it is asked for: KILL=rest. And a node that is about to be taken away: a checkpoint at once.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time

import nodes
import pytest
import yaml
from nano import TRAINED, nano, trajectory, write_data

from training.run import Run

WAIT = 240  # seconds for one thing to happen, on a busy machine
STEPS = 100_000  # nobody waits for them: what is shown happens on the way
asked = pytest.mark.skipif(os.environ.get("KILL") != "rest", reason="takes minutes: KILL=rest asks for it")


@pytest.fixture(scope="module")
def cluster():
    """The driver's node, where no worker fits, and one for the worker, the last of the list."""
    if not nodes.can_have_namespaces():
        pytest.skip("nodes cannot have addresses of their own here: one that is told to go could not be told apart")
    with nodes.cluster(nodes=1, cpus=0) as made:
        made.add(1)
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_world):
    folder = tmp_path_factory.mktemp("stages")
    write_data(folder)
    recipe = nano(tiny_world, folder)
    recipe["translation"]["pairs"] = [str(folder / "pairs.tsv")]  # a node has not the driver's working directory
    (folder / "nano.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    long = recipe["pretrain"] | {"tokens": 8 * 128 * STEPS, "checkpoint_every": 10**6, "eval_every": 10**6}
    short = {key: recipe[key] for key in ("name", "seed", "val_fraction", "tokenizer")} | {"pretrain": long}
    (folder / "long.yaml").write_text(yaml.safe_dump(short), "utf-8")
    return folder


def start(cluster, folder, name, recipe="nano.yaml", *words):
    log = (folder / f"{name}.log").open("a")
    command = [*cluster.command(0), sys.executable, "-m", "services.cli", "train", recipe, "--run", name, *words]
    env = cluster.env | {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5", "CHATFORGE_GROW_EVERY_S": "1"}
    return subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)


def said(folder, name):
    return (folder / f"{name}.log").read_text()


def wait_for_step(folder, name, stage, step, process):
    run, deadline = Run(folder / "runs" / name, stage), time.monotonic() + WAIT
    while not any(line["step"] >= step for line in run.metrics()):
        assert process.poll() is None and time.monotonic() < deadline, said(folder, name)[-3000:]
        time.sleep(0.02)


def wait_for(happened, process, folder, name):
    deadline = time.monotonic() + WAIT
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline, said(folder, name)[-3000:]
        time.sleep(0.05)


def finish(process, folder, name):
    assert process.wait(2 * WAIT) == 0, said(folder, name)[-3000:]


def stop(process, folder, name):
    process.send_signal(signal.SIGTERM)
    assert process.wait(WAIT) == 143, said(folder, name)[-3000:]


@pytest.mark.timeout(900)
def test_a_stage_takes_the_workers_of_a_node_that_comes_and_leaves_one_that_will_go(cluster, folder):
    """With a checkpoint at once: nobody else would have made one, checkpoint_every is beyond the last step."""
    process = start(cluster, folder, "moved", "long.yaml", "--workers", "1..2", "--set", "pretrain.micro_batch_size=4")
    run = Run(folder / "runs" / "moved", "pretrain")
    wait_for_step(folder, "moved", "pretrain", 20, process)
    cluster.add(1)
    grows = re.compile("1 workers .*nodes come or go.*2 workers", re.DOTALL)
    wait_for(lambda: grows.search(said(folder, "moved")), process, folder, "moved")
    grown, _ = run.latest_checkpoint()
    wait_for_step(folder, "moved", "pretrain", grown + 20, process)
    cluster.drain(-2)  # the first worker's
    wait_for(lambda: run.latest_checkpoint()[0] > grown, process, folder, "moved")
    step, saved = run.latest_checkpoint()[0], time.time()
    wait_for_step(folder, "moved", "pretrain", step + 20, process)
    stop(process, folder, "moved")
    told = said(folder, "moved")
    assert re.findall(r"pretrain: (\d) workers", told) == ["1", "2", "1"] and "a worker died" not in told
    lines = [line for line in run.metrics() if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert step == sum(line["time"] < saved for line in lines)  # those before it were not taken again


@asked
@pytest.mark.timeout(3000)
def test_a_node_killed_in_every_stage_and_another_joins(cluster, folder):
    finish(start(cluster, folder, "undisturbed"), folder, "undisturbed")
    chance = random.Random(time.time())
    process = start(cluster, folder, "killed")
    for stage in TRAINED:
        step = chance.randint(1, 12)
        print(f"{stage}: at step {step}")
        wait_for_step(folder, "killed", stage, step, process)
        cluster.kill(-1)
        cluster.add(1)
    finish(process, folder, "killed")
    assert said(folder, "killed").count("a worker died") == len(TRAINED)
    for stage in TRAINED:
        assert trajectory(folder / "runs" / "killed", stage) == trajectory(folder / "runs" / "undisturbed", stage)
