"""The PPO trainer: a TRL-style trainer of our own on TRL's base classes (TRL 1.13 removed its PPO).

It keeps the names of TRL's PPOConfig. Policy and critic learn on one DeepSpeed engine each; what costs (models, reward,
rollouts) comes in through the constructor. Shapes: B episodes, C actions, as in ppo_math.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback
from trl.trainer.base_config import _BaseConfig
from trl.trainer.base_trainer import _BaseTrainer

from training import ppo_math, zero
from training.config import PPOConfig
from training.ppo_engines import RemoteRollouts
from training.ppo_models import Episodes, logprobs, logprobs_and_entropy, state_values
from training.ppo_rollout import Rollouts
from training.run import Run, StageError
from training.seeds import derived_seed
from training.trainer import trainer_arguments

# (prompts' token ids, completions' token ids) → one number per episode, [B]
Reward = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], Tensor]

RUNAWAY_ROLLOUTS = 5  # in a row with hardly a turn ended, before the stage gives up


@dataclass(frozen=True)
class PPOModels:
    """The four parts that PPO plays."""

    policy: Any  # DeepSpeedEngine of a causal LM
    critic: Any  # DeepSpeedEngine of a Scorer
    reference: nn.Module | None  # None: the policy without its adapters
    reward: Reward


@dataclass
class PPOProgress:
    """What a resumed run has to know beside weights, optimisers and random states."""

    kl_coef: float
    first_stop_rate: float | None = None
    runaway: int = 0  # rollouts in a row


@dataclass(frozen=True)
class Experience:
    """What was measured of a rollout before the update, [B, C] each, zero on pads."""

    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


class PPOTrainer(_BaseTrainer):
    """Proximal policy optimisation of a causal LM from a reward per completion."""

    processing_class: Any
    _name = "PPO"

    def __init__(
        self,
        config: PPOConfig,
        run: Run,
        models: PPOModels,
        rollouts: Rollouts | RemoteRollouts,
        prompts: list[list[int]],
        processing_class: Any,
    ) -> None:
        """`prompts`: token ids that end where an assistant's turn begins, each short enough for its completion.

        Raises ConfigError where the batch does not divide.
        """
        args = _BaseConfig(**trainer_arguments(config, run, num_train_epochs=1.0), use_cache=True)
        super().__init__(
            model=models.policy.module, args=args, processing_class=processing_class, train_dataset=prompts
        )
        self.remove_callback(PrinterCallback)
        self.config, self.run, self.models, self.rollouts, self.prompts = config, run, models, rollouts, prompts
        self.kl = ppo_math.KLController(config.kl_coef, config.kl_target, config.kl_horizon)
        self.progress = PPOProgress(config.kl_coef)
        self.device = next(models.policy.module.parameters()).device
        self.local_batch_size = config.batch_size // run.workers
        self.micro_batch_size = config.micro_batch(run.workers)
        self.state.max_steps = config.num_rollouts
        for engine in (models.policy, models.critic):
            engine.eval()  # dropout off, in the update too: ratios compare the same function

    def _send_telemetry(self) -> None:
        """None is sent."""

    def train(self) -> None:  # type: ignore[override]
        """All rollouts from the last checkpoint on; raises StageError where the run has lost its way."""
        first = self.resume() + 1
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        with closing(self.rollouts):
            for rollout in range(first, self.config.num_rollouts + 1):
                started = time.perf_counter()
                metrics = self.step(rollout)
                metrics["episodes_per_second"] = self.config.batch_size / (time.perf_counter() - started)
                self.run.log(step=rollout, total=self.config.num_rollouts, **metrics)
                self.state.global_step = rollout
                self.log(metrics)
                self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
                self.check(metrics)
                if self.control.should_training_stop:
                    break
                steps = self.config.steps_per_rollout
                if zero.checkpoint_is_due(self.config, self.run, rollout, self.config.num_rollouts, steps):
                    self.save_checkpoint(rollout)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)

    def step(self, rollout: int) -> dict[str, float]:
        """One rollout and the update on it; its metrics, over all ranks."""
        config = self.config
        # 1. Rollout: the policy answers the next prompts (Ziegler et al. 2019, 2.1).
        prompts, seeds = self.next_prompts(rollout)
        self.rollouts.refresh()
        completions = self.rollouts.sample(prompts, seeds)
        episodes = Episodes.of(prompts, completions, self.device)

        # 2. Measure: logprobs of policy and reference, values of every state, a reward for every episode.
        old_logprobs, ref_logprobs, entropy, values = self.measure(episodes)
        reward = self.models.reward(prompts, completions).to(self.device).float()
        ended = torch.tensor([ids[-1] == self.processing_class.eos_token_id for ids in completions], device=self.device)

        # 3. Reward of every action: −β·KL, and the score on the last one (Ziegler et al. 2019, eq. 2).
        scores = reward - config.missing_eos_penalty * ~ended
        kl = ppo_math.kl_per_token(old_logprobs, ref_logprobs, episodes.mask)
        rewards = ppo_math.token_rewards(scores, kl, episodes.mask, self.kl.coef)
        if config.whiten_rewards:
            rewards = ppo_math.whiten(rewards, episodes.mask, shift_mean=False)

        # 4. Advantages (Schulman et al. 2016, eq. 16), whitened over the actions of all ranks.
        advantages, returns = ppo_math.gae(rewards, values, episodes.mask, config.gamma, config.lam)
        advantages = ppo_math.whiten(advantages, episodes.mask)

        # 5. Clipped updates of policy and critic (Schulman et al. 2017, algorithm 1).
        updates = self.update(episodes, Experience(old_logprobs, values, advantages, returns), rollout)

        # 6. Account for it, then steer the KL coefficient (Ziegler et al. 2019, 2.2).
        lengths = episodes.mask.sum(1)
        reward_, kl_, entropy_, stop_rate, length = self.mean(reward, kl.sum(1), entropy, ended, lengths)
        metrics = {"reward": reward_, "kl": kl_, "kl_coef": self.kl.coef, "entropy": entropy_ / length, **updates}
        metrics |= {"completion_length": length, "stop_rate": stop_rate}
        metrics["distinct_2"] = zero.mean_over_workers(ppo_math.distinct_2(completions))
        metrics["learning_rate"] = self.models.policy.get_lr()[0]
        self.kl.update(kl_, config.batch_size)
        return metrics

    def next_prompts(self, rollout: int) -> tuple[list[list[int]], list[int]]:
        """This rank's prompts of a rollout, the next of an endless shuffled stream, and a seed for each completion.

        Both follow from the recipe's seed and the episode's number, whichever worker draws it.
        """
        first = (rollout - 1) * self.config.batch_size + self.run.rank * self.local_batch_size
        episodes = range(first, first + self.local_batch_size)
        prompts = [self.prompts[shuffled(i, len(self.prompts), self.run.seed)] for i in episodes]
        return prompts, [derived_seed(self.run.seed, "episode", i) for i in episodes]

    @torch.no_grad()
    def measure(self, episodes: Episodes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logprobs under policy and reference, and state values, [B, C]; entropy summed over the actions, [B]."""
        old, reference, values = (torch.zeros_like(episodes.actions, dtype=torch.float) for _ in range(3))
        entropy = torch.zeros(len(episodes), device=self.device)
        rows = torch.arange(len(episodes), device=self.device)
        for micro in episodes.micro_batches(rows, self.micro_batch_size):
            part = episodes.pick(micro)
            width = part.mask.shape[1]
            logprob, spread = logprobs_and_entropy(self.models.policy, part, self.config.temperature)
            old[micro, :width] = logprob * part.mask
            entropy[micro] = (spread * part.mask).sum(1)
            reference[micro, :width] = self.reference_logprobs(part) * part.mask
            values[micro, :width] = state_values(self.models.critic, part) * part.mask
        return old, reference, entropy, values

    def reference_logprobs(self, part: Episodes) -> Tensor:
        """Under the policy's own precision, so that the KL of an unmoved policy is zero."""
        if self.models.reference is None:
            with self.models.policy.module.disable_adapter():
                return logprobs(self.models.policy, part, self.config.temperature)
        with autocast_like(self.models.policy):
            return logprobs(self.models.reference, part, self.config.temperature)

    def update(self, episodes: Episodes, experience: Experience, rollout: int) -> dict[str, float]:
        """`num_ppo_epochs` passes of `num_mini_batches` optimiser steps each; means over all actions seen."""
        sums = torch.zeros(6, dtype=torch.float64, device=self.device)
        for epoch in range(self.config.num_ppo_epochs):
            seed = derived_seed(self.run.seed, "mini-batches", rollout, epoch, self.run.rank)
            order = torch.randperm(len(episodes), generator=torch.Generator().manual_seed(seed)).to(self.device)
            for rows in order.split(self.local_batch_size // self.config.num_mini_batches):
                actions = ppo_math.sum_over_ranks(episodes.mask[rows].sum())
                for micro in episodes.micro_batches(rows, self.micro_batch_size):
                    sums += self.learn(episodes.pick(micro), micro, experience, self.run.workers / actions)
        *totals, taken = zero.sum_over_workers(sums.tolist())
        names = ("policy_loss", "value_loss", "clipfrac", "value_clipfrac", "approx_kl")
        return {name: total / taken for name, total in zip(names, totals, strict=True)}

    def learn(self, part: Episodes, rows: Tensor, experience: Experience, share: Tensor) -> Tensor:
        """Gradients of one micro-batch; DeepSpeed takes the optimiser's step after a mini-batch's last one.

        `share` is workers / actions in the mini-batch of all ranks: DeepSpeed averages over workers, so the loss is the
        mean over those actions however they are spread. Returns sums over the actions: losses, clips, KL, and their
        number, [6].
        """
        config, mask = self.config, part.mask
        old, old_values, advantages, returns = (
            getattr(experience, f.name)[rows, : mask.shape[1]][mask] for f in fields(experience)
        )
        new = logprobs(self.models.policy, part, config.temperature)[mask]
        policy_losses, clipped = ppo_math.policy_loss(new, old, advantages, config.cliprange)
        self.models.policy.backward(policy_losses.sum() * share, scale_wrt_gas=False)
        self.models.policy.step()

        values = state_values(self.models.critic, part)[mask]
        value_losses, value_clipped = ppo_math.value_loss(values, old_values, returns, config.cliprange_value)
        self.models.critic.backward(config.vf_coef * value_losses.sum() * share, scale_wrt_gas=False)
        self.models.critic.step()

        approx_kl = ppo_math.approx_kl(new.detach(), old)
        measured = (policy_losses.detach(), value_losses.detach(), clipped, value_clipped, approx_kl, mask[mask])
        return torch.stack([values.double().sum() for values in measured])

    def mean(self, *per_episode: Tensor) -> list[float]:
        """The mean over the episodes of all ranks, of each [B]."""
        return [
            total / self.config.batch_size
            for total in zero.sum_over_workers([t.double().sum().item() for t in per_episode])
        ]

    def check(self, metrics: dict[str, float]) -> None:
        """The gates: raises StageError on numbers that are none, a KL beyond `max_kl`, and turns that never end."""
        broken = [name for name, value in metrics.items() if not math.isfinite(value)]
        if broken:
            raise StageError(
                f"ppo: {', '.join(broken)} not finite: lower ppo.learning_rate={self.config.learning_rate:g} or "
                "ppo.critic_learning_rate, or check the reward model"
            )
        if metrics["kl"] > self.config.max_kl:
            raise StageError(
                f"ppo: the policy has left its reference: KL {metrics['kl']:.1f} nats per completion is above "
                f"ppo.max_kl={self.config.max_kl:g}. Raise ppo.kl_coef={self.config.kl_coef:g}, set ppo.kl_target, or "
                f"lower ppo.learning_rate={self.config.learning_rate:g}"
            )
        progress, stop_rate = self.progress, metrics["stop_rate"]
        if progress.first_stop_rate is None:
            progress.first_stop_rate = stop_rate
        progress.runaway = progress.runaway + 1 if stop_rate < 0.25 * progress.first_stop_rate else 0
        if progress.runaway == RUNAWAY_ROLLOUTS:
            raise StageError(
                f"ppo: completions run away: {stop_rate:.0%} end their turn, {progress.first_stop_rate:.0%} did at the "
                f"start. Raise ppo.missing_eos_penalty={self.config.missing_eos_penalty:g} or "
                f"ppo.kl_coef={self.config.kl_coef:g}, or check whether the reward model favours length"
            )

    # ---- checkpoints and export

    def save_checkpoint(self, rollout: int) -> None:
        """Policy, critic, both optimisers and schedules, KL controller; the rollout's number is the data position."""
        self.progress.kl_coef = self.kl.coef
        zero.save_checkpoint(self.run, rollout, self._write)

    def _write(self, folder: Path) -> None:
        for name in ("policy", "critic"):
            getattr(self.models, name).save_checkpoint(str(folder / name), tag=zero.TAG)
        if self.run.rank == 0:
            (folder / "progress.json").write_text(json.dumps(asdict(self.progress)), "utf-8")

    def resume(self) -> int:
        """Goes back to the newest checkpoint, if there is one; the rollouts that are done."""
        latest = self.run.latest_checkpoint()
        rollout, folder = latest or (0, None)
        self.run.rewind(rollout)
        if folder is None:
            return 0
        for name in ("policy", "critic"):
            zero.load(getattr(self.models, name), folder / name, self.run)
        self.progress = PPOProgress(**json.loads((folder / "progress.json").read_text("utf-8")))
        self.kl.coef = self.progress.kl_coef
        zero.restore_random_state(self.run, folder)
        return rollout

    def export(self) -> None:
        """The policy as the stage's model folder, adapters merged."""
        zero.export(self.models.policy, self.run, self.processing_class, kind="causal-lm")


def autocast_like(engine: Any) -> AbstractContextManager[Any]:
    """What a DeepSpeed engine's forward runs under, for models that have no engine."""
    if not engine.torch_autocast_enabled():
        return nullcontext()
    return torch.autocast(engine.device.type, dtype=engine.torch_autocast_dtype())


def shuffled(position: int, size: int, seed: int) -> int:
    """What stands at `position` of an endless stream that goes through 0…size−1 in a new order each time."""
    turn, offset = divmod(position, size)
    return permutation(size, derived_seed(seed, "prompts", turn))[offset]


@lru_cache(maxsize=2)
def permutation(size: int, seed: int) -> list[int]:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
