"""PPO end to end in one process: oracles whose answer is known, resume, LoRA, ZeRO, and TRL 1.12's own numbers."""

import itertools
import json
import math
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import record_trl112 as trl112
import torch
from accelerate.state import AcceleratorState
from conftest import TinyWorld
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

from training import zero
from training.config import ConfigError, LoraConfig, PPOConfig
from training.ppo import build, run
from training.ppo_models import Episodes, RewardModel, Scorer, action_logits, logprobs, state_values
from training.ppo_trainer import Experience, PPOModels, PPOTrainer
from training.run import Run, StageError

Build = Callable[..., PPOTrainer]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from more, and lose much where another process has the core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def settings(tiny_world: TinyWorld, tmp_path: Path) -> dict[str, Any]:
    """PPOConfig's fields for one short rollout on the tiny world, with a reward model of random weights."""
    return {
        "model": str(tiny_world.gpt2),
        "reward_model": str(reward_model(tiny_world.gpt2, tmp_path)),
        "prompts": [str(tiny_world.prompts)],
        "total_episodes": 16,
        "batch_size": 16,
        "micro_batch_size": 8,
        "response_length": 8,
        "dtype": "fp32",
        "missing_eos_penalty": 0.0,
    }


@pytest.fixture
def make(settings: dict[str, Any], tmp_path: Path) -> Build:
    """A PPOTrainer of `settings`, with other fields where they are given."""
    numbers = itertools.count()

    def made(reward: Any = None, run: Run | None = None, **fields: Any) -> PPOTrainer:
        run = run or Run(tmp_path / f"run{next(numbers)}", "ppo")
        run.folder.mkdir(parents=True, exist_ok=True)
        AcceleratorState._reset_state()  # a worker makes one trainer in its life
        return build(PPOConfig(**(settings | fields)), run, reward)

    return made


def reward_model(policy: Path, folder: Path) -> Path:
    """A reward model folder with a random head, and the statistics that its rewards are normalised by."""
    folder = folder / "reward_model"
    if not folder.exists():
        torch.manual_seed(1)
        config = AutoConfig.from_pretrained(policy, num_labels=1)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        card = {"kind": "reward", "reward_mean": 0.5, "reward_std": 2.0}
        (folder / "chatforge.json").write_text(json.dumps(card), "utf-8")
    return folder


CONTAINED = 102  # a token that a quarter of the untrained policy's completions have


def contains(_: Any, completions: list[list[int]]) -> Tensor:
    return torch.tensor([float(CONTAINED in ids) for ids in completions])


def counts(_: Any, completions: list[list[int]]) -> Tensor:
    """What `contains` means to reward, with a flaw: saying it again pays again."""
    return torch.tensor([float(ids.count(CONTAINED)) for ids in completions])


def constant(_: Any, completions: list[list[int]]) -> Tensor:
    return torch.ones(len(completions))


def steps(trainer: PPOTrainer, number: int) -> list[dict[str, float]]:
    return [trainer.step(rollout) for rollout in range(1, number + 1)]


ORACLE: dict[str, Any] = {
    "batch_size": 128,
    "micro_batch_size": 64,
    "total_episodes": 128 * 12,
    "learning_rate": 4e-4,
    "critic_learning_rate": 1e-3,
}


# ---- oracles: rewards whose best policy is known


def test_a_token_that_pays_is_said_at_a_bounded_kl(make: Build) -> None:
    history = steps(make(contains, kl_coef=0.02, **ORACLE), 12)
    assert history[0]["reward"] < 0.35
    assert history[-1]["reward"] >= 0.9
    assert history[-1]["kl"] < 15


def test_a_constant_reward_teaches_nothing(make: Build) -> None:
    history = steps(make(constant, **ORACLE), 5)
    assert history[-1]["kl"] < 1.5
    assert history[-1]["entropy"] == pytest.approx(history[0]["entropy"], abs=0.15)
    assert history[-1]["value_loss"] < 0.05 < history[0]["value_loss"]


