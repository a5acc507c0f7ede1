"""The mathematics of PPO on text, as free functions of tensors.

Shapes, once for the whole file: B episodes, C actions (a completion's tokens, the turn's end among them, padded on the
right). `mask` [B, C] is true on actions and false on pads; what a function returns is zero on pads unless it says
otherwise. Sources: Schulman et al. 2017 (PPO), Schulman et al. 2016 (GAE), Ziegler et al. 2019 and Ouyang et al. 2022
(PPO on language models), Huang et al. 2024 (the details that matter).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that count real tokens alone: [B, T] mask → [B, T], 0 at the first real token and on pads before it."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def last_action(mask: Tensor) -> Tensor:
    """[B]: the index of each episode's last action. Every episode has one."""
    return mask.long().sum(-1) - 1


def kl_per_token(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """log π(a|s) − log π_ref(a|s), [B, C]: the k1 estimator of KL(π ‖ π_ref) at each action.

    Unbiased, of high variance, and the one whose gradient as a reward is the KL's (Ziegler et al. 2019, eq. 2); k3 has
    less variance as a measure, and as a reward another gradient.
    """
    return (logprobs - ref_logprobs) * mask


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """−β·KL at every action, and the episode's score [B] on its last action: [B, C] (Ziegler et al. 2019, eq. 2)."""
    rewards = -kl_coef * kl * mask
    return rewards.scatter_add(1, last_action(mask)[:, None], scores[:, None].to(rewards))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16): advantages and returns (λ-returns), [B, C] each.

    δ_t = r_t + γ·V(s_{t+1}) − V(s_t), A_t = δ_t + γλ·A_{t+1}. What follows the last action is worth nothing: a
    completion cut at its length limit ends there too.
    """
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(values)
    ahead = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        ahead = advantages[:, t] = delta + gamma * lam * ahead
        next_value = values[:, t]
    return advantages, advantages + values


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scaled to variance 1 over the actions of all ranks, and to mean 0 unless `shift_mean` is off: [B, C].

    The variance is the unbiased one, taken around the mean of all ranks, so two ranks give what one with both
    batches would. All ranks call it.
    """
    count = sum_over_ranks(mask.sum().double())
    mean = sum_over_ranks((values * mask).sum().double()) / count
    squares = sum_over_ranks(((values.double() - mean).square() * mask).sum())
    variance = squares / (count - 1).clamp(min=1)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return ((whitened if shift_mean else whitened + mean) * mask).to(values)


def sum_over_ranks(value: Tensor) -> Tensor:
    """The elementwise sum over all ranks, on every rank."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cliprange: float) -> tuple[Tensor, Tensor]:
    """The clipped surrogate with its sign turned (Schulman et al. 2017, eq. 7), and where the clip won: [B, C] each.

    Not masked: the caller averages over the actions of a whole mini-batch, which may be spread over micro-batches
    and ranks.
    """
    ratio = (logprobs - old_logprobs).exp()
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - cliprange, 1.0 + cliprange)
    return torch.maximum(free, clipped), clipped > free


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float) -> tuple[Tensor, Tensor]:
    """Half the squared error, of V or of V held within `cliprange` of its old self, whichever is worse; and where.

    [B, C] each, not masked (Huang et al. 2024, after OpenAI's baselines).
    """
    held = torch.clamp(values, old_values - cliprange, old_values + cliprange)
    free, clipped = (values - returns).square(), (held - returns).square()
    return 0.5 * torch.maximum(free, clipped), clipped > free


def approx_kl(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """½(log π − log π_old)², [B, C]: the k2 estimator of how far the update has gone from the policy that sampled."""
    return 0.5 * (logprobs - old_logprobs).square()


@dataclass
class KLController:
    """The KL coefficient β: fixed, or steered so that the measured KL comes to `target` (Ziegler et al. 2019, 2.2)."""

    coef: float
    target: float | None = None  # nats per completion; None holds β fixed
    horizon: int = 10_000  # episodes

    def update(self, kl: float, episodes: int) -> None:
        """After `episodes` episodes whose mean KL was `kl` nats per completion."""
        if self.target is not None:
            error = min(max(kl / self.target - 1.0, -0.2), 0.2)
            self.coef *= 1.0 + error * episodes / self.horizon


def distinct_2(completions: Sequence[Sequence[int]]) -> float:
    """Different pairs of neighbouring tokens, as a part of all pairs; near 0 where one phrase is all that is said."""
    pairs = [pair for ids in completions for pair in pairwise(ids)]
    return len(set(pairs)) / max(1, len(pairs))
