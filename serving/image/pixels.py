"""An autoencoder that does nothing: with it, a pipeline folder of latent diffusion draws pixels themselves."""

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor


class PixelAutoencoder(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both name their config file
    """AutoencoderKL's interface, with the picture [B, 3, height, width] in -1..1 as its own latents.

    `model_index.json` names it ["serving.image.pixels", "PixelAutoencoder"], as diffusers saves it.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 3,
        block_out_channels: tuple[int, ...] = (3,),  # one level: a latent for each pixel
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.register_buffer("one", torch.ones(1))  # diffusers asks modules for their device, and weights to save

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        same: Any = _Certain(x)
        return AutoencoderKLOutput(latent_dist=same) if return_dict else (same,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None) -> Any:
        return DecoderOutput(sample=z) if return_dict else (z,)


class _Certain:
    """A distribution of one value."""

    def __init__(self, value: Tensor) -> None:
        self.mean = value

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self.mean

    def mode(self) -> Tensor:
        return self.mean