def test_an_endless_kl_coefficient_holds_the_policy(make: Build) -> None:
    gentle = ORACLE | {"learning_rate": 2e-4}
    held = steps(make(contains, kl_coef=1e4, **gentle), 7)
    assert all(m["kl"] < 0.4 for m in held)
    assert held[-1]["reward"] == pytest.approx(held[0]["reward"], abs=0.15)
    free = steps(make(contains, kl_coef=0.0, **gentle), 7)
    assert free[-1]["kl"] > 2


def test_the_kl_holds_back_a_reward_with_a_flaw(make: Build) -> None:
    exploited = steps(make(counts, kl_coef=0.0, **ORACLE), 9)[-1]
    held = steps(make(counts, kl_coef=0.5, **ORACLE), 9)[-1]
    assert exploited["reward"] > 2, "the flaw was not found: the test tests nothing"
    assert exploited["distinct_2"] < 0.7 < held["distinct_2"]
    assert held["kl"] < 4 < exploited["kl"]


def test_the_adaptive_coefficient_rises_where_the_kl_is_above_its_target(make: Build) -> None:
    trainer = make(contains, kl_coef=0.02, kl_target=0.001, kl_horizon=100, learning_rate=1e-3)
    coefficients = [m["kl_coef"] for m in steps(trainer, 3)]
    assert coefficients[0] == 0.02
    assert coefficients[1] == pytest.approx(0.02 * (1 - 0.2 * 0.16))  # no KL yet; 16 episodes of a horizon of 100
    assert coefficients[2] == pytest.approx(coefficients[1] * (1 + 0.2 * 0.16))


# ---- the first mini-batch


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("lora", [None, LoraConfig()])
def test_kl_is_zero_and_the_ratio_one_on_the_first_mini_batch(make: Build, dtype: str, lora: LoraConfig | None) -> None:
    first = make(contains, dtype=dtype, lora=lora, num_ppo_epochs=1, num_mini_batches=1).step(1)
    assert first["kl"] == 0.0
    assert first["approx_kl"] < (1e-10 if dtype == "fp32" else 1e-4)
    assert first["clipfrac"] == 0.0


def test_dropout_is_off(make: Build, tiny_world: TinyWorld, tmp_path: Path) -> None:
    for folder in (tiny_world.gpt2, reward_model(tiny_world.gpt2, tmp_path)):
        shutil.copytree(folder, tmp_path / f"dropout-{folder.name}")
        config = tmp_path / f"dropout-{folder.name}" / "config.json"
        shape = json.loads(config.read_text("utf-8"))
        config.write_text(json.dumps(shape | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.5)), "utf-8")
    paths = {"model": str(tmp_path / "dropout-gpt2"), "reward_model": str(tmp_path / "dropout-reward_model")}
    fields: dict[str, Any] = {"num_ppo_epochs": 1, "num_mini_batches": 1}
    assert make(contains, **paths, **fields).step(1) == make(contains, **fields).step(1)


