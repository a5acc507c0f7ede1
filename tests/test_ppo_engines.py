"""PPO whose completions are sampled by Ray actors beside the trainer, also when one is killed."""

import os
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
    return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)


def engines(process):
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.Error):
            if "ray::RolloutEngine" in " ".join(child.cmdline()):
                found.append(child)
    return found


@pytest.mark.timeout(2 * WAIT)
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a worker and an engine take a CPU each")
def test_a_run_goes_on_when_its_engine_is_killed(folder):
    process = start(folder, "beside", "--set", "ppo.rollout_engines=1")
    deadline = time.monotonic() + WAIT
    while not any(line["step"] >= 2 for line in Run(folder / "runs" / "beside", "ppo").metrics()):
        assert process.poll() is None and time.monotonic() < deadline, (folder / "beside.log").read_text()[-3000:]
        time.sleep(0.02)
    (engine,) = engines(process)
    engine.kill()
    assert process.wait(WAIT) == 0, (folder / "beside.log").read_text()[-3000:]
    assert [line["step"] for line in Run(folder / "runs" / "beside", "ppo").metrics()] == list(range(1, 17))
    assert "a worker died" not in (folder / "beside.log").read_text()
    assert "another takes its place" in (folder / "runs" / "beside" / "ppo" / "worker-0.log").read_text()


PROMPTS = [[5, 6, 7 + i % 9] for i in range(64)]


def sampled(folder):
    """In a Ray worker: completions by an engine of its own, and by two beside it; of weights that change; of an engine
    that was killed. For each the share of completions that are equal."""
    import ray
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from serving.engine.api import SamplingParams
    from serving.engine.torch_engine import TorchEngine
    from training.ppo_engines import RemoteRollouts
    from training.ppo_rollout import Rollouts

    policy = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    tokenizer, size = AutoTokenizer.from_pretrained(folder), {"max_num_seqs": 64, "context_tokens": 16}
    params = SamplingParams(max_new_tokens=8, temperature=1.0)
    own = Rollouts(policy, policy, TorchEngine(policy, tokenizer, **size), params)
    beside = RemoteRollouts(policy, 2, params, policy.config, policy.generation_config, tokenizer, **size)

    def both(seeds):
        for rollouts in (own, beside):
            rollouts.refresh()
        return own.sample(PROMPTS, seeds), beside.sample(PROMPTS, seeds)

    def equal(some, others):
        return sum(a == b for a, b in zip(some, others, strict=True)) / len(PROMPTS)

    before, same = both(range(64))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    after, moved = both(range(64))
    ray.kill(beside._engines[1])
    replaced = beside.sample(PROMPTS, range(64))
    beside.close()
    return equal(before, same), equal(after, moved), equal(before, after), equal(after, replaced)


def test_an_engine_stops_at_the_tokens_that_the_policy_stops_at(tiny_world):
    """They stand in generation_config.json; config.json has the turn's end alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from serving.model_folder import eos_ids
    from training.ppo_engines import RolloutEngine

    policy, tokenizer = (kind.from_pretrained(tiny_world.llama) for kind in (AutoModelForCausalLM, AutoTokenizer))
    engine = RolloutEngine(policy.config, policy.generation_config, tokenizer, "cpu", max_num_seqs=1, context_tokens=16)
    assert eos_ids(engine._model, tokenizer) == eos_ids(policy, tokenizer)
    assert len(eos_ids(policy, tokenizer)) > 1


def test_engines_sample_what_the_policy_would(tiny_world):
    """All but the few completions where rounding makes another token the sampled one."""
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # which workers cannot import
    ray.init(address="local", num_cpus=3, include_dashboard=False, object_store_memory=100_000_000)
    try:
        same, moved, changed, replaced = ray.get(ray.remote(num_cpus=1)(sampled).remote(str(tiny_world.gpt2)))
    finally:
        ray.shutdown()
    assert min(same, moved, replaced) > 0.9 and changed < 0.5


def test_engines_are_placed_beside_their_workers():
    nodes = {"a": {"CPU": 4.0}, "b": {"CPU": 3.0}}
    need = Need(engines=2)
    assert capacity(nodes, need) == 2
    assert most_workers(nodes, (1, 2, 4), need) == 2
    assert with_all_cpus(nodes, 1, need).cpus == 2  # of 3 parts: two on a, one on b
    said = shortage("ppo", nodes, (3,), need)
    assert "3 workers of 1 CPU with 2 rollout engines of as much beside each" in said and "Missing: 2 more CPU" in said
