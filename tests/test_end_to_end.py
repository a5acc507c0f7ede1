"""The whole recipe through Ray, as a user runs it; then again, with its processes killed in every stage."""

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from nano import TRAINED, nano, trajectory, write_data

from training.run import Run

STAGES = ("tokenizer", "rank", "evaluate", *TRAINED)
WAIT = 240  # seconds for one thing to happen, on a busy machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_world):
    folder = tmp_path_factory.mktemp("end_to_end")
    write_data(folder)
    recipe = nano(tiny_world, folder)
    (folder / "nano.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    without = ["evaluate"]
    if KILLED is FIRST:
        without += [*TRAINED[2:], "rank"]
    killed = {key: value for key, value in recipe.items() if key not in without}
    (folder / "killed.yaml").write_text(yaml.safe_dump(killed), "utf-8")
    return folder


def start(folder, name, recipe="nano"):
    command = [sys.executable, "-m", "services.cli", "train", f"{recipe}.yaml", "--run", name]
    log = (folder / f"{name}.log").open("a")
    return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)


def finish(process, folder, name):
    assert process.wait(WAIT * 2) == 0, (folder / f"{name}.log").read_text()[-3000:]


@pytest.fixture(scope="module")
def begun(folder):
    """The run that nobody disturbs goes on beside the one that is killed: to start workers is mostly to wait."""
    process = start(folder, "undisturbed")
    yield process
    if process.poll() is None:
        process.kill()


@pytest.fixture(scope="module")
def undisturbed(folder, begun):
    finish(begun, folder, "undisturbed")
    return folder / "runs" / "undisturbed"


def descendants(process, name):
    return [p for p in psutil.Process(process.pid).children(recursive=True) if name in " ".join(cmdline(p))]


def cmdline(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def wait_for_step(run, step, process):
    """Until this process has had the stage take `step` steps; it must not end before."""
    deadline, born = time.monotonic() + WAIT, psutil.Process(process.pid).create_time()
    while time.monotonic() < deadline:
        if any(line["step"] >= step and line["time"] > born for line in run.metrics()):
            return
        assert process.poll() is None, f"the driver ended before {run.stage} took step {step}"
        time.sleep(0.02)
    raise AssertionError(f"{run.stage} never took step {step}")


def kill_worker(process):
    workers = descendants(process, "RayTrainWorker")
    assert workers
    for worker in workers:
        worker.kill()


orphans: list[psutil.Process] = []  # of killed drivers: Ray's agents take a minute or two to see that they are


def kill_driver(process):
    """And wait until nothing is left of what it had started that could disturb the next one."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    orphans.extend(children)
    disturbing = [p for p in children if not re.search("Agent|agent", " ".join(cmdline(p)))]
    _, alive = psutil.wait_procs(disturbing, timeout=60)
    assert not alive


def kill_ray(process):
    servers = [server for name in ("gcs_server", "raylet") for server in descendants(process, name)]
    assert servers
    for server in servers:
        server.kill()


def interrupt(process):
    """Ctrl-C: it says 130, and leaves no process."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(WAIT) == 130
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


KILLS = {"worker": kill_worker, "driver": kill_driver, "ray": kill_ray, "user": interrupt}
# Each kind once, in a stage of our own loop and in one of transformers' Trainer; KILL=rest in the environment takes the
# others: both together are every kind in every stage.
FIRST = {"pretrain": ["worker", "user"], "sft": ["driver", "ray"]}
REST = {stage: [kind for kind in KILLS if kind not in FIRST.get(stage, [])] for stage in TRAINED}
KILLED = REST if os.environ.get("KILL") == "rest" else FIRST


@pytest.mark.timeout(3000)
def test_killed_in_training_it_finishes_with_the_same_losses(begun, folder, request):
    process = start(folder, "killed", "killed")
    for stage, kinds in KILLED.items():
        run = Run(folder / "runs" / "killed", stage)
        for number, kind in enumerate(kinds):
            wait_for_step(run, 6 + 4 * number, process)
            KILLS[kind](process)
            if kind == "ray":  # the driver says so and ends; it does not hang
                assert process.wait(WAIT) != 0
            if kind != "worker":
                process = start(folder, "killed", "killed")
    finish(process, folder, "killed")
    undisturbed = request.getfixturevalue("undisturbed")
    for stage in KILLED:
        assert trajectory(folder / "runs" / "killed", stage) == trajectory(undisturbed, stage)


def test_every_stage_leaves_a_manifest_and_metrics(undisturbed):
    for stage in STAGES:
        assert (undisturbed / stage / "manifest.json").exists()
    for stage in TRAINED:
        assert list((undisturbed / stage / "model").rglob("*model.safetensors"))
        assert not (undisturbed / stage / "checkpoints").exists()


def test_the_same_command_again_has_nothing_to_do(undisturbed, folder):
    finish(start(folder, "undisturbed"), folder, "undisturbed")
    assert "nothing to do: every stage is done" in (folder / "undisturbed.log").read_text()


def test_a_report_can_be_drawn(undisturbed):
    from training.report import write_report

    page = write_report(undisturbed).read_text("utf-8")
    assert re.search("ppo", page, re.IGNORECASE)


def test_nothing_is_left_behind(undisturbed):
    """No process of ours still runs, whatever was killed above."""
    mine = [p for p in psutil.process_iter(["pid"]) if str(undisturbed.parents[1]) in " ".join(cmdline(p))]
    _, alive = psutil.wait_procs([*mine, *orphans], timeout=240)
    assert not alive
