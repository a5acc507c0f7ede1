"""An adversary for the autoencoder: it tells pictures from what comes back of them (Esser et al. 2021, section 3.1)."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call

from training.diffusion_math import adversarial_balance, hinge_loss

WIDTH = 64
GROUPS = 8
LEVELS = 3  # each halves the picture


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017, section 3.2.2): above 0 where a patch looks real.

    Its norms are over groups of channels, where the paper's are over batches: what it says of a picture does not hang
    on which others are in the batch, and so not on how many workers share it.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = [WIDTH * 2**level for level in range(LEVELS)]
        layers: list[nn.Module] = [nn.Conv2d(3, WIDTH, 4, 2, 1), nn.LeakyReLU(0.2)]
        for before, width in pairwise(widths):
            layers += [nn.Conv2d(before, width, 4, 2, 1), nn.GroupNorm(GROUPS, width), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in -1..1 to a logit for every patch, [B, 1, H/8, W/8]."""
        return self.layers(pixels)


def adversarial_terms(
    discriminator: nn.Module, pixels: Tensor, reconstructed: Tensor, reconstruction: Tensor, last: nn.Parameter
) -> dict[str, Tensor]:
    """What both sides learn from, in one backward pass: neither term reaches the other side's weights.

    `discriminator`: its hinge loss on pictures and on what the autoencoder makes of them, both [B, 3, H, W];
    `adversarial`: -D(reconstructed), on the scale of `reconstruction`, the loss: their gradients for the decoder's
    `last` weights are made equally long (Esser et al. 2021, eq. 7).
    """
    real, fake = discriminator(torch.cat([pixels, reconstructed.detach()])).float().chunk(2)
    frozen = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    fooled = -functional_call(discriminator, frozen, (reconstructed,)).float().mean()
    gradient = _gradient_for(last)
    scale = adversarial_balance(gradient(reconstruction), gradient(fooled))
    return {"discriminator": hinge_loss(real, fake), "adversarial": scale * fooled}


def _gradient_for(parameter: nn.Parameter) -> Callable[[Tensor], Tensor]:
    return lambda loss: torch.autograd.grad(loss, parameter, retain_graph=True)[0]
