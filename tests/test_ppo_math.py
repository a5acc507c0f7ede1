"""PPO's maths: each function beside a slow loop that follows its paper's formula word for word."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from training import ppo_math

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
LENGTHS = [4, 2, 1]


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_position_ids_count_from_the_first_real_token() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert ppo_math.position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 3]]


def test_the_score_falls_on_the_last_action_and_never_on_a_pad() -> None:
    scores, kl = torch.tensor([10.0, 20.0, 30.0]), noise(0, 3, 4)
    rewards = ppo_math.token_rewards(scores, kl, MASK, kl_coef=0.5)
    for b, length in enumerate(LENGTHS):
        for t in range(4):
            expected = -0.5 * kl[b, t] if t < length else 0.0
            expected += scores[b] if t == length - 1 else 0.0
            assert rewards[b, t] == pytest.approx(float(expected))


def test_kl_per_token_is_the_log_ratio_on_actions() -> None:
    policy, reference = noise(1, 3, 4), noise(2, 3, 4)
    kl = ppo_math.kl_per_token(policy, reference, MASK)
    assert torch.equal(kl[MASK], (policy - reference)[MASK])
    assert not kl[~MASK].any()


def test_k1_is_an_unbiased_estimate_of_the_kl() -> None:
    policy, reference = torch.log_softmax(noise(3, 8), 0), torch.log_softmax(noise(4, 8), 0)
    drawn = torch.multinomial(policy.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    estimate = ppo_math.kl_per_token(policy[drawn], reference[drawn], torch.ones_like(drawn)).mean()
    exact = (policy.exp() * (policy - reference)).sum()
    assert estimate.item() == pytest.approx(exact.item(), rel=0.02)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_the_discounted_sum_of_td_errors(gamma: float, lam: float) -> None:
    rewards, values = noise(5, 3, 4), noise(6, 3, 4)
    advantages, returns = ppo_math.gae(rewards, values, MASK, gamma, lam)
    for b, length in enumerate(LENGTHS):
        v = [*values[b, :length].tolist(), 0.0]
        td = [rewards[b, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(4):
            expected = sum((gamma * lam) ** (k - t) * td[k] for k in range(t, length))
            assert advantages[b, t].item() == pytest.approx(expected, abs=1e-6)
            assert returns[b, t].item() == pytest.approx(expected + (v[t] if t < length else 0.0), abs=1e-6)


def test_what_stands_on_pads_changes_no_advantage() -> None:
    rewards, values = noise(5, 3, 4), noise(6, 3, 4)
    clean = ppo_math.gae(rewards, values, MASK, 1.0, 0.95)
    dirty = ppo_math.gae(rewards + 99 * ~MASK, values - 99 * ~MASK, MASK, 1.0, 0.95)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_leaves_pads_out(shift_mean: bool) -> None:
    values = 5 * noise(7, 3, 4) + 2
    whitened = ppo_math.whiten(values + 1000 * ~MASK, MASK, shift_mean)
    kept = values[MASK].tolist()
    mean = sum(kept) / len(kept)
    variance = sum((v - mean) ** 2 for v in kept) / (len(kept) - 1)
    expected = [(v - mean) / math.sqrt(variance) + (0.0 if shift_mean else mean) for v in kept]
    assert whitened[MASK].tolist() == pytest.approx(expected, abs=1e-5)
    assert not whitened[~MASK].any()


def whiten_on_one_rank(rank: int, meeting: str, values: Tensor, mask: Tensor, out: Tensor) -> None:
    torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2)
    rows = torch.tensor([0]) if rank == 0 else torch.tensor([1, 2])
    out[rows] = ppo_math.whiten(values[rows], mask[rows])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks_whiten_as_one_with_both_batches(tmp_path: Path) -> None:
    values = noise(8, 3, 4)
    out = torch.zeros(3, 4).share_memory_()
    spawn(whiten_on_one_rank, args=(str(tmp_path / "meeting"), values, MASK, out), nprocs=2)
    assert torch.allclose(out, ppo_math.whiten(values, MASK), atol=1e-6)


def test_policy_loss_is_the_pessimistic_bound() -> None:
    old, new, advantages = noise(9, 3, 4), noise(10, 3, 4), noise(11, 3, 4)
    losses, clipped = ppo_math.policy_loss(new, old, advantages, cliprange=0.2)
    for b in range(3):
        for t in range(4):
            ratio, advantage = math.exp(new[b, t] - old[b, t]), advantages[b, t].item()
            held = min(max(ratio, 0.8), 1.2)
            assert losses[b, t].item() == pytest.approx(-min(ratio * advantage, held * advantage), rel=1e-5)
            assert clipped[b, t].item() == (held * advantage < ratio * advantage)


def test_a_clipped_action_gives_no_gradient() -> None:
    new = torch.tensor([1.0, 1.0, -1.0, -1.0], requires_grad=True)
    losses, _ = ppo_math.policy_loss(new, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]), cliprange=0.2)
    losses.sum().backward()
    assert new.grad is not None
    assert (new.grad != 0).tolist() == [False, True, True, False]


def test_value_loss_takes_the_worse_of_free_and_held() -> None:
    values, old, returns = noise(12, 3, 4), noise(13, 3, 4), noise(14, 3, 4)
    losses, clipped = ppo_math.value_loss(values, old, returns, cliprange=0.3)
    for b in range(3):
        for t in range(4):
            v, o, r = (x[b, t].item() for x in (values, old, returns))
            held = min(max(v, o - 0.3), o + 0.3)
            assert losses[b, t].item() == pytest.approx(0.5 * max((v - r) ** 2, (held - r) ** 2), rel=1e-5)
            assert clipped[b, t].item() == ((held - r) ** 2 > (v - r) ** 2)


def test_approx_kl_comes_near_the_kl_of_near_policies() -> None:
    old = torch.log_softmax(noise(15, 16), 0)
    new = torch.log_softmax(old + 0.1 * noise(16, 16), 0)
    exact = (old.exp() * (old - new)).sum()
    assert (old.exp() * ppo_math.approx_kl(new, old)).sum().item() == pytest.approx(exact.item(), rel=0.1)


def test_a_fixed_kl_coefficient_stays() -> None:
    controller = ppo_math.KLController(0.05)
    controller.update(kl=100.0, episodes=64)
    assert controller.coef == 0.05


@pytest.mark.parametrize(("kl", "error"), [(6.0, 0.0), (6.6, 0.1), (60.0, 0.2), (0.0, -0.2)])
def test_the_adaptive_coefficient_follows_a_held_proportional_error(kl: float, error: float) -> None:
    controller = ppo_math.KLController(0.1, target=6.0, horizon=1000)
    controller.update(kl, episodes=50)
    assert controller.coef == pytest.approx(0.1 * (1 + error * 50 / 1000))


def test_the_adaptive_coefficient_brings_the_kl_to_its_target() -> None:
    """On a toy in which the KL is the inverse of the coefficient."""
    controller = ppo_math.KLController(0.5, target=6.0, horizon=100)
    for _ in range(200):
        controller.update(1.0 / controller.coef, episodes=20)
    assert 1.0 / controller.coef == pytest.approx(6.0, rel=1e-3)


def test_distinct_2_is_low_for_a_phrase_said_over_and_over() -> None:
    assert ppo_math.distinct_2([[1, 2, 3, 4]]) == 1.0
    assert ppo_math.distinct_2([[1, 2, 1, 2, 1]]) == 0.5
    assert ppo_math.distinct_2([[1, 2], [1, 2], [1, 2], [1, 2]]) == 0.25
    assert ppo_math.distinct_2([[1], []]) == 0.0
