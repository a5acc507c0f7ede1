"""One image model inside a replica: limits before anything is decoded, and the painter after them."""

import asyncio
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from chatforge.v1 import image_pb2
from services import convert, pictures
from services.config import ImageModelConfig
from services.errors import invalid
from services.pictures import Encoding
from services.servicer import DTYPES, ServedModel
from services.transport import MAX_MESSAGE_BYTES
from serving.image.api import ImageParams, ImageRequest
from serving.image.painter import Painter
from serving.image.sampling import check

Prompts = image_pb2.GenerateImageRequest | image_pb2.StreamGenerateImageRequest | image_pb2.EditImageRequest

_SMALLEST_SIDE = 8  # pixels; ImageParams has no less
_STRENGTH, _STRENGTH_WITH_MASK = 0.8, 1.0  # of an edit that says none, as diffusers has it
_MESSAGE_WITHOUT_IMAGES = 4096  # bytes of a response that are no picture, at most


@dataclass(frozen=True, eq=False)
class Order:
    """A request that has passed its checks, and how its images go out."""

    request: ImageRequest
    encoding: Encoding
    embed_metadata: bool


class ImageModel(ServedModel):
    """A painter with its limits."""

    def __init__(self, name: str, config: ImageModelConfig, device: str = "cpu", threads: int | None = None) -> None:
        """Loads the folder's weights; `threads` are the painter's. Raises ValueError where it cannot be served."""
        super().__init__(name, folder := config.folder, config.allow_unsafe)
        self.config = config
        self.painter = Painter(
            folder,
            dtype=DTYPES[config.dtype],
            device=device,
            threads=threads,
            max_batch=config.max_batch,
            max_waiting=config.max_waiting,
            allow_unsafe=config.allow_unsafe,
        )
        known = self.painter.defaults
        if known.width * known.height > config.max_pixels:
            raise ValueError(f"{folder}: draws {known.width} × {known.height}, above max_pixels; raise it")
        steps = min(known.num_inference_steps, config.max_num_inference_steps)  # what is asked for is refused instead
        self._defaults = dataclasses.replace(known, num_inference_steps=steps)

    @property
    def worker(self) -> Painter:
        return self.painter

    @property
    def limits(self) -> dict[str, int]:
        return {
            "max_images": self.config.max_images,
            "max_pixels": self.config.max_pixels,
            "max_num_inference_steps": self.config.max_num_inference_steps,
            "max_upload_bytes": self.config.max_upload_bytes,
            "max_characters": self.config.max_characters,
        }

    def prepare(self, request: image_pb2.GenerateImageRequest | image_pb2.StreamGenerateImageRequest) -> Order:
        """What to draw. Raises StatusError where the request is outside of the limits."""
        self._check_prompts(request)
        params = self._params(request.config)
        self._check_size(params)
        return self._order(request, params)

    async def prepare_edit(self, request: image_pb2.EditImageRequest) -> Order:
        """As `prepare`; its pictures are decoded last, in a thread."""
        self._check_prompts(request)
        self._check_upload(request)
        strength = _STRENGTH_WITH_MASK if request.HasField("mask") else _STRENGTH
        if request.HasField("strength"):
            strength = convert.decimal(request.strength)
        params = self._params(request.config, strength=strength)
        if request.config.HasField("width") and request.config.HasField("height"):
            self._check_size(params)  # before anything is decoded; a side that is not named is the picture's own
        order = self._order(request, params)
        return await asyncio.to_thread(self._with_pictures, order, request)

    def check_fits(self, order: Order, instead: str) -> None:
        """Raises StatusError, which says what to do `instead`, where the images might not fit into one message."""
        params, seeds = order.request.params, order.request.seeds
        text = self._parameters(order, seeds[-1])
        most = len(seeds) * pictures.most_bytes(params.width, params.height, text)
        if most > MAX_MESSAGE_BYTES - _MESSAGE_WITHOUT_IMAGES:
            what = f"{len(seeds)} images of {params.width} × {params.height} pixels"
            raise invalid("config.num_images", f"{what} may not fit into a message of 4 MiB; {instead}")

    def write(self, order: Order, images: Sequence[np.ndarray], first: int = 0) -> list[image_pb2.Image]:
        """The files of an order's images, the first of which is its n-th; slow enough for a thread."""
        seeds = order.request.seeds[first : first + len(images)]
        return [self._write(order, pixels, seed) for pixels, seed in zip(images, seeds, strict=True)]

    def _check_prompts(self, request: Prompts) -> None:
        limit = self.config.max_characters
        sizes = {"prompt": len(request.prompt), "negative_prompt": len(request.negative_prompt)}
        longest = max(sizes, key=lambda field: sizes[field])
        if sizes[longest] > limit:
            raise invalid(longest, f"has {sizes[longest]} characters, above the limit of {limit}")
        if (both := sum(sizes.values())) > limit:
            raise invalid(longest, f"has, with the other prompt, {both} characters, above the limit of {limit}")

    def _check_upload(self, request: image_pb2.EditImageRequest) -> None:
        if not request.image:
            raise invalid("image", "is empty; send a PNG, JPEG or WebP file")
        image, both, limit = len(request.image), len(request.image) + len(request.mask), self.config.max_upload_bytes
        if image > limit:
            raise invalid("image", f"has {image} bytes, above the limit of {limit}")
        if both > limit:
            raise invalid("mask", f"has, with the image, {both} bytes, above the limit of {limit}")

    def _params(self, config: image_pb2.ImageConfig, **changes: Any) -> ImageParams:
        limits = {"num_inference_steps": self.config.max_num_inference_steps, "num_images": self.config.max_images}
        for knob, limit in limits.items():
            if getattr(config, knob) > limit:
                raise invalid(f"config.{knob}", f"{getattr(config, knob)} is above the limit of {limit}")
        return convert.image_params(config, self._defaults, **changes)

    def _check_size(self, params: ImageParams) -> None:
        size, limit = (params.width, params.height), self.config.max_pixels
        field = "config.width" if params.width >= params.height else "config.height"
        if params.width * params.height > limit:
            raise invalid(field, f"{params.width} × {params.height} is above the limit of {limit} pixels")
        if max(size) > pictures.MAX_SIDE:
            raise invalid(field, f"{max(size)} is above the limit of {pictures.MAX_SIDE}")

    def _with_pictures(self, order: Order, request: image_pb2.EditImageRequest) -> Order:
        """An edit's order, with its pictures in place and, where none was asked for, with their size."""
        image, mask = self._pictures(request)
        own, asked = _rounded(image.size, self.painter.components.multiple), request.config
        size = asked.width if asked.HasField("width") else own[0], asked.height if asked.HasField("height") else own[1]
        params = dataclasses.replace(order.request.params, width=size[0], height=size[1])
        self._check_size(params)
        pixels = pictures.fitted(image, size)
        white = None if mask is None else pictures.fitted(mask, size)
        drawn = dataclasses.replace(order.request, params=params, image=pixels, mask=white)
        self._check(drawn)
        return dataclasses.replace(order, request=drawn)

    def _pictures(self, request: image_pb2.EditImageRequest) -> tuple[Image.Image, Image.Image | None]:
        """The image and, in grey, the mask."""
        image = self._decoded("image", request.image)
        if not request.HasField("mask"):
            return image, None
        mask = self._decoded("mask", request.mask).convert("L")
        if mask.size != image.size:
            said, needed = ("{} × {}".format(*each.size) for each in (mask, image))
            raise invalid("mask", f"is {said}, and the image {needed}; send one of the image's size")
        return image, mask

    def _decoded(self, field: str, data: bytes) -> Image.Image:
        try:
            return pictures.decode(data, self.config.max_pixels)
        except ValueError as error:
            raise invalid(field, str(error)) from None

    def _order(self, request: Prompts, params: ImageParams) -> Order:
        seeds = convert.image_seeds(request.config)
        encoding = convert.image_encoding(request.config)
        drawn = ImageRequest(request.prompt, params, seeds, request.negative_prompt)
        self._check(drawn)
        return Order(drawn, encoding, request.config.embed_metadata)

    def _check(self, request: ImageRequest) -> None:
        try:
            check(self.painter.components, request)
        except ValueError as error:
            raise convert.invalid_knob(error) from None

    def _write(self, order: Order, pixels: np.ndarray, seed: int) -> image_pb2.Image:
        data = pictures.encode(pixels, order.encoding, self._parameters(order, seed))
        height, width, _ = pixels.shape
        return convert.image_proto(data, order.encoding.mime_type, (width, height), seed)

    def _parameters(self, order: Order, seed: int) -> str:
        """What is embedded: the prompts, and the settings as Stable Diffusion's web UI writes and reads them."""
        if not order.embed_metadata:
            return ""
        request, params = order.request, order.request.params
        settings = {
            "Steps": params.num_inference_steps,
            "Sampler": params.sampler,
            "CFG scale": f"{params.guidance_scale:g}",
            "Seed": seed,
            "Size": f"{params.width}x{params.height}",
            "Model hash": self.info.revision,
            "Model": self.name,
            "Denoising strength": f"{params.strength:g}" if request.image is not None else None,
        }
        said = ", ".join(f"{name}: {value}" for name, value in settings.items() if value is not None)
        negative = [f"Negative prompt: {request.negative_prompt}"] if request.negative_prompt else []
        return "\n".join([request.prompt, *negative, said])


def _rounded(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """The largest multiples that are no longer than its sides, or the smallest that can be drawn."""
    smallest = -(-_SMALLEST_SIDE // multiple) * multiple
    width, height = (max(smallest, side // multiple * multiple) for side in size)
    return width, height
