"""ImageService and its models without Ray: what is refused, what is drawn, what is written into the files."""

import asyncio
import io
import resource
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from google.rpc.error_details_pb2 import BadRequest
from google.rpc.status_pb2 import Status
from image_world import tiny_folder
from malformed_images import LIMITS, MODEL, ROOMY, SIDE, Malformed, malformed, picture, request_of
from PIL import ExifTags, Image

from chatforge.v1 import image_pb2
from services.config import ImageModelConfig
from services.errors import StatusError
from services.image import ImageService
from services.image_model import ImageModel
from services.transport import DETAILS_KEY
from serving.image.api import ImageParams

MIB = 1 << 20


class Context:
    """What Serve's context keeps of a call."""

    def __init__(self) -> None:
        self.code: Any = None
        self.details = ""
        self.metadata: list[tuple[str, Any]] = [("request_id", "r-1")]

    def trailing_metadata(self) -> list[tuple[str, Any]]:
        return self.metadata

    def set_code(self, code: Any) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, metadata: list[tuple[str, Any]]) -> None:
        self.metadata = metadata

    def fields(self) -> list[str]:
        """Those that the refusal's details name."""
        status, found = Status.FromString(dict(self.metadata)[DETAILS_KEY]), BadRequest()
        assert any(detail.Unpack(found) for detail in status.details)
        return [violation.field for violation in found.field_violations]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / MODEL, num_inference_steps=3, guidance_scale=2.5)


@pytest.fixture(scope="module")
def service(folder: Path) -> ImageService:
    limits: dict[str, dict[str, Any]] = {MODEL: LIMITS, ROOMY: {}}
    return ImageService({name: ImageModelConfig(model=str(folder), **held) for name, held in limits.items()})


@pytest.fixture(scope="module")
def model(folder: Path) -> ImageModel:
    return ImageModel(MODEL, ImageModelConfig(model=str(folder), **LIMITS), threads=1)


async def call(service: ImageService, method: str, request: Any) -> tuple[Any, Context]:
    """The response, of a stream the list of all, and what became of the call."""
    context = Context()
    answer = getattr(service, method)(request, context)
    if method.startswith("Stream"):
        return [message async for message in answer], context
    return await answer, context


# ---- refusals


CASES = malformed()


def test_there_are_200_malformed_requests_of_every_kind() -> None:
    assert len(CASES) >= 200
    methods = Counter(case.method for case in CASES)
    assert methods.keys() == {"GenerateImage", "StreamGenerateImage", "EditImage"} and min(methods.values()) > 40


async def test_every_malformed_request_is_refused_by_field_and_the_memory_stays_flat(service: ImageService) -> None:
    """The first pass warms up: what allocators and decoders keep, they keep once."""
    for case in CASES:
        await refused(service, case)
    before, peak = psutil.Process().memory_info().rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in CASES:
        await refused(service, case)
    assert psutil.Process().memory_info().rss - before < 16 * MIB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 16 * 1024  # KiB
    response, _ = await call(service, "GenerateImage", request_of("GenerateImage"))
    assert len(response.images) == 1


async def refused(service: ImageService, case: Malformed) -> None:
    answer, context = await call(service, case.method, case.request)
    told = f"{case.method}, {case.what}: {context.code} {context.details}"
    assert context.code is grpc.StatusCode.INVALID_ARGUMENT, told
    assert context.details.startswith(f"{case.field}: ") and context.fields() == [case.field], told
    assert answer in ([image_pb2.StreamGenerateImageResponse()], type(answer)()), told


