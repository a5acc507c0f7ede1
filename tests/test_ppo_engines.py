"""PPO whose completions are sampled by a Ray actor beside the trainer, also when that is killed: the same numbers."""

import os
import re
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
import yaml
from transformers import AutoConfig, AutoModelForSequenceClassification

from training.placement import Need, capacity, most_workers, shortage, with_all_cpus
from training.run import Run

WAIT = 240  # seconds for one thing to happen, on a busy machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_world):
    folder = tmp_path_factory.mktemp("engines")
    config = AutoConfig.from_pretrained(tiny_world.gpt2, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "reward")
    ppo = {
        "model": str(tiny_world.gpt2),
        "reward_model": str(folder / "reward"),
        "prompts": [str(tiny_world.prompts)],
        "total_episodes": 256,
        "response_length": 8,
        "batch_size": 16,
        "micro_batch_size": 8,
        "dtype": "fp32",
    }
    (folder / "nano.yaml").write_text(yaml.safe_dump({"name": "nano", "val_fraction": 0.2, "ppo": ppo}), "utf-8")
    return folder


def start(folder, name, *words):
    log = (folder / f"{name}.log").open("a")
    command = [sys.executable, "-m", "services.cli", "train", "nano.yaml", "--run", name, *words]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # of both: more threads round otherwise
    return subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)


def numbers(folder, name):
    lines = Run(folder / "runs" / name, "ppo").metrics()
    return [{k: v for k, v in line.items() if not re.search("time|per_second", k)} for line in lines]


def engines(process):
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.Error):
            if "ray::RolloutEngine" in " ".join(child.cmdline()):
                found.append(child)
    return found


@pytest.mark.timeout(4 * WAIT)
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a worker and an engine take a CPU each")
def test_an_engine_beside_the_trainer_gives_its_numbers_also_when_it_is_killed(folder):
    own = start(folder, "own")
    assert own.wait(WAIT) == 0, (folder / "own.log").read_text()[-3000:]

    beside = start(folder, "beside", "--set", "ppo.rollout_engines=1")
    deadline = time.monotonic() + WAIT
    while not any(line["step"] >= 2 for line in numbers(folder, "beside")):
        assert beside.poll() is None and time.monotonic() < deadline, (folder / "beside.log").read_text()[-3000:]
        time.sleep(0.02)
    (engine,) = engines(beside)
    engine.kill()
    assert beside.wait(WAIT) == 0, (folder / "beside.log").read_text()[-3000:]
    assert numbers(folder, "beside") == numbers(folder, "own")
    assert "a worker died" not in (folder / "beside.log").read_text()
    assert "another takes its place" in (folder / "runs" / "beside" / "ppo" / "worker-0.log").read_text()


def test_engines_are_placed_beside_their_workers():
    nodes = {"a": {"CPU": 4.0}, "b": {"CPU": 3.0}}
    need = Need(engines=2)
    assert capacity(nodes, need) == 2
    assert most_workers(nodes, (1, 2, 4), need) == 2
    assert with_all_cpus(nodes, 1, need).cpus == 2  # of 3 parts: two on a, one on b
    said = shortage("ppo", nodes, (3,), need)
    assert "3 workers of 1 CPU with 2 rollout engines of as much beside each" in said and "Missing: 2 more CPU" in said
