"""Rollouts by Ray actors beside the trainer: engines in processes, and on GPUs, of their own.

    trainer's worker   weights: once into Ray's object store, where all its engines read them
                       prompts and seeds: every engine its share
    engine             copies the weights into the tensors that it has, samples, sends token ids back

A completion follows from weights, prompt and seed, so it is the same on whichever engine, up to the rounding by which
TorchEngine's logits depend on the batch. What an engine had to sample when it died, another samples in its place.

Leaves out: weights that go from GPU to GPU, sampling beside the update.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig

from serving.engine.api import SamplingParams
from serving.engine.torch_engine import TorchEngine
from training import zero
from training.device import ENVIRONMENT
from training.ppo_rollout import merged_state

START = 300.0  # seconds until an engine must have been placed, and be ready


class RolloutEngine:
    """The actor: a causal LM and an engine on it; its weights come with every rollout."""

    def __init__(
        self,
        config: PretrainedConfig,
        generation_config: GenerationConfig,
        tokenizer: Any,
        device: str,
        max_num_seqs: int,
        context_tokens: int,
    ) -> None:
        os.environ.update(ENVIRONMENT)
        self._model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device).eval()
        self._model.generation_config = generation_config  # it names the tokens that end a completion
        self._engine = TorchEngine(self._model, tokenizer, max_num_seqs=max_num_seqs, context_tokens=context_tokens)

    @torch.no_grad()
    def sample(
        self, weights: Mapping[str, np.ndarray], prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[list[int]]:
        """One completion's token ids for each prompt, by a model of these weights."""
        state = self._model.state_dict()
        for name, array in weights.items():
            state[name].copy_(torch.tensor(array))
        self._engine.update_weights()
        return [list(completion.token_ids) for completion in self._engine.generate_all(prompts, params)]


class RemoteRollouts:
    """What ppo_rollout.Rollouts does, on `count` engines of this worker's, each with as much as the worker has."""

    def __init__(
        self,
        policy: nn.Module,
        count: int,
        params: SamplingParams,
        config: PretrainedConfig,
        generation_config: GenerationConfig,
        tokenizer: Any,
        **size: int,
    ) -> None:
        """The configs and the tokenizer are the policy's, `size` is what bounds each engine."""
        import ray

        self.policy, self.params = policy, params
        self._made_of = config, generation_config, tokenizer, next(policy.parameters()).device.type
        self._size = size
        has = ray.get_runtime_context().get_assigned_resources()
        self._takes = {"num_cpus": has.get("CPU"), "num_gpus": has.get("GPU"), "memory": has.get("memory")}
        self._weights: Any = None
        self._engines = [self._new() for _ in range(count)]
        ray.get([engine.__ray_ready__.remote() for engine in self._engines], timeout=START)

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over the policy's weights; all ranks call it before each rollout."""
        import ray

        with zero.gathered(self.policy):
            state = merged_state(self.policy)
            once = {tensor.data_ptr(): name for name, tensor in state.items()}  # of tied ones, the last
            self._weights = ray.put({name: state[name].cpu().numpy() for name in once.values()})

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[int]]:
        """One completion's token ids for each prompt, the token that ended it among them."""
        params = [replace(self.params, seed=seed) for seed in seeds]
        count = len(self._engines)
        shares = [(prompts[i::count], params[i::count]) for i in range(count)]
        asked = [
            engine.sample.remote(self._weights, *share) for engine, share in zip(self._engines, shares, strict=True)
        ]
        completions: list[list[int]] = [[] for _ in prompts]
        for i, share in enumerate(shares):
            completions[i::count] = self._answer(i, asked[i], share)
        return completions

    def _answer(self, i: int, asked: Any, share: tuple[Any, Any]) -> list[list[int]]:
        """Of engine i, or of another in its place if it died; raises RayError where that dies too, or finds no room."""
        import ray

        try:
            return ray.get(asked)
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
            print(f"rollout engine {i} was lost ({error}); another takes its place", flush=True)
        ray.kill(self._engines[i])  # which may be out of reach alone, and hold what the other needs
        self._engines[i] = self._new()
        ray.get(self._engines[i].__ray_ready__.remote(), timeout=START)
        return ray.get(self._engines[i].sample.remote(self._weights, *share))

    def _new(self) -> Any:
        import ray

        actor = ray.remote(RolloutEngine).options(**self._takes, scheduling_strategy="DEFAULT")
        return actor.remote(*self._made_of, **self._size)

    def close(self) -> None:
        import ray

        for engine in self._engines:
            ray.kill(engine)