def test_the_critic_is_the_reward_model_at_step_0(make: Build, tiny_world: TinyWorld, tmp_path: Path) -> None:
    """Read at the last state of an episode, and normalised as the reward is."""
    trainer = make()
    prompts, completions = [[5, 6, 7], [8, 9]], [[10, 11, 12, 2], [13, 2]]
    model = AutoModelForSequenceClassification.from_pretrained(reward_model(tiny_world.gpt2, tmp_path))
    raw = [model(torch.tensor([p + c])).logits.item() for p, c in zip(prompts, completions, strict=True)]
    expected = [(score - 0.5) / 2.0 for score in raw]
    assert trainer.models.reward(prompts, completions).tolist() == pytest.approx(expected, abs=1e-5)

    # The state after the last action is the prompt of an episode that goes on.
    episodes = Episodes.of([p + c for p, c in zip(prompts, completions, strict=True)], [[3], [3]], torch.device("cpu"))
    assert state_values(trainer.models.critic, episodes)[:, 0].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "extra",
    [{}, {"temperature": 0.7}, {"lora": LoraConfig()}, {"zero_stage": 3}],
    ids=["plain", "0.7", "lora", "zero3"],
)
def test_sampler_and_trainer_agree_on_logprobs(make: Build, extra: dict[str, Any]) -> None:
    """After an update too. The engine's are of the model's own distribution; at a temperature the logits are scaled."""
    trainer = make(contains, learning_rate=1e-2, **extra)
    temperature = trainer.config.temperature
    assert trainer.step(1)["approx_kl"] > 1e-3
    trainer.rollouts.refresh()
    prompts, seeds = trainer.next_prompts(1)
    params = [replace(trainer.rollouts.params, seed=seed, logprobs=True) for seed in seeds]
    drawn = trainer.rollouts.engine.generate_all(prompts, params)
    completions = [list(c.token_ids) for c in drawn]
    assert trainer.rollouts.sample(prompts, seeds) == completions
    episodes = Episodes.of(prompts, completions, torch.device("cpu"))
    with torch.no_grad():
        own = logprobs(trainer.models.policy, episodes, temperature=1.0)
        slow = torch.log_softmax(action_logits(trainer.models.policy, episodes) / temperature, -1)
    for row, completion in enumerate(drawn):
        assert own[row, : len(completion.logprobs)].tolist() == pytest.approx(completion.logprobs, abs=1e-4)
    measured = trainer.measure(episodes)[0]
    expected = slow.gather(-1, episodes.actions[..., None]).squeeze(-1)
    assert torch.allclose(measured[episodes.mask], expected[episodes.mask], atol=1e-5)


def test_padding_changes_no_logprob_value_or_reward(make: Build) -> None:
    trainer = make()
    prompts, completions = [[5, 6, 7, 8, 9], [10, 11], [12]], [[13, 2], [14, 15, 16, 2], [17, 18, 19]]
    together = Episodes.of(prompts, completions, torch.device("cpu"))
    logprob, reference, entropy, values = trainer.measure(together)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        alone = trainer.measure(Episodes.of([prompt], [completion], torch.device("cpu")))
        width = len(completion)
        for batched, single in zip((logprob, reference, values), (alone[0], alone[1], alone[3]), strict=True):
            assert torch.allclose(batched[row, :width], single[0], atol=1e-5)
            assert not batched[row, width:].any()
        assert entropy[row].item() == pytest.approx(alone[2].item(), abs=1e-4)
        reward = trainer.models.reward([prompt], [completion])
        assert trainer.models.reward(prompts, completions)[row].item() == pytest.approx(reward.item(), abs=1e-5)


# ---- the update


def captured(trainer: PPOTrainer) -> tuple[Episodes, Experience]:
    """What one rollout hands to the update."""
    seen: list[tuple[Episodes, Experience]] = []

    def update(episodes: Episodes, experience: Experience, rollout: int) -> dict[str, float]:
        seen.append((episodes, experience))
        return {}

    trainer.update = update  # type: ignore[method-assign]
    trainer.step(1)
    return seen[0]