WORDS = {
    "guidance": (
        {"guidance_scale": float("nan")},
        {},
        "config.guidance_scale: nan must be between 1 (no guidance) and 100",
    ),
    "steps": ({"num_inference_steps": 21}, {}, "config.num_inference_steps: 21 is above the limit of 20"),
    "pixels": ({"width": 256, "height": 128}, {}, "config.width: 256 × 128 is above the limit of 16384 pixels"),
    "multiple": ({"height": 30}, {}, "config.height: 30 must be a multiple of 4"),
    "images": ({"num_images": 0}, {}, "config.num_images: 0 must be at least 1"),
    "seed": ({"seed": 2**63 - 1, "num_images": 2}, {}, f"config.seed: {2**63 - 1} must be between 0 and 2^63 - 2"),
    "sampler": (
        {"sampler": 9},
        {},
        "config.sampler: 9 is not known here; there are: SAMPLER_DDIM, SAMPLER_DPM_SOLVER_PP, SAMPLER_EULER",
    ),
    "quality": ({"quality": 50}, {}, "config.quality: is of JPEG and WebP alone; set config.format to one of them"),
    "prompt": ({}, {"prompt": "a" * 301}, "prompt: has 301 characters, above the limit of 300"),
}


@pytest.mark.parametrize("case", WORDS)
def test_a_refusal_says_the_value_and_the_fix(model: ImageModel, case: str) -> None:
    config, fields, said = WORDS[case]
    with pytest.raises(StatusError) as caught:
        model.prepare(request_of("GenerateImage", config, **fields))  # type: ignore[arg-type]
    assert caught.value.text == said


EDIT_WORDS = {
    "strength": ({"strength": 0.1}, "strength: 0.1 must be at least 1 / num_inference_steps = 0.5"),
    "mask": (
        {"mask": picture(size=(8, 9))}, f"mask: is 8 × 9, and the image {SIDE} × {SIDE}; send one of the image's size",
    ),
    "pixels": (
        {"image": picture(size=(129, 128))}, "image: is 129 × 128, above the limit of 16384 pixels; send a smaller one",
    ),
    "type": ({"image": picture("GIF")}, "image: is no PNG, JPEG or WebP picture that can be read"),
    "cut off": ({"image": picture()[:-40]}, "image: is damaged or cut off"),
    "bytes": ({"image": bytes(100_001)}, "image: has 100001 bytes, above the limit of 100000"),
}  # fmt: skip


@pytest.mark.parametrize("case", EDIT_WORDS)
async def test_an_edits_refusal_says_the_value_and_the_fix(model: ImageModel, case: str) -> None:
    fields, said = EDIT_WORDS[case]
    with pytest.raises(StatusError) as caught:
        await model.prepare_edit(request_of("EditImage", **fields))  # type: ignore[arg-type]
    assert caught.value.text == said


async def test_what_may_not_fit_into_one_message_is_refused_before_it_is_drawn(service: ImageService) -> None:
    large = {"width": 1024, "height": 1024, "num_images": 2}
    _, context = await call(service, "GenerateImage", request_of("GenerateImage", large, model=ROOMY))
    assert context.details == (
        "config.num_images: 2 images of 1024 × 1024 pixels may not fit into a message of 4 MiB; "
        "use StreamGenerateImage, or ask for fewer or smaller ones"
    )


async def test_an_unknown_model_is_told_by_name(service: ImageService) -> None:
    for method in ("GenerateImage", "StreamGenerateImage", "EditImage"):
        _, context = await call(service, method, request_of(method, model="other"))
        assert context.code is grpc.StatusCode.NOT_FOUND
        assert context.details == "model: 'other' is not served here; there are: roomy, tiny"


# ---- what is drawn


def test_what_is_unset_is_the_models_own(model: ImageModel) -> None:
    order = model.prepare(image_pb2.GenerateImageRequest())
    assert order.request.params == ImageParams(32, 32, num_inference_steps=3, guidance_scale=2.5)
    assert (order.request.prompt, len(order.request.seeds), order.encoding.format) == ("", 1, "PNG")
    assert 0 <= order.request.seeds[0] < 2**32


