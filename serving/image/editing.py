"""Where a batch begins: at noise, or at given images with noise on them; and what a mask keeps of these."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from serving.image.api import ImageParams, ImageRequest
from serving.image.components import Components


@dataclass
class Kept:
    """What a mask keeps, with the noise to put on it at every step."""

    images: Tensor  # latents [rows, channels, height, width]
    noise: Tensor  # as images
    mask: Tensor  # [rows, 1, height, width]: 1 is redrawn, 0 kept

    def put_back(self, scheduler: Any, latents: Tensor, timestep: Tensor | None) -> Tensor:
        """The latents with the kept parts as they are at a timestep, None being the end."""
        images = self.images
        if timestep is not None:
            images = scheduler.add_noise(images, self.noise, torch.tensor([timestep]))
        return (1 - self.mask) * images + self.mask * latents

    def keep(self, rows: Tensor) -> None:
        self.images, self.noise, self.mask = self.images[rows], self.noise[rows], self.mask[rows]


def start(
    components: Components,
    scheduler: Any,
    timesteps: Tensor,
    requests: Sequence[ImageRequest],
    generators: Sequence[torch.Generator],
) -> tuple[Tensor, Kept | None]:
    """Latents [rows, channels, height, width] of one request and generator a row, and what is kept of them.

    A row draws from its generator in the order in which its pipeline of diffusers draws for it alone.
    """
    first = requests[0]
    if first.image is None:
        return _noise(components, first.params, generators) * scheduler.init_noise_sigma, None
    encoded = {request: _encode(components, request.image) for request in dict.fromkeys(requests)}
    images = torch.cat([_sample(components, encoded[r], g) for r, g in zip(requests, generators, strict=True)])
    if first.mask is not None:
        images = images.contiguous()  # as in diffusers there and only there; convolutions round by how it is laid out
    noise = _noise(components, first.params, generators)
    if first.mask is not None and first.params.strength == 1.0:
        latents = noise * scheduler.init_noise_sigma
    else:
        latents = scheduler.add_noise(images, noise, timesteps[:1].repeat(len(requests)))
    if first.mask is None:
        return latents, None
    for request, generator in zip(requests, generators, strict=True):
        _sample(components, encoded[request], generator)  # of what the mask hides, which only 9 channels would use
    return latents, Kept(images, noise, torch.cat([_mask(components, request.mask) for request in requests]))


def _noise(components: Components, params: ImageParams, generators: Sequence[torch.Generator]) -> Tensor:
    size = (params.height // components.scale_factor, params.width // components.scale_factor)
    shape = (len(generators), components.latent_channels, *size)
    return randn_tensor(shape, list(generators), components.device, components.vae.dtype)


def _encode(components: Components, image: np.ndarray | None) -> Any:
    """The distribution of an image's latents."""
    assert image is not None
    pixels = torch.from_numpy(image[None].astype(np.float32) / 255.0).permute(0, 3, 1, 2)
    return components.vae.encode((2.0 * pixels - 1.0).to(components.device)).latent_dist


def _sample(components: Components, distribution: Any, generator: torch.Generator) -> Tensor:
    return components.vae.config.scaling_factor * distribution.sample(generator)


def _mask(components: Components, mask: np.ndarray | None) -> Tensor:
    """Of latents: each has what the mask says of its first pixel."""
    assert mask is not None
    redrawn = (mask >= 128)[:: components.scale_factor, :: components.scale_factor].astype(np.float32, order="C")
    return torch.from_numpy(redrawn)[None, None].to(components.device)
