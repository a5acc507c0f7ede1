"""Training over several Ray nodes: the laptop's losses, nodes that die and join, a request that cannot be met."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from nodes import cluster

from training.run import Run

WAIT = 240  # seconds for one thing to happen, on a busy machine
STEPS = 200  # some seconds, since a worker looks once a second whether it should stop
SIZES = {"num_layers": 2, "num_heads": 2, "hidden_size": 32, "seq_len": 128, "tokens": 8 * 128 * STEPS}
SHARED = {"batch_size": 8, "micro_batch_size": 4, "checkpoint_every": 20, "dtype": "fp32", "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def nodes():
    with cluster(nodes=1, cpus=1) as made:
        yield made


@pytest.fixture
def two_nodes(nodes):
    while len(living(nodes)) < 2:
        nodes.add(1)
    return nodes


def living(nodes):
    return [index for index, node in enumerate(nodes.nodes) if node.process.poll() is None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_world):
    folder = tmp_path_factory.mktemp("cluster")
    recipe = {
        "name": "nano",
        "seed": 5,
        "val_fraction": 0.2,
        "tokenizer": {"text": [str(tiny_world.corpus)], "vocab_size": 512},
        "pretrain": {"text": [str(tiny_world.corpus)], **SIZES, **SHARED},
    }
    (folder / "nano.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    return folder


def start(folder, name, *words, before=(), env=None):
    log = (folder / f"{name}.log").open("a")
    command = [*before, sys.executable, "-m", "services.cli", "train", "nano.yaml", "--run", name, *words]
    return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=env, start_new_session=True)


def said(folder, name):
    return (folder / f"{name}.log").read_text()


def finish(process, folder, name, code=0):
    assert process.wait(WAIT) == code, said(folder, name)[-3000:]


def wait_for(happened, process, what):
    deadline = time.monotonic() + WAIT
    while not happened():
        assert process.poll() is None, f"the driver ended before {what}"
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.05)


def wait_for_step(folder, name, step, process):
    run = Run(folder / "runs" / name, "pretrain")
    wait_for(lambda: any(line["step"] >= step for line in run.metrics()), process, f"step {step}")


def losses(folder, name):
    return [line["loss"] for line in Run(folder / "runs" / name, "pretrain").metrics()]


@pytest.fixture(scope="module")
def laptop(folder):
    """The losses of one worker on a Ray of its own."""
    process = start(folder, "laptop")
    finish(process, folder, "laptop")
    return losses(folder, "laptop")


def begin_with_the_tokenizer_of_the_laptop(folder, name):
    shutil.copytree(folder / "runs" / "laptop" / "tokenizer", folder / "runs" / name / "tokenizer")


@pytest.mark.timeout(1200)
def test_on_two_nodes_stopped_by_sigterm_it_goes_on_to_the_losses_of_the_laptop(nodes, folder, laptop):
    """A worker on each node, once the second has joined.

    The first SIGTERM comes early: the checkpoint is of the step it was at. The second comes after the last step, where
    none is left that could make a checkpoint: the stage ends, its manifest is written, and no other starts.
    """
    for other in living(nodes)[1:]:
        nodes.kill(other)
    begin_with_the_tokenizer_of_the_laptop(folder, "stopped")
    rare = ("--workers", "2", "--set", "pretrain.checkpoint_every=1000", "--set", "pretrain.eval_every=1000")
    words = (*rare, "--set", "evaluate={num_prompts: 4, max_new_tokens: 4}")
    process = start(folder, "stopped", *words, before=nodes.command(0), env=nodes.env)
    wait_for(lambda: "Missing: 1 more CPU" in said(folder, "stopped"), process, "it says what is missing")
    nodes.add(1)
    wait_for_step(folder, "stopped", 3, process)
    os.kill(process.pid, signal.SIGTERM)
    finish(process, folder, "stopped", code=143)
    assert "stopped; the same command goes on" in said(folder, "stopped")
    step, _ = Run(folder / "runs" / "stopped", "pretrain").latest_checkpoint()
    assert step >= 3

    process = start(folder, "stopped", *words, before=nodes.command(0), env=nodes.env)
    wait_for_step(folder, "stopped", STEPS, process)  # the last, before the model is exported
    os.kill(process.pid, signal.SIGTERM)
    finish(process, folder, "stopped", code=143)
    assert f"goes on from step {step}" in said(folder, "stopped")
    assert losses(folder, "stopped") == pytest.approx(laptop, abs=1e-3)
    assert (folder / "runs" / "stopped" / "pretrain" / "manifest.json").exists()
    assert "evaluate: starts" not in said(folder, "stopped")


@pytest.mark.timeout(1200)
def test_stopped_in_a_stage_without_checkpoints_it_starts_no_other(nodes, folder):
    process = start(folder, "early", before=nodes.command(0), env=nodes.env)
    wait_for(lambda: "tokenizer: starts" in said(folder, "early"), process, "the tokenizer starts")
    os.kill(process.pid, signal.SIGTERM)
    finish(process, folder, "early", code=143)
    assert "pretrain: starts" not in said(folder, "early")


@pytest.mark.timeout(1200)
def test_too_many_workers_are_refused_with_what_is_missing(two_nodes, folder, laptop):
    begin_with_the_tokenizer_of_the_laptop(folder, "many")
    env = {**two_nodes.env, "CHATFORGE_PLACEMENT_TIMEOUT_S": "2"}
    process = start(
        folder, "many", "--workers", "4", "--set", "pretrain.micro_batch_size=2", before=two_nodes.command(0), env=env
    )
    finish(process, folder, "many", code=2)
    missing = r"error: pretrain: needs 4 workers of 1 CPU.*the cluster holds 2 .*Missing: 2 more CPU"
    assert re.search(missing, said(folder, "many")), said(folder, "many")


@pytest.mark.timeout(1200)
def test_a_node_is_lost(two_nodes, folder, laptop):
    """With 1..2 workers one is left."""
    begin_with_the_tokenizer_of_the_laptop(folder, "lost")
    process = start(folder, "lost", "--workers", "1..2", before=two_nodes.command(0), env=two_nodes.env)
    wait_for_step(folder, "lost", 30, process)
    two_nodes.kill(living(two_nodes)[-1])
    finish(process, folder, "lost")
    assert re.search("pretrain: 2 workers .*a worker died .*pretrain: 1 workers", said(folder, "lost"), re.DOTALL)
    assert losses(folder, "lost") == pytest.approx(laptop, abs=1e-3)
