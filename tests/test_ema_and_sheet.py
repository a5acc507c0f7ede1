"""The average of weights against its sum, and the sheets that people look at."""

import numpy as np
import pytest
import torch
from PIL import Image

from training.ema import Ema
from training.sheet import write_sheet


def test_the_average_is_the_weighted_sum_of_what_there_was():
    module = torch.nn.Linear(2, 1)
    module.bias.requires_grad_(False)
    ema = Ema(module, decay=0.5)
    seen, expected = [], module.weight.detach().clone()
    for step in range(30):
        with torch.no_grad():
            module.weight.copy_(torch.full((1, 2), float(step)))
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        seen.append(module.weight.clone())
    with ema.swapped_in():
        assert torch.allclose(module.weight, expected)
    assert torch.equal(module.weight, seen[-1])


def test_the_average_survives_a_restart_and_an_error_inside(tmp_path):
    module = torch.nn.Linear(2, 1)
    ema = Ema(module, decay=0.9)
    with torch.no_grad():
        module.weight.add_(1.0)
    ema.update(5)
    ema.save(tmp_path, rank=0)
    fresh = Ema(torch.nn.Linear(2, 1), decay=0.9)
    fresh.load(tmp_path, rank=0)
    assert all(torch.equal(fresh._mean[name], tensor) for name, tensor in ema._mean.items())
    weight = module.weight.clone()
    with pytest.raises(ZeroDivisionError), ema.swapped_in():
        raise ZeroDivisionError
    assert torch.equal(module.weight, weight)


def test_a_sheet_has_every_picture_in_its_place(tmp_path):
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    top = [np.full((16, 16, 3), colour, np.uint8) for colour in colours]
    below = [np.full((64, 32, 3), colour, np.uint8) for colour in reversed(colours)]
    captions = ["red", "a very long caption that cannot stand in one line over a picture", "b" * 90]
    write_sheet(tmp_path / "deep" / "sheet.png", [top, below], captions, columns=2)
    with Image.open(tmp_path / "deep" / "sheet.png") as sheet:
        assert sheet.size == (204, 2 * 232 + 4)
        assert [sheet.getpixel((50 + 100 * i, 80)) for i in range(2)] == colours[:2]
        assert [sheet.getpixel((25 + 100 * i, 180)) for i in range(2)] == colours[:0:-1]
        assert sheet.getpixel((50, 80 + 232)) == colours[2]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["sheet.png"]
