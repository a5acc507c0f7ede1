"""Rollouts: completions sampled by serving.engine from the policy as it is at that moment."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from serving.engine.api import SamplingParams
from serving.engine.torch_engine import TorchEngine
from training import zero


class Rollouts:
    """An engine on the policy's weights.

    Without adapters and with whole parameters these are the live module's own. Under LoRA or ZeRO-3 they are a copy
    that `refresh` brings up to date: merging into the live weights and out again would leave rounding behind.
    """

    def __init__(self, policy: nn.Module, model: PreTrainedModel, engine: TorchEngine, params: SamplingParams) -> None:
        """`model`: what the engine decodes with: `policy` itself, or a copy of its class without adapters."""
        self.policy, self.model, self.engine, self.params = policy, model, engine, params

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over the policy's weights; all ranks call it before each rollout."""
        if self.model is not self.policy:
            with zero.gathered(self.policy):
                live = merged_state(self.policy)
                for name, tensor in self.model.state_dict().items():
                    tensor.copy_(live[name])
        self.engine.update_weights()

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[int]]:
        """One completion's token ids for each prompt, the token that ended it among them."""
        params = [replace(self.params, seed=seed) for seed in seeds]
        return [list(completion.token_ids) for completion in self.engine.generate_all(prompts, params)]

    def close(self) -> None:
        self.engine.close()


def merged_state(model: Any) -> dict[str, Tensor]:
    """The state dict under the names of the model without adapters, with W + ΔW where there is one (Hu et al. 2021)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    state = {name.replace(".base_layer.", "."): tensor for name, tensor in base.state_dict().items()}
    for name, layer in base.named_modules():
        if isinstance(layer, BaseTunerLayer):
            state[f"{name}.weight"] = merged_weight(layer)
    return state


def merged_weight(layer: Any) -> Tensor:
    """One adapted layer's W + ΔW, in the layout of W."""
    return layer.get_base_layer().weight + sum(layer.get_delta_weight(name) for name in layer.active_adapters)
