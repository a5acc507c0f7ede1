"""What a painter speaks: an ImageRequest in; Progress as the steps go, and the images, out."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:  # a server's config takes its bounds from here
    import numpy as np

Sampler = Literal["ddim", "dpm++", "euler"]
SAMPLERS: tuple[str, ...] = get_args(Sampler)

MAX_NUM_INFERENCE_STEPS = 1000
MAX_GUIDANCE_SCALE = 100.0


@dataclass(frozen=True)
class ImageParams:
    """How a request's images are drawn: what those in one batch have in common.

    guidance_scale 1 is off; the prediction is uncond + guidance_scale · (cond - uncond) (Ho & Salimans 2022). Sampler
    None is the model folder's own. Strength is an edit's alone: the share of the steps that are run, from the given
    image with as much noise as belongs there.
    """

    width: int = 512  # pixels
    height: int = 512
    num_inference_steps: int = 30
    guidance_scale: float = 7.5
    sampler: Sampler | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError naming the field and its range."""
        guided = math.isfinite(self.guidance_scale) and 1.0 <= self.guidance_scale <= MAX_GUIDANCE_SCALE
        steps = 1 <= self.num_inference_steps <= MAX_NUM_INFERENCE_STEPS
        checks = (
            ("width", self.width >= 8, "at least 8"),
            ("height", self.height >= 8, "at least 8"),
            ("num_inference_steps", steps, f"between 1 and {MAX_NUM_INFERENCE_STEPS}"),
            ("guidance_scale", guided, f"between 1 (no guidance) and {MAX_GUIDANCE_SCALE:g}"),
            ("sampler", self.sampler is None or self.sampler in SAMPLERS, f"one of {', '.join(SAMPLERS)}"),
            ("strength", 0.0 < self.strength <= 1.0, "above 0 and at most 1"),
        )
        for name, valid, wanted in checks:
            if not valid:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {wanted}")


@dataclass(frozen=True, eq=False)
class ImageRequest:
    """One prompt's images. With `image` that one is redrawn, with `mask` only where it is white."""

    prompt: str
    params: ImageParams
    seeds: tuple[int, ...]  # one image for each, the same whatever else is drawn beside it
    negative_prompt: str = ""  # takes the place of no prompt in the guidance
    image: "np.ndarray | None" = None  # [height, width, 3] uint8
    mask: "np.ndarray | None" = None  # [height, width] uint8: from 128 on it is redrawn, below it is kept

    def __post_init__(self) -> None:
        """Raises ValueError naming the field and what it must be."""
        shape = (self.params.height, self.params.width)
        if not self.seeds or not all(0 <= seed < 2**63 for seed in self.seeds):
            raise ValueError(f"seeds={self.seeds!r} must be at least one, each between 0 and 2^63 - 1")
        if self.image is not None and not _is_picture(self.image, (*shape, 3)):
            raise ValueError(f"image={_looks(self.image)} must be uint8 [height={shape[0]}, width={shape[1]}, 3]")
        if self.mask is not None and self.image is None:
            raise ValueError(f"mask={_looks(self.mask)} must come with an image")
        if self.mask is not None and not _is_picture(self.mask, shape):
            raise ValueError(f"mask={_looks(self.mask)} must be uint8 [height={shape[0]}, width={shape[1]}]")


@dataclass(frozen=True, eq=False)
class Progress:
    """A request's images have gone so far, all of them: those that are drawn in later batches count as not begun."""

    step: int  # 1 to total
    total: int
    previews: "tuple[np.ndarray, ...]" = ()  # [height, width, 3] uint8: what they seem to become, where asked


@dataclass(frozen=True)
class PainterStats:
    """A moment's counts; names as vLLM's metrics have them."""

    num_requests_running: int  # with an image in the batch that is drawn
    num_requests_waiting: int  # with none in it
    images: int  # since the start
    steps: int  # of whole batches, since the start


def _is_picture(array: "np.ndarray", shape: tuple[int, ...]) -> bool:
    return array.dtype == "uint8" and array.shape == shape


def _looks(array: "np.ndarray") -> str:
    return f"{array.dtype} {list(array.shape)}"