def test_a_turn_without_its_end_is_fined_on_its_last_action(make: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended by the document's end token, or cut at the length limit, a turn has not ended."""
    trainer = make(constant, missing_eos_penalty=3.0, lam=1.0, batch_size=4, num_mini_batches=1, micro_batch_size=4)
    end, document = trainer.processing_class.eos_token_id, trainer.processing_class.bos_token_id
    completions = [[9, end], [9, 8, document], [9] * 8, [end]]
    monkeypatch.setattr(trainer.rollouts, "sample", lambda prompts, seeds: completions)
    episodes, experience = captured(trainer)
    last = episodes.mask.sum(1) - 1
    # With λ = γ = 1 and no KL yet, the return of every action is the score.
    for row, score in enumerate([1.0, -2.0, -2.0, 1.0]):
        returns = experience.returns[row]
        assert returns[: last[row] + 1].tolist() == pytest.approx([score] * (last[row] + 1), abs=1e-5)
        assert not returns[last[row] + 1 :].any()


@pytest.mark.parametrize("micro_batch_size", [2, 16])
def test_micro_batches_are_a_matter_of_memory_alone(make: Build, micro_batch_size: int) -> None:
    """Same metrics, same number of optimiser steps, same weights."""
    one, other = make(contains, micro_batch_size=8), make(contains, micro_batch_size=micro_batch_size)
    assert other.step(1) == pytest.approx(one.step(1), abs=1e-5)
    for name in ("policy", "critic"):
        a, b = getattr(one.models, name), getattr(other.models, name)
        assert a.global_steps == b.global_steps == 4 * 2  # num_ppo_epochs × num_mini_batches
        for (key, p), q in zip(a.module.named_parameters(), b.module.parameters(), strict=True):
            assert torch.allclose(p, q, atol=2e-5), key


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_every_zero_stage_gives_the_same_numbers(make: Build, zero_stage: int) -> None:
    """Two rollouts, so that the second one samples from weights that the first has changed."""
    assert steps(make(contains, zero_stage=zero_stage), 2)[1] == pytest.approx(steps(make(contains), 2)[1], abs=1e-4)


def test_lora_moves_adapters_alone_and_samples_from_them_merged(make: Build, tiny_world: TinyWorld) -> None:
    trainer = make(contains, lora=LoraConfig(r=4, alpha=8), learning_rate=1e-2, total_episodes=32)
    trainer.train()
    trainer.export()
    merged = AutoModelForCausalLM.from_pretrained(trainer.run.model)
    base = AutoModelForCausalLM.from_pretrained(tiny_world.gpt2)
    prompt = torch.tensor([[5, 6, 7, 8]])
    assert not torch.allclose(merged(prompt).logits, base(prompt).logits, atol=1e-2)
    trainer.rollouts.refresh()
    assert torch.allclose(trainer.rollouts.model(prompt).logits, merged(prompt).logits, atol=1e-4)


# ---- the whole stage


@pytest.mark.parametrize("extra", [{}, {"lora": LoraConfig()}, {"zero_stage": 3}], ids=["plain", "lora", "zero3"])
def test_a_killed_run_goes_on_as_if_undisturbed(make: Build, tmp_path: Path, extra: dict[str, Any]) -> None:
    fields: dict[str, Any] = extra | {"total_episodes": 64, "checkpoint_every": 16, "kl_target": 1.0, "kl_horizon": 100}
    whole, broken = Run(tmp_path / "whole", "ppo"), Run(tmp_path / "broken", "ppo")
    make(contains, whole, **fields).train()

    def pulls_the_plug(prompts: Any, completions: Any) -> Tensor:
        if len(broken.metrics()) == 3:
            raise KeyboardInterrupt
        return contains(prompts, completions)

    with pytest.raises(KeyboardInterrupt):
        make(pulls_the_plug, broken, **fields).train()
    latest = broken.latest_checkpoint()
    assert latest is not None
    assert latest[0] == 2  # so the third rollout is taken again
    make(contains, broken, **fields).train()

    def numbers(run: Run) -> list[dict[str, float]]:
        return [{k: v for k, v in m.items() if k not in ("time", "episodes_per_second")} for m in run.metrics()]

    assert [m["step"] for m in numbers(broken)] == [1, 2, 3, 4]
    assert numbers(broken) == numbers(whole)


def test_the_last_rollout_leaves_no_checkpoint(make: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves the model: policy, critic and both optimisers were written, sent, and deleted at once."""
    saved: list[int] = []
    monkeypatch.setattr(PPOTrainer, "save_checkpoint", lambda self, rollout: saved.append(rollout))
    make(constant, total_episodes=48, checkpoint_every=1, num_ppo_epochs=1).train()
    assert saved == [1, 2]


def test_the_stage_leaves_a_model_folder(tiny_world: TinyWorld, tmp_path: Path) -> None:
    AcceleratorState._reset_state()
    stage = Run(tmp_path / "run", "ppo")
    stage.folder.mkdir(parents=True)
    config = PPOConfig(
        model=str(tiny_world.llama),
        reward_model=str(reward_model(tiny_world.gpt2, tmp_path)),
        prompts=[str(tiny_world.prompts)],
        total_episodes=32,
        batch_size=16,
        response_length=8,
    )
    run(config, stage)
    assert json.loads((stage.model / "chatforge.json").read_text("utf-8"))["kind"] == "causal-lm"
    assert AutoTokenizer.from_pretrained(stage.model).chat_template
    trained, start = (AutoModelForCausalLM.from_pretrained(folder) for folder in (stage.model, tiny_world.llama))
    assert trained.generation_config.eos_token_id == start.generation_config.eos_token_id
    assert not torch.equal(trained.lm_head.weight, start.lm_head.weight)
    first, second = stage.metrics()
    assert (first["step"], second["step"], second["total"]) == (1, 2, 2)
    assert first["kl"] == 0.0 < second["episodes_per_second"]


def test_a_batch_that_does_not_divide_is_refused_by_name(make: Build) -> None:
    with pytest.raises(ConfigError, match=r"^batch_size=16 .* num_mini_batches × .* = 1 × 3 × 5"):
        make(num_mini_batches=3)
    with pytest.raises(ConfigError, match=r"^batch_size=16 .* micro_batch_size = 1 × 2 × 3 = 6; change"):
        make(micro_batch_size=3)


def test_prompts_that_leave_no_room_stop_the_stage(make: Build) -> None:
    with pytest.raises(StageError, match=r"ppo.prompts: none of \d+ leaves room for response_length=250"):
        make(response_length=250)


# ---- gates


def test_a_kl_beyond_the_gate_stops_the_run(make: Build) -> None:
    trainer = make(contains, total_episodes=64, learning_rate=1e-2, max_kl=0.5)
    with pytest.raises(StageError, match=r"above ppo.max_kl=0.5. Raise ppo.kl_coef=0.05"):
        trainer.train()


def test_a_reward_that_is_no_number_stops_the_run_before_a_checkpoint(make: Build) -> None:
    trainer = make(lambda prompts, completions: torch.full((len(completions),), math.nan), checkpoint_every=1)
    with pytest.raises(StageError, match=r"reward.* not finite"):
        trainer.train()
    assert trainer.run.latest_checkpoint() is None


def test_turns_that_no_longer_end_stop_the_run(make: Build) -> None:
    trainer = make()
    healthy, endless = {"kl": 1.0, "stop_rate": 0.9}, {"kl": 1.0, "stop_rate": 0.1}
    trainer.check(healthy)
    for _ in range(4):
        trainer.check(endless)
    trainer.check(healthy)  # once is not for good
    for _ in range(4):
        trainer.check(endless)
    with pytest.raises(StageError, match=r"10% end their turn, 90% did at the start. Raise ppo.missing_eos_penalty"):
        trainer.check(endless)


# ---- more than one worker


def one_worker(rank: int, workers: int, port: int, config: PPOConfig, root: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    trainer = build(config, Run(root, "ppo", workers=workers), contains)
    trainer.train()
    trainer.export()
    torch.distributed.destroy_process_group()


def test_two_workers_do_what_one_does(make: Build, settings: dict[str, Any], tmp_path: Path) -> None:
    """With one mini-batch a rollout, so that the same episodes share every step."""
    fields: dict[str, Any] = {"num_mini_batches": 1, "total_episodes": 32, "zero_stage": 2, "whiten_rewards": True}
    alone = make(contains, **fields)
    alone.train()
    config = PPOConfig(**(settings | fields))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    root = tmp_path / "two"
    (root / "ppo").mkdir(parents=True)
    spawn(one_worker, args=(2, port, config, root), nprocs=2)

    skipped = ("time", "episodes_per_second", "distinct_2")  # distinct_2 is a mean over workers
    for two, one in zip(Run(root, "ppo").metrics(), alone.run.metrics(), strict=True):
        assert {k: v for k, v in two.items() if k not in skipped} == pytest.approx(
            {k: v for k, v in one.items() if k not in skipped}, abs=1e-4
        )


# ---- agreement with TRL 1.12


class Replay:
    """The engine's place in the loop, giving recorded completions."""

    def __init__(self, completions: list[list[int]]) -> None:
        self.completions = completions

    def refresh(self) -> None:
        pass

    def close(self) -> None:
        pass

    def sample(self, prompts: Any, seeds: Any) -> list[list[int]]:
        return self.completions


@pytest.mark.parametrize("micro_batch_size", [8, 2])
def test_an_update_agrees_with_trl_1_12(tmp_path: Path, micro_batch_size: int) -> None:
    """On the trajectory that record_trl112.py recorded: what was measured, both epochs' losses, the weights after."""
    recorded = dict(np.load(trl112.FIXTURE))
    trainer = trl112_trainer(recorded, tmp_path, micro_batch_size)
    seen: dict[str, Any] = {}
    update = trainer.update

    def watched(episodes: Episodes, experience: Experience, rollout: int) -> dict[str, float]:
        seen.update(experience=experience)
        return update(episodes, experience, rollout)

    trainer.update = watched  # type: ignore[method-assign]
    metrics = trainer.step(1)

    for name in ("logprobs", "values", "advantages", "returns"):
        assert close(getattr(seen["experience"], name), recorded[name]), name
    prompts, completions = trl112.episodes()
    ended = torch.arange(trl112.EPISODES) < trl112.ENDED
    reward = trainer.models.reward(prompts, completions.tolist()) - 1.0 * ~ended
    assert close(reward, recorded["scores"])
    kl = (recorded["logprobs"] - recorded["ref_logprobs"]).sum(1).mean()
    assert metrics["kl"] == pytest.approx(kl, abs=1e-5)
    names = {"approx_kl": "approxkl", "policy_loss": "pg_loss", "value_loss": "vf_loss"}
    names |= {"clipfrac": "pg_clipfrac", "value_clipfrac": "vf_clipfrac"}
    for ours, theirs in names.items():
        assert metrics[ours] == pytest.approx(recorded[f"{theirs}_stats"].mean(), abs=1e-5), ours
    for part in ("policy", "critic"):
        module = getattr(trainer.models, part).module
        for name, weight in (module if part == "policy" else module.model).state_dict().items():
            assert close(weight, recorded[f"after/{part}/{name}"]), (part, name)


def close(ours: Tensor, theirs: np.ndarray) -> bool:
    return torch.allclose(ours, torch.from_numpy(theirs), atol=1e-5, rtol=1e-5)


def trl112_trainer(recorded: dict[str, np.ndarray], folder: Path, micro_batch_size: int) -> PPOTrainer:
    """Our trainer on the recorded weights, with the recording's settings and its SGD."""
    AcceleratorState._reset_state()
    zero.init_distributed("cpu")
    parts: dict[str, Any] = {}
    for part in ("policy", "reference", "reward", "critic"):
        causal = part in ("policy", "reference")
        parts[part] = trl112.tiny(GPT2LMHeadModel if causal else GPT2ForSequenceClassification, seed=0).eval()
        weights = {k.removeprefix(f"{part}/"): v for k, v in recorded.items() if k.startswith(f"{part}/")}
        parts[part].load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    config = PPOConfig(
        prompts=["recorded"],
        total_episodes=trl112.EPISODES,
        batch_size=trl112.EPISODES,
        micro_batch_size=micro_batch_size,
        response_length=trl112.ACTIONS,
        dtype="fp32",
        max_grad_norm=1e9,  # TRL 1.12 clips nothing
        **trl112.SETTINGS,
    )
    run = Run(folder / "trl112", "ppo")
    run.folder.mkdir(parents=True)

    def engine(model: nn.Module) -> Any:
        return zero.initialize(model, config, run, torch.optim.SGD(model.parameters(), lr=trl112.LEARNING_RATE))

    models = PPOModels(
        policy=engine(parts["policy"]),
        critic=engine(Scorer(parts["critic"])),
        reference=parts["reference"],
        reward=RewardModel(Scorer(parts["reward"]), micro_batch_size, nullcontext),
    )
    prompts, completions = trl112.episodes()
    replay: Any = Replay(completions.tolist())
    trainer = PPOTrainer(config, run, models, replay, prompts, trl112.tokenizer())
    trainer.next_prompts = lambda rollout: (prompts, [])  # type: ignore[method-assign]
    return trainer
