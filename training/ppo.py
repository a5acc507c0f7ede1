"""PPO: improve the SFT policy under the learned reward, near the policy it started from (Ouyang et al. 2022, 3.5).

This file puts the parts together: the loop is in ppo_trainer, the mathematics in ppo_math, what is asked of models in
ppo_models, sampling in ppo_rollout, or by actors of its own in ppo_engines. Leaves out: pretraining gradients mixed in
(PPO-ptx), an entropy bonus, a reward per token, early stopping inside the epochs of a rollout, sampling beside the
update.
"""

import math
from functools import partial
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from serving.engine.api import SamplingParams
from serving.engine.torch_engine import TorchEngine
from serving.model_folder import context_length
from training import zero
from training.config import LoraConfig, PPOConfig
from training.data.prompts import read_prompts
from training.data.split import split
from training.ppo_engines import RemoteRollouts
from training.ppo_models import RewardModel, frozen_copy, load_scorer
from training.ppo_rollout import Rollouts
from training.ppo_trainer import PPOModels, PPOTrainer, Reward, autocast_like
from training.pretrained import pretrained
from training.run import Run, StageError
from training.schedules import schedule
from training.tokenizer import encode_prompt
from training.trainer import peft_config

MAX_NUM_SEQS = 64  # sampled at a time; more gain little, and each holds a whole completion's keys and values


def run(config: PPOConfig, run: Run) -> None:
    """The SFT policy and prompts to a better causal LM.

    Raises ConfigError where the batch does not divide, StageError where no prompt fits, and where KL or length run away
    or a loss is not a number.
    """
    trainer = build(config, run)
    trainer.train()
    trainer.export()


def build(config: PPOConfig, run: Run, reward: Reward | None = None) -> PPOTrainer:
    """The trainer with all its parts; `reward` replaces the learned one, and the critic starts from that one."""
    zero.init_distributed(run.device)
    zero.seed_everything(run.seed)
    start = config.model or str(run.of("sft").model)
    tokenizer = pretrained(AutoTokenizer, "ppo.model", start)
    policy = pretrained(AutoModelForCausalLM, "ppo.model", start, dtype="float32", use_safetensors=True)
    prompts = encode_prompts(config, run, tokenizer, context_length(policy.config))
    copied = not config.rollout_engines and (config.lora or config.zero_stage == 3)
    copy = frozen_copy(policy) if copied else None
    models = build_models(config, run, policy, reward)
    params = SamplingParams(max_new_tokens=config.response_length, temperature=config.temperature)
    engines = max(1, config.rollout_engines)
    size = {
        "max_num_seqs": min(MAX_NUM_SEQS, -(-config.batch_size // (run.workers * engines))),
        "context_tokens": max(map(len, prompts)) + config.response_length,
    }
    rollouts: Rollouts | RemoteRollouts
    if config.rollout_engines:
        ends = policy.generation_config
        rollouts = RemoteRollouts(models.policy.module, engines, params, policy.config, ends, tokenizer, **size)
    else:
        sampled = models.policy.module if copy is None else copy.to(models.policy.device)
        rollouts = Rollouts(models.policy.module, sampled, TorchEngine(sampled, tokenizer, **size), params)
    return PPOTrainer(config, run, models, rollouts, prompts, tokenizer)


def build_models(config: PPOConfig, run: Run, policy: PreTrainedModel, reward: Reward | None) -> PPOModels:
    """Policy and critic on DeepSpeed engines, the frozen ones beside them."""
    reward_model = config.reward_model or str(run.of("reward").model)
    reference = None if config.lora else frozen_copy(policy)
    critic = load_scorer(reward_model, "ppo.reward_model")
    if config.lora:
        policy = adapted(policy, config.lora, "CAUSAL_LM")
        critic.model = adapted(critic.model, config.lora, "SEQ_CLS", modules_to_save=["score"]).get_base_model()
    actor = on_deepspeed(policy, config, run, config.learning_rate)
    if reward is None:
        autocast = partial(autocast_like, actor)
        reward = RewardModel(
            load_scorer(reward_model, "ppo.reward_model").to(actor.device), config.micro_batch(run.workers), autocast
        )
    return PPOModels(
        policy=actor,
        critic=on_deepspeed(critic, config, run, config.critic_learning_rate),
        reference=reference.to(actor.device) if reference else None,
        reward=reward,
    )


def on_deepspeed(model: nn.Module, config: PPOConfig, run: Run, learning_rate: float) -> Any:
    """The model on an engine of its own, with AdamW and a warm-up to a constant rate (Ouyang et al. 2022, C.4)."""
    groups = zero.parameter_groups(model, config.weight_decay)
    # eps as in Huang et al. 2024: gradients of a policy near its optimum are small, and should stay so.
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-5)
    rates = schedule("constant", config.num_rollouts * config.steps_per_rollout, config.warmup_ratio)
    return zero.initialize(model, config, run, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rates))


def adapted(model: PreTrainedModel, lora: LoraConfig, task_type: str, **extra: Any) -> Any:
    """The model with fresh adapters, which change nothing yet; all else is frozen but for what `extra` names."""
    config = peft_config(lora, task_type, **extra)
    assert config is not None
    return get_peft_model(model, config)


def encode_prompts(config: PPOConfig, run: Run, tokenizer: Any, context: int | None) -> list[list[int]]:
    """Token ids of the training side's prompts that leave room for a completion; raises StageError where none does.

    `context`: tokens that the model was made for; None where it has no such limit.
    """
    records, _ = split(read_prompts(config.prompts), run.seed, run.val_fraction)
    encoded = [encode_prompt(tokenizer, record.messages) for record in records]
    room = (context or math.inf) - config.response_length
    kept = [ids for ids in encoded if len(ids) <= room]
    if len(kept) < len(encoded):
        run.note(f"{len(encoded) - len(kept)} of {len(encoded)} prompts are longer than {room} tokens: left out")
    if not kept:
        raise StageError(
            f"ppo.prompts: none of {len(encoded)} leaves room for response_length={config.response_length} tokens in a "
            f"context of {context}: give shorter prompts or lower response_length"
        )
    return kept