def test_a_models_own_size_must_be_within_its_limits(folder: Path) -> None:
    with pytest.raises(ValueError, match="draws 32 × 32, above max_pixels; raise it"):
        ImageModel("a", ImageModelConfig(model=str(folder), max_pixels=1000))
    few = ImageModel("a", ImageModelConfig(model=str(folder), max_num_inference_steps=2))
    assert few.prepare(image_pb2.GenerateImageRequest()).request.params.num_inference_steps == 2


@pytest.mark.parametrize(
    ("size", "config", "drawn"),
    [
        ((SIDE, SIDE), {}, (SIDE, SIDE)),
        ((31, 45), {}, (28, 44)),
        ((1, 3), {}, (8, 8)),
        ((64, 32), {"width": 16}, (16, 32)),
        ((64, 32), {"width": 16, "height": 20}, (16, 20)),
    ],
)
async def test_an_edit_has_the_size_asked_for_or_the_pictures_own(
    model: ImageModel, size: tuple[int, int], config: dict[str, int], drawn: tuple[int, int]
) -> None:
    sent = picture(size=size)
    order = await model.prepare_edit(request_of("EditImage", config, image=sent, mask=sent))  # type: ignore[arg-type]
    request = order.request
    assert (request.params.width, request.params.height) == drawn
    assert request.image is not None and request.image.shape == (drawn[1], drawn[0], 3)
    assert request.mask is not None and request.mask.shape == (drawn[1], drawn[0])


@pytest.mark.parametrize(("fields", "strength"), [({}, 0.8), ({"mask": picture()}, 1.0), ({"strength": 0.7}, 0.7)])
async def test_strength_is_what_was_said_or_as_diffusers_has_it(
    model: ImageModel, fields: dict[str, Any], strength: float
) -> None:
    order = await model.prepare_edit(request_of("EditImage", **fields))  # type: ignore[arg-type]
    assert order.request.params.strength == strength


async def test_an_images_seed_is_told_and_its_image_does_not_depend_on_mates(service: ImageService) -> None:
    config = {"seed": 2**63 - 3, "num_images": 3}
    three, _ = await call(service, "GenerateImage", request_of("GenerateImage", config))
    assert [image.seed for image in three.images] == [2**63 - 3, 2**63 - 2, 2**63 - 1]
    assert len({image.data for image in three.images}) == 3
    alone, _ = await call(service, "GenerateImage", request_of("GenerateImage", {"seed": 2**63 - 2}))
    difference = pixels(alone.images[0]).astype(int) - pixels(three.images[1])
    assert abs(difference).max() <= 1  # of 255: float sums are rounded by the batch's size


async def test_a_stream_tells_its_steps_and_then_one_image_a_message(service: ImageService) -> None:
    config = {"seed": 5, "num_images": 2}
    whole, _ = await call(service, "GenerateImage", request_of("GenerateImage", config))
    wanted = request_of("StreamGenerateImage", config, preview_every=2)
    messages, context = await call(service, "StreamGenerateImage", wanted)
    assert context.code is None
    steps = [message.progress for message in messages if message.HasField("progress")]
    assert [(step.step, step.total, len(step.previews)) for step in steps] == [(1, 2, 0), (2, 2, 2)]
    preview = steps[1].previews[0]
    assert preview.mime_type == "image/jpeg" and pixels(preview).shape == (preview.height, preview.width, 3)
    images = [message.image for message in messages[len(steps) :]]
    assert [image.seed for image in images] == [5, 6]
    assert [image.data for image in images] == [image.data for image in whole.images]
    assert [message.last for message in messages] == [False] * 3 + [True]
    assert {(message.id, message.model) for message in messages} == {("r-1", MODEL)}


