"""What PPO asks of its models: logprobs of completions and scores of states.

Shapes: B episodes; P prompt tokens, padded on the left; C actions (completion tokens), padded on the right.
"""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from training.config import ConfigError
from training.ppo_math import position_ids
from training.pretrained import pretrained


@dataclass(frozen=True)
class Episodes:
    """B prompts with one completion each. Pads are known by the masks, never by a token's id."""

    prompts: Tensor  # [B, P] token ids
    prompt_mask: Tensor  # [B, P] bool
    actions: Tensor  # [B, C] token ids
    mask: Tensor  # [B, C] bool

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], device: torch.device) -> Self:
        """Pads lists of token ids; both widths are those of the longest."""
        prompt_ids, prompt_mask = _padded([ids[::-1] for ids in prompts], device)
        return cls(prompt_ids.flip(1), prompt_mask.flip(1), *_padded(completions, device))

    def __len__(self) -> int:
        return len(self.actions)

    def pick(self, rows: Tensor) -> Self:
        """These episodes alone, without the columns in which all of them are padded."""
        prompt_mask, mask = self.prompt_mask[rows], self.mask[rows]
        p, c = int(prompt_mask.sum(1).max()), int(mask.sum(1).max())
        start = self.prompts.shape[1] - p
        return type(self)(self.prompts[rows, start:], prompt_mask[:, start:], self.actions[rows, :c], mask[:, :c])

    def micro_batches(self, rows: Tensor, size: int) -> Iterator[Tensor]:
        """`rows` in parts of `size`, like lengths together: less padding, and the sum over them is the same."""
        lengths = self.prompt_mask[rows].sum(1) + self.mask[rows].sum(1)
        return iter(rows[lengths.argsort(stable=True)].split(size))

    def inputs(self) -> dict[str, Tensor]:
        """What a model's forward takes, [B, P + C]."""
        attention_mask = torch.cat([self.prompt_mask, self.mask], 1).long()
        input_ids = torch.cat([self.prompts, self.actions], 1)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids(attention_mask)}


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids padded on the right with 0, and the mask of what is real."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.long, device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device) < lengths[:, None]


def action_logits(policy: nn.Module, episodes: Episodes) -> Tensor:
    """Logits from which each action was drawn, [B, C, V] in fp32; the vocabulary is not projected for prompt tokens."""
    width = episodes.actions.shape[1]
    out = policy(**episodes.inputs(), logits_to_keep=width + 1, use_cache=False)
    return out.logits[:, -width - 1 : -1].float()


def logprobs(policy: nn.Module, episodes: Episodes, temperature: float) -> Tensor:
    """Log-probabilities of the actions at the sampling temperature, [B, C]; pads hold numbers without meaning."""
    return selective_log_softmax(action_logits(policy, episodes), episodes.actions, temperature)


@torch.no_grad()
def logprobs_and_entropy(policy: nn.Module, episodes: Episodes, temperature: float) -> tuple[Tensor, Tensor]:
    """Beside the logprobs, the entropy in nats of the distribution each action was drawn from: [B, C] each."""
    logits = action_logits(policy, episodes) / temperature
    return selective_log_softmax(logits, episodes.actions), entropy_from_logits(logits)


class Scorer(nn.Module):
    """The reward model read at every state: (head(h_t) − mean) / std.

    Its number for the last state of an episode is the reward model's normalised reward. Frozen, this is the reward;
    trained, it is the critic, which therefore equals the reward model at step 0 (Ouyang et al. 2022, C.4).
    """

    def __init__(self, model: PreTrainedModel, mean: float = 0.0, std: float = 1.0) -> None:
        """Raises ConfigError where the model has not one score per token."""
        super().__init__()
        if not isinstance(getattr(model, "score", None), nn.Module) or model.config.num_labels != 1:
            raise ConfigError(
                f"reward_model: {type(model).__name__} with num_labels={model.config.num_labels} is not a decoder "
                "with one score; give a model folder that the reward stage wrote"
            )
        self.model: Any = model
        self.mean, self.std = mean, std

    def forward(self, width: int, **inputs: Tensor) -> Tensor:
        """Scores of the last `width` positions of [B, T] inputs, [B, width] in fp32."""
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state[:, -width:]
        with torch.autocast(hidden.device.type, enabled=False):
            return (self.model.score(hidden.float()).squeeze(-1) - self.mean) / self.std


def load_scorer(folder: str, field: str) -> Scorer:
    """The reward model, normalised by the mean and deviation that its folder stores (0 and 1 where it has none).

    Raises StageError with the `field` that names the folder where it holds no such model, ConfigError where that has
    not one score per token.
    """
    card = Path(folder) / "chatforge.json"
    about = json.loads(card.read_text("utf-8")) if card.exists() else {}
    options = {"num_labels": 1, "dtype": "float32", "use_safetensors": True}
    model = pretrained(AutoModelForSequenceClassification, field, folder, **options)
    return Scorer(model, about.get("reward_mean", 0.0), about.get("reward_std") or 1.0)


def state_values(critic: nn.Module, episodes: Episodes) -> Tensor:
    """V(s) of the state in which each action was taken, [B, C]; the state after the last action is terminal."""
    width = episodes.actions.shape[1]
    return critic(width + 1, **episodes.inputs())[:, :-1]


class RewardModel:
    """The learned reward of whole episodes: a callable on (prompt ids, completion ids) like any other reward."""

    def __init__(self, scorer: Scorer, batch_size: int, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        self.scorer, self.batch_size, self.autocast = scorer.eval().requires_grad_(False), batch_size, autocast

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Tensor:
        """Normalised rewards, [B]: the score of the last action, which closes the turn, and never of a pad."""
        episodes = Episodes.of(prompts, completions, next(self.scorer.parameters()).device)
        rewards = torch.empty(len(episodes), device=episodes.actions.device)
        for rows in episodes.micro_batches(torch.arange(len(episodes), device=rewards.device), self.batch_size):
            part = episodes.pick(rows)
            with self.autocast():
                scores = self.scorer(part.actions.shape[1], **part.inputs())
            rewards[rows] = scores.gather(1, part.mask.sum(1, keepdim=True) - 1).squeeze(1)
        return rewards


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that no optimiser knows: the reference of the KL."""
    return copy.deepcopy(model).eval().requires_grad_(False)
