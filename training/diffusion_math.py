"""The mathematics of diffusion as functions of tensors: noising, targets, weights, times.

Legend: x0 data, ε ~ N(0, I), xt noised data, all [B, ...]; t [B] steps of a chain, or times in [0, 1] of a flow;
ᾱ_t = Π (1 - β_s) [T]; α = √ᾱ, σ = √(1 - ᾱ). In a rectified flow α = 1 - t and σ = t.
"""

import torch

NUM_TRAIN_TIMESTEPS = 1000


# ---- chains: epsilon and v_prediction


def add_noise(x0: torch.Tensor, noise: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """xt [B, ...] = √ᾱ x0 + √(1 - ᾱ) ε (Ho et al. 2020, eq. 4); `alpha_bar` [B]."""
    alpha_bar = _like(alpha_bar, x0)
    return alpha_bar.sqrt() * x0 + (1.0 - alpha_bar).sqrt() * noise


def velocity(x0: torch.Tensor, noise: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """v [B, ...] = √ᾱ ε - √(1 - ᾱ) x0 (Salimans & Ho 2022, appendix D); `alpha_bar` [B]."""
    alpha_bar = _like(alpha_bar, x0)
    return alpha_bar.sqrt() * noise - (1.0 - alpha_bar).sqrt() * x0


def min_snr_weight(alpha_bar: torch.Tensor, gamma: float, prediction: str) -> torch.Tensor:
    """Loss weights [B] that let no time outweigh the others (Hang et al. 2023, eq. 8 and table 1).

    min(SNR, γ) / SNR of an ε loss, min(SNR, γ) / (SNR + 1) of a v loss; SNR = ᾱ / (1 - ᾱ). `alpha_bar` [B];
    `prediction`: epsilon or v_prediction.
    """
    snr = alpha_bar / (1.0 - alpha_bar)
    return snr.clamp(max=gamma) / (snr if prediction == "epsilon" else snr + 1.0)


# ---- rectified flow


def interpolate(x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """xt [B, ...] = (1 - t) x0 + t ε (Liu et al. 2023, eq. 1, with time from data to noise); `t` [B] in [0, 1]."""
    t = _like(t, x0)
    return (1.0 - t) * x0 + t * noise


def flow(x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """dxt/dt [B, ...] = ε - x0, what the network predicts (Liu et al. 2023, eq. 1, with time from data to noise)."""
    return noise - x0


def logit_normal_times(count: int, mean: float, generator: torch.Generator) -> torch.Tensor:
    """Times [count] in (0, 1), most of them around sigmoid(mean) (Esser et al. 2024, eq. 19, with s = 1)."""
    return torch.sigmoid(mean + torch.randn(count, generator=generator))


# ---- autoencoder


def kl_to_standard_normal(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """KL(N(μ, σ²) ‖ N(0, I)) = ½ Σ (μ² + σ² - 1 - ln σ²) in nats [B] (Kingma & Welling 2014, appendix B).

    `mean` and `log_variance` are [B, ...], the sum is over all but B.
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).flatten(1).sum(1)


def hinge_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """½ (mean max(0, 1 - real) + mean max(0, 1 + fake)), a scalar (Lim & Ye 2017, eq. 15).

    `real` and `fake` are a discriminator's logits, of any shape.
    """
    return 0.5 * ((1.0 - real).relu().mean() + (1.0 + fake).relu().mean())


def adversarial_balance(reconstruction: torch.Tensor, adversarial: torch.Tensor) -> torch.Tensor:
    """λ = |∇ reconstruction| / (|∇ adversarial| + δ), a scalar of at most 10⁴ (Esser et al. 2021, eq. 7).

    The arguments are the gradients of the two losses for one and the same tensor.
    """
    return (reconstruction.norm() / (adversarial.norm() + 1e-6)).clamp(max=1e4)


# ---- averages


def ema_decay_at(step: int, decay: float) -> float:
    """The decay of an average at optimiser step `step`, counted from 0: min(decay, (1 + step) / (10 + step)).

    Low at first, so that the initial weights are soon forgotten; the ramp is that of TensorFlow's
    ExponentialMovingAverage with `num_updates`.
    """
    return min(decay, (1 + step) / (10 + step))


def _like(per_sample: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[B] as [B, 1, ...], to be multiplied with x."""
    return per_sample.to(x).reshape(-1, *(1,) * (x.ndim - 1))