async def test_an_edit_keeps_what_its_mask_leaves_black(service: ImageService) -> None:
    white = np.zeros((SIDE, SIDE), np.uint8)
    white[:, SIDE // 2 :] = 255
    file = io.BytesIO()
    Image.fromarray(white).save(file, "PNG")
    config = {"seed": 1, "guidance_scale": 1}
    whole, _ = await call(service, "EditImage", request_of("EditImage", config, strength=1))
    masked, context = await call(
        service, "EditImage", request_of("EditImage", config, mask=file.getvalue(), strength=1)
    )
    assert context.code is None and pixels(masked.images[0]).shape == (SIDE, SIDE, 3)
    assert (pixels(whole.images[0]) != pixels(masked.images[0])).any()


# ---- what is written


FORMATS = {
    "PNG": (image_pb2.IMAGE_FORMAT_UNSPECIFIED, "image/png"),
    "JPEG": (image_pb2.IMAGE_FORMAT_JPEG, "image/jpeg"),
    "WEBP": (image_pb2.IMAGE_FORMAT_WEBP, "image/webp"),
}


@pytest.mark.parametrize("format", FORMATS)
async def test_settings_are_embedded_where_they_are_asked_for_alone(service: ImageService, format: str) -> None:
    number, mime_type = FORMATS[format]
    config = {"seed": 8, "format": number, "sampler": image_pb2.SAMPLER_EULER}
    prompts = {"prompt": "ein Löwe 🦁", "negative_prompt": "blue"}
    plain, _ = await call(service, "GenerateImage", request_of("GenerateImage", config, **prompts))
    told = config | {"embed_metadata": True}
    embedded, _ = await call(service, "GenerateImage", request_of("GenerateImage", told, **prompts))
    assert plain.images[0].mime_type == embedded.images[0].mime_type == mime_type
    assert parameters(plain.images[0].data, format) is None
    said = parameters(embedded.images[0].data, format)
    assert said is not None and said.startswith(
        "ein Löwe 🦁\nNegative prompt: blue\nSteps: 2, Sampler: euler, CFG scale: 2.5,"
    )
    assert "Size: 32x32, Model hash: " in said and said.endswith("Model: tiny")
    assert (pixels(plain.images[0]) == pixels(embedded.images[0])).all()


async def test_quality_is_that_of_the_file(service: ImageService) -> None:
    sizes = []
    for quality in (10, 60, 100):
        config = {"seed": 8, "format": image_pb2.IMAGE_FORMAT_JPEG, "quality": quality}
        response, _ = await call(service, "GenerateImage", request_of("GenerateImage", config))
        sizes.append(len(response.images[0].data))
    assert sizes == sorted(sizes) and sizes[0] < sizes[2]


async def test_a_call_that_is_left_frees_the_painter(folder: Path) -> None:
    service = ImageService({MODEL: ImageModelConfig(model=str(folder), max_batch=1, max_waiting=1)})
    long = request_of("StreamGenerateImage", {"num_inference_steps": 150}, model="")
    stream = service.StreamGenerateImage(long, Context())
    await anext(stream)
    waiting = asyncio.create_task(call(service, "StreamGenerateImage", long))
    while service._models[MODEL].painter.stats().num_requests_waiting < 1:
        await asyncio.sleep(0.01)
    _, full = await call(service, "GenerateImage", request_of("GenerateImage", model=""))
    assert full.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert full.details == "too many requests wait for this model; try again later"
    await stream.aclose()
    waiting.cancel()
    await asyncio.wait([waiting])
    response, _ = await call(service, "GenerateImage", request_of("GenerateImage", model=""))
    assert len(response.images) == 1


def test_a_models_card_has_its_limits(service: ImageService) -> None:
    tiny, _ = service.describe()
    assert {field.name: value for field, value in tiny.limits.ListFields()} == LIMITS


def pixels(image: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image.data)))


def parameters(data: bytes, format: str) -> str | None:
    """What a file has embedded."""
    opened: Any = Image.open(io.BytesIO(data))
    assert opened.format == format
    if format == "PNG":
        return opened.info.get("parameters")
    comment = opened.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    return comment and comment.removeprefix(b"UNICODE\0").decode("utf-16-be")
