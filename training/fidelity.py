"""How far drawn pictures are from real ones, and whether they show their captions: pure functions of features.

What the numbers mean depends on the features (training/features.py), and a Fréchet distance also on how many pictures
there are: compare only scores of the same features and the same numbers.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from training.data.split import normalised


class Gaussian(NamedTuple):
    """N(mean, covariance) fitted to features: [D], [D, D]."""

    mean: np.ndarray
    covariance: np.ndarray


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Fréchet distance of two Gaussians (Heusel et al. 2017, eq. 6): |μ₁−μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½).

    The root's trace is that of (Σ₁^½ Σ₂ Σ₁^½)^½, which is symmetric and so has real eigenvalues.
    """
    root = _root(sigma1)
    eigenvalues = np.linalg.eigvalsh(root @ sigma2 @ root).clip(0)
    spread = np.trace(sigma1) + np.trace(sigma2) - 2 * np.sqrt(eigenvalues).sum()
    return float(max(0.0, np.square(mu1 - mu2).sum() + spread))


def _root(sigma: np.ndarray) -> np.ndarray:
    """The symmetric root of a covariance matrix."""
    values, vectors = np.linalg.eigh(sigma)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def gaussian_of(features: np.ndarray) -> Gaussian:
    """Mean and covariance of features [N, D].

    With fewer pictures than numbers (N < D) the covariance Σ is that of noise in most directions; it is then drawn
    towards a round one of the same trace, (1−λ) Σ + λ tr(Σ)/D I, by the λ of `shrinkage`. Raises ValueError for N < 2.
    """
    n, d = features.shape
    if n < 2:
        raise ValueError(f"features: a covariance needs at least 2 pictures, not {n}")
    centred = features.astype(np.float64) - features.mean(0, dtype=np.float64)
    covariance = centred.T @ centred / (n - 1)
    if n < d:
        share = shrinkage(features)
        covariance = (1 - share) * covariance + share * np.trace(covariance) / d * np.eye(d)
    return Gaussian(features.mean(0, dtype=np.float64), covariance)


def shrinkage(features: np.ndarray) -> float:
    """Ledoit & Wolf's (2004) λ in 0..1 of features [N, D]: the sampling error of Σ over its distance from a round one.

    β² = Σₙ |xₙxₙᵀ − S|² / N² and δ² = |S − tr(S)/D I|², |·| Frobenius, S the mean of the centred xₙxₙᵀ.
    """
    n, d = features.shape
    centred = features.astype(np.float64) - features.mean(0, dtype=np.float64)
    gram = centred @ centred.T / n  # its squares sum up to those of S, and its trace is S's
    squares = np.square(gram).sum()
    delta = squares - np.trace(gram) ** 2 / d
    beta = (np.square(np.diag(gram)).sum() * n - squares) / n
    return float(np.clip(beta / delta, 0.0, 1.0)) if delta > 0 else 1.0


def nearest(sample_features: np.ndarray, picture_features: np.ndarray) -> np.ndarray:
    """The index of the picture that each sample is likest to, by cosine: [S, D], [P, D] → [S]."""
    return _likeness(sample_features, picture_features).argmax(1)


def caption_ranks(
    sample_features: np.ndarray,
    sample_captions: Sequence[str],
    picture_features: np.ndarray,
    picture_captions: Sequence[str],
) -> list[float]:
    """For each sample [S, D], how many of the pictures [P, D] are liker to it than the likest of its own caption.

    Infinite where no picture has its caption. Captions are the same as the split has it: case, punctuation and articles
    apart.
    """
    wanted, names = _same_names(sample_captions), np.array(_same_names(picture_captions))
    ranks = []
    for likeness, caption in zip(_likeness(sample_features, picture_features), wanted, strict=True):
        own = np.flatnonzero(names == caption)
        ranks.append(float((likeness > likeness[own].max()).sum()) if len(own) else float("inf"))
    return ranks


def chance_of_match(sample_captions: Sequence[str], picture_captions: Sequence[str], k: int) -> float:
    """How many samples, as a share, have a picture of their caption among k of P pictures that are picked blindly.

    With n pictures of a caption, 1 - C(P - n, k) / C(P, k); the mean over samples.
    """
    pictures = Counter(_same_names(picture_captions))
    total = pictures.total()
    k = min(k, total)
    missed = [math.comb(total - pictures[c], k) / math.comb(total, k) for c in _same_names(sample_captions)]
    return 1.0 - sum(missed) / len(missed)


def _same_names(captions: Sequence[str]) -> list[str]:
    return [normalised(caption) for caption in captions]


def _likeness(samples: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """Cosines [S, P]."""
    return _unit(samples) @ _unit(pictures).T


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
