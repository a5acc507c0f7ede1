"""The autoencoder's adversary: who learns from which term, and how far each pulls."""

import pytest
import torch
from torch import nn

from training.adversary import PatchDiscriminator, adversarial_terms


@pytest.fixture
def terms():
    torch.manual_seed(0)
    adversary, decoder = PatchDiscriminator(), nn.Conv2d(3, 3, 3, padding=1)
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    reconstructed = decoder(pixels)
    reconstruction = (reconstructed - pixels).abs().mean()
    made = adversarial_terms(adversary, pixels, reconstructed, reconstruction, decoder.weight)
    return adversary, decoder, pixels, reconstruction, made


def gradients(loss, module):
    return torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True)


def test_neither_side_learns_from_the_others_term(terms):
    adversary, decoder, _, _, made = terms
    assert all(gradient is None for gradient in gradients(made["discriminator"], decoder))
    assert all(gradient is None for gradient in gradients(made["adversarial"], adversary))
    assert all(gradient.abs().sum() > 0 for gradient in gradients(made["discriminator"], adversary))


def test_both_terms_pull_equally_hard_at_the_decoders_last_weights(terms):
    _, decoder, _, reconstruction, made = terms
    ours, theirs = (gradients(loss, decoder)[0].norm().item() for loss in (reconstruction, made["adversarial"]))
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_the_decoder_is_pulled_towards_what_looks_real(terms):
    adversary, decoder, pixels, _, made = terms
    with torch.no_grad():
        before = adversary(decoder(pixels)).mean()
        for parameter, gradient in zip(decoder.parameters(), gradients(made["adversarial"], decoder), strict=True):
            parameter -= 0.01 * gradient / gradient.norm()
        assert adversary(decoder(pixels)).mean() > before


def test_a_picture_is_judged_patch_by_patch_and_alone():
    torch.manual_seed(0)
    adversary, pixels = PatchDiscriminator(), torch.rand(3, 3, 64, 40)
    with torch.no_grad():
        together, alone = adversary(pixels), adversary(pixels[1:2])
    assert together.shape == (3, 1, 8, 5)
    assert torch.allclose(together[1:2], alone, atol=1e-5)
