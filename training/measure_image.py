"""What an image model is worth: captions drawn as the service would draw them, beside the pictures that there are.

The scores are by whatever features are at hand (features.py), and are named after them. Leaves out: human judgement,
for which there is the sheet, and an Inception network's distances, as papers have them.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from PIL import Image

from serving.image.components import load_components
from training import fidelity
from training.config import ImageConfig
from training.data.pictures import Pictures
from training.data.split import normalised
from training.features import features_at_hand, image_features
from training.image import drawn, params_of
from training.run import Run
from training.sheet import DRAWINGS, write_sheet
from training.stats import mean_and_stderr

NEAR = (1, 5)  # among so many nearest pictures one of the caption is looked for
HELD_OUT_SHARE = 4  # one drawing in so many is of a held-out caption, where there are enough

Result = dict[str, Any]


def measure_image(folder: str, config: ImageConfig, run: Run, num_drawings: int) -> Result:
    """The stage's model on captions of both sides, at most `num_drawings`; leaves DRAWINGS in the stage's folder."""
    train, val = (Pictures(run.of("image").folder / side) for side in ("train", "val"))
    trained, held_out = chosen_captions(train.captions, val.captions, num_drawings)
    parts = load_components(folder, device=run.device)
    params = params_of(config, parts)
    drawings = drawn(parts, [*trained, *held_out], params)

    name = features_at_hand()
    learnt, other = (image_features(name, thumbnails(side), run.device) for side in (train, val))
    made = image_features(name, np.stack([_thumbnail(drawing) for drawing in drawings]), run.device)
    nearest = fidelity.nearest(made, learnt)
    everything, captions = np.concatenate([learnt, other]), [*train.captions, *val.captions]
    count = len(trained)
    result = {
        "features": name,
        "near": list(NEAR),
        "learnt_from": len(train),
        "pictures": len(captions),
        "size": [params.width, params.height],
        "num_inference_steps": params.num_inference_steps,
        "guidance_scale": params.guidance_scale,
        "frechet": _frechet(made, learnt),
        "frechet_of_real": _frechet(everything[_spread(len(everything), len(made))], learnt),
        "trained": _matches(made[:count], trained, everything, captions),
        "held_out": _matches(made[count:], held_out, everything, captions) if held_out else None,
        "drawings": [
            {"caption": caption, "held_out": n >= count, "nearest": train.captions[nearest[n]]}
            for n, caption in enumerate([*trained, *held_out])
        ],
    }
    titles = [*trained, *(f"held out: {caption}" for caption in held_out)]
    neighbours = [train.batch([int(index)])[0] for index in nearest]
    write_sheet(run.folder / DRAWINGS, [drawings, neighbours], titles)
    return result


def chosen_captions(train: Sequence[str], val: Sequence[str], count: int) -> tuple[list[str], list[str]]:
    """(trained, held out): spread evenly over what there is, so that nobody picks them."""
    trained = list(dict.fromkeys(train))
    known = set(map(normalised, trained))
    held_out = [caption for caption in dict.fromkeys(val) if normalised(caption) not in known]
    few = min(len(held_out), max(1, count // HELD_OUT_SHARE))
    many = min(len(trained), max(1, count - few))
    return [trained[i] for i in _spread(len(trained), many)], [held_out[i] for i in _spread(len(held_out), few)]


def _spread(length: int, count: int) -> list[int]:
    return [i * length // count for i in range(min(count, length))]


def thumbnails(pictures: Pictures) -> np.ndarray:
    """All pictures, [N, side, side, 3] uint8: features compare what is of one shape."""
    return np.stack([_thumbnail(pictures.batch([index])[0]) for index in range(len(pictures))])


def _thumbnail(picture: np.ndarray, side: int = 64) -> np.ndarray:
    image = Image.fromarray(picture)
    return picture if image.size == (side, side) else np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))


def _frechet(some: np.ndarray, others: np.ndarray) -> float | None:
    """Of features [N, D]; None where one picture alone has no spread."""
    if min(len(some), len(others)) < 2:
        return None
    return fidelity.frechet_distance(*fidelity.gaussian_of(some), *fidelity.gaussian_of(others))


def _matches(made: np.ndarray, wanted: Sequence[str], features: np.ndarray, captions: Sequence[str]) -> Result:
    """Shares of drawings with a picture of their caption among the k nearest, and what chance would give."""
    out: Result = {"n": len(wanted)}
    ranks = fidelity.caption_ranks(made, wanted, features, captions)
    for k in NEAR:
        estimate = mean_and_stderr([float(rank < k) for rank in ranks])
        out[f"match_{k}"] = asdict(estimate) | {"chance": fidelity.chance_of_match(wanted, captions, k)}
    return out
