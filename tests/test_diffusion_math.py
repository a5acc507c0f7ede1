"""The equations of diffusion against slow, obvious forms of themselves."""

import math

import pytest
import torch

from training import diffusion_math as maths

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2  # Stable Diffusion's
BARS = torch.cumprod(1.0 - BETAS, 0)
T = torch.tensor([0, 10, 500, 999])


def x0_from_epsilon(xt, epsilon, bars):
    """The data that ε and xt imply (Ho et al. 2020, eq. 15)."""
    bars = bars.reshape(-1, 1, 1, 1)
    return (xt - (1.0 - bars).sqrt() * epsilon) / bars.sqrt()


def x0_from_velocity(xt, v, bars):
    """The data that v and xt imply (Salimans & Ho 2022, appendix D)."""
    bars = bars.reshape(-1, 1, 1, 1)
    return bars.sqrt() * xt - (1.0 - bars).sqrt() * v


@pytest.fixture
def x0():
    return torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def noise():
    return torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_noise_is_added_at_once_as_it_is_step_by_step():
    """The marginal after t steps of q(x_t | x_{t-1}), by its mean and variance."""
    mean, variance = 1.0, 0.0
    for t, beta in enumerate(BETAS.double().tolist()):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        if t in T.tolist():
            bars, one, zero = BARS[t : t + 1].double(), torch.ones(1, 1).double(), torch.zeros(1, 1).double()
            assert maths.add_noise(one, zero, bars).item() == pytest.approx(mean, rel=1e-3)
            assert maths.add_noise(zero, one, bars).item() == pytest.approx(math.sqrt(variance), rel=1e-3)


def test_every_prediction_leads_back_to_the_data(x0, noise):
    bars = BARS[T].double()
    noised = maths.add_noise(x0, noise, bars)
    assert torch.allclose(x0_from_epsilon(noised, noise, bars), x0, atol=1e-6)
    assert torch.allclose(x0_from_velocity(noised, maths.velocity(x0, noise, bars), bars), x0, atol=1e-6)
    times = torch.tensor([0.01, 0.3, 0.7, 1.0]).double()
    noised = maths.interpolate(x0, noise, times)
    assert torch.allclose(noised - times.reshape(-1, 1, 1, 1) * maths.flow(x0, noise), x0)


def test_velocity_is_the_derivative_by_the_angle(x0, noise):
    """v = dx/dφ with α = cos φ, σ = sin φ."""
    angle, h = torch.tensor(0.7, dtype=torch.float64), 1e-6

    def at(phi):
        return torch.cos(phi) * x0 + torch.sin(phi) * noise

    slope = (at(angle + h) - at(angle - h)) / (2 * h)
    bars = torch.cos(angle).square().expand(4)
    assert torch.allclose(maths.velocity(x0, noise, bars), slope, atol=1e-6)


def test_the_flow_is_the_derivative_by_time(x0, noise):
    t, h = torch.full((4,), 0.4).double(), 1e-5
    slope = (maths.interpolate(x0, noise, t + h) - maths.interpolate(x0, noise, t - h)) / (2 * h)
    assert torch.allclose(maths.flow(x0, noise), slope, atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_every_time_alike_in_terms_of_the_data(prediction, x0, noise):
    """A loss on ε is SNR times one on x0, a loss on v (SNR + 1) times: weighted, both are min(SNR, γ) times it."""
    bars = BARS[T].double()
    snr = bars / (1 - bars)
    noised = maths.add_noise(x0, noise, bars)
    if prediction == "epsilon":
        wrong = noise + 0.1
        error, other = (wrong - noise).square(), x0_from_epsilon(noised, wrong, bars) - x0
    else:
        v = maths.velocity(x0, noise, bars)
        error, other = torch.full_like(v, 0.01), x0_from_velocity(noised, v + 0.1, bars) - x0
    weight = maths.min_snr_weight(bars, 5.0, prediction)
    weighted = weight * error.flatten(1).mean(1)
    assert torch.allclose(weighted, snr.clamp(max=5.0) * other.square().flatten(1).mean(1), rtol=1e-5)


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_times_are_logit_normal(mean):
    times = maths.logit_normal_times(20_000, mean, torch.Generator().manual_seed(0))
    logits = torch.logit(times)
    assert logits.mean().item() == pytest.approx(mean, abs=0.03) and logits.std().item() == pytest.approx(1, abs=0.03)
    assert times.min() > 0 and times.max() < 1


def test_the_kl_of_a_gaussian_is_its_integral():
    mean, log_variance = torch.tensor([[[0.5, -1.0]]]).double(), torch.tensor([[[-0.7, 0.4]]]).double()
    grid = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    total = 0.0
    for m, lv in zip(mean.flatten(), log_variance.flatten(), strict=True):
        p = torch.distributions.Normal(m, (0.5 * lv).exp())
        q = torch.distributions.Normal(torch.tensor(0.0).double(), torch.tensor(1.0).double())
        total += torch.trapezoid(p.log_prob(grid).exp() * (p.log_prob(grid) - q.log_prob(grid)), grid).item()
    assert maths.kl_to_standard_normal(mean, log_variance).item() == pytest.approx(total, rel=1e-6)


def test_a_hinge_loss_stops_where_the_side_is_clear():
    real, fake = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([[-3.0, 0.0], [0.25, -1.0]])
    total = 0.0
    for logit in real.flatten().tolist():
        total += max(0.0, 1.0 - logit) / 4 / 2
    for logit in fake.flatten().tolist():
        total += max(0.0, 1.0 + logit) / 4 / 2
    assert maths.hinge_loss(real, fake).item() == pytest.approx(total)
    assert maths.hinge_loss(torch.tensor([1.5]), torch.tensor([-1.0])).item() == 0.0


def test_the_adversarial_balance_is_the_ratio_of_lengths_and_bounded():
    ours, theirs = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([0.6, 0.8, 0.0])
    lengths = [sum(x * x for x in gradient.flatten().tolist()) ** 0.5 for gradient in (ours, theirs)]
    assert maths.adversarial_balance(ours, theirs).item() == pytest.approx(lengths[0] / lengths[1], rel=1e-5)
    assert maths.adversarial_balance(ours, torch.zeros(3)).item() == 1e4


def test_the_average_forgets_its_start():
    assert [maths.ema_decay_at(step, 0.999) for step in (0, 90)] == [0.1, 0.91]
    assert maths.ema_decay_at(10**6, 0.999) == 0.999
