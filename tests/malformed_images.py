"""Requests to ImageService that are wrong, each in one field: what every server must refuse and survive."""

import io
import random
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from chatforge.v1 import image_pb2

LIMITS: dict[str, Any] = {
    "max_images": 4, "max_pixels": 128 * 128, "max_num_inference_steps": 20, "max_upload_bytes": 100_000,
    "max_characters": 300,
}  # fmt: skip
MODEL, ROOMY = "tiny", "roomy"  # one of these limits, and one of the largest that there are
SIDE = 24  # pixels, of a picture that is right
NAN, INFINITE = float("nan"), float("inf")
SMALLEST, LARGEST = -(2**31), 2**31 - 1  # of an int32
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

Request = image_pb2.GenerateImageRequest | image_pb2.StreamGenerateImageRequest | image_pb2.EditImageRequest
KINDS: dict[str, type[Any]] = {
    "GenerateImage": image_pb2.GenerateImageRequest,
    "StreamGenerateImage": image_pb2.StreamGenerateImageRequest,
    "EditImage": image_pb2.EditImageRequest,
}


@dataclass(frozen=True)
class Malformed:
    """A request, and the field that its refusal must name."""

    method: str
    request: Request
    field: str
    what: str


def malformed() -> list[Malformed]:
    """More than 200 of them; the same each time."""
    return [*_wrong_settings(), *_wrong_edits(), *_wrong_uploads()]


def picture(format: str = "PNG", size: tuple[int, int] = (SIDE, SIDE), mode: str = "RGB", **options: Any) -> bytes:
    """A file with noise on a slope of colours: neither flat nor without order."""
    width, height = size
    noise = np.random.default_rng(0).integers(0, 60, (height, width, 3))
    slope = np.linspace(0, 190, width)[None, :, None]
    file = io.BytesIO()
    Image.fromarray((slope + noise).astype(np.uint8)).convert(mode).save(file, format, **options)
    return file.getvalue()


def request_of(method: str, config: dict[str, Any] | None = None, **fields: Any) -> Request:
    """One that is right, but for what is said."""
    given = {"image": picture()} if method == "EditImage" else {}
    config_proto = image_pb2.ImageConfig(**{"num_inference_steps": 2} | (config or {}))
    return KINDS[method](**{"model": MODEL, "prompt": "a red apple", "config": config_proto} | given | fields)


SETTINGS: dict[str, list[Any]] = {
    "guidance_scale": [NAN, INFINITE, -INFINITE, 0.0, 0.5, -1.0, 101.0, 1e30],
    "num_inference_steps": [0, -1, SMALLEST, 21, LARGEST],
    "width": [0, -4, SMALLEST, 7, 30, 131, 4096, LARGEST],
    "height": [0, -4, SMALLEST, 7, 30, 131, 4096, LARGEST],
    "num_images": [0, -1, SMALLEST, 5, LARGEST],
    "seed": [-1, -(2**63)],
    "sampler": [4, 99, -1],
    "format": [4, 99, -1],
    "quality": [50],  # of a PNG
}


def _wrong_settings() -> Iterator[Malformed]:
    for method in KINDS:
        for name, values in SETTINGS.items():
            for value in values:
                yield Malformed(method, request_of(method, {name: value}), f"config.{name}", f"{name}={value!r}")
        for quality in (0, -1, 101, LARGEST):
            config = {"quality": quality, "format": image_pb2.IMAGE_FORMAT_JPEG}
            yield Malformed(method, request_of(method, config), "config.quality", f"quality={quality}")
        last = {"seed": 2**63 - 1, "num_images": 2}
        yield Malformed(method, request_of(method, last), "config.seed", "a second seed that is none")
        yield Malformed(method, request_of(method, prompt="é" * 301), "prompt", "a long prompt")
        yield Malformed(method, request_of(method, negative_prompt="é" * 301), "negative_prompt", "a long negative one")
        both = {"prompt": "a" * 200, "negative_prompt": "b" * 101}
        yield Malformed(method, request_of(method, None, **both), "prompt", "two prompts that are long together")
        narrow = {"width": 16_388, "height": 8}
        yield Malformed(method, request_of(method, narrow, model=ROOMY), "config.width", "a side that WebP cannot have")
    large = {"width": 1024, "height": 1024, "num_images": 2}
    yield Malformed("GenerateImage", request_of("GenerateImage", large, model=ROOMY), "config.num_images", "4 MiB")
    yield Malformed("EditImage", request_of("EditImage", large, model=ROOMY), "config.num_images", "4 MiB")
    for every in (-1, SMALLEST):
        wrong = request_of("StreamGenerateImage", preview_every=every)
        yield Malformed("StreamGenerateImage", wrong, "preview_every", f"preview_every={every}")


def _wrong_edits() -> Iterator[Malformed]:
    for strength in (0.0, -0.5, 1.5, NAN, INFINITE, 1e-6, 0.4):  # the last is less than one of two steps
        yield _edit(f"strength={strength}", "strength", strength=strength)
    for size in ((SIDE, SIDE - 1), (SIDE * 2, SIDE * 2), (1, 1)):
        yield _edit(f"a mask of {size}", "mask", mask=picture(size=size))
    yield _edit("an image on its side, a mask that is not", "mask", image=_turned(), mask=picture(size=(SIDE, 12)))
    yield _edit("a wide image for one height", "config.width", image=picture(size=(1000, 10)), config={"height": 128})
    yield _edit("no image", "image", image=b"")
    yield _edit("no mask", "mask", mask=b"")
    yield _edit("a large upload", "image", image=picture("BMP", (200, 200)))
    yield _edit("two that are large together", "mask", image=bytes(60_000), mask=bytes(60_000))


def _wrong_uploads() -> Iterator[Malformed]:
    for what, data in _no_pictures():
        yield _edit(what, "image", image=data)
    for what, data in list(_no_pictures())[::4]:
        yield _edit(f"as the mask, {what}", "mask", mask=data)


def _no_pictures() -> Iterator[tuple[str, bytes]]:
    yield from _cut_off()
    yield from too_large()
    yield from _of_another_type()
    yield from _damaged()


def _cut_off() -> Iterator[tuple[str, bytes]]:
    kinds = {
        "PNG": picture(), "JPEG": picture("JPEG"), "progressive JPEG": picture("JPEG", progressive=True),
        "WebP": picture("WEBP"), "lossless WebP": picture("WEBP", lossless=True),
    }  # fmt: skip
    for kind, whole in kinds.items():
        for at in (1, 8, 16, 30, 50, *(len(whole) * share // 100 for share in (20, 50, 80, 97))):
            yield f"{kind} cut off at {at} of {len(whole)}", whole[:at]


def too_large() -> Iterator[tuple[str, bytes]]:
    """What declares more than LIMITS allow, nearly all of it without having it."""
    for width, height in ((50_000, 50_000), (2**31 - 1, 1), (1, 2**31 - 1), (129, 128), (10_000, 17_000)):
        yield f"PNG header of {width} × {height}", png_header(width, height)
    for width, height in ((50_000, 50_000), (65_500, 1), (129, 128)):
        yield f"JPEG header of {width} × {height}", _jpeg_header(width, height)
    for width, height in ((50_000, 50_000), (2**24, 2**24), (16_383, 16_383), (129, 128)):
        yield f"WebP canvas of {width} × {height}", _webp(b"VP8X", bytes(4) + _three(width - 1) + _three(height - 1))
    yield "lossless WebP of 16384 × 16384", _webp(b"VP8L", b"\x2f" + b"\xff" * 7)
    yield "lossy WebP of 16383 × 16383", _webp(b"VP8 ", b"\x10\x00\x00\x9d\x01\x2a" + b"\xff\x3f" * 2 + bytes(20))
    yield "animated WebP of 13000 × 13000, with small frames", _animation_on_canvas(13_000, 13_000)
    yield "129 × 128 pixels that are there", picture("WEBP", (129, 128))
    yield "16 million pixels in a few kilobytes", flat_png(4000, 4000)


def _of_another_type() -> Iterator[tuple[str, bytes]]:
    for format in ("GIF", "BMP", "TIFF", "ICO", "PPM", "TGA", "JPEG2000"):
        yield format, picture(format)
    yield "SVG", b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>'
    yield "PDF", b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n"
    yield "PostScript, which other programs would run", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    yield "HTML", b"<!doctype html><title>404</title>"
    yield "a name", b"apple.png"


def _damaged() -> Iterator[tuple[str, bytes]]:
    rng = random.Random(0)
    for size in (1, 2, 3, 10, 30, 100, 1000, 10_000):
        yield f"{size} random bytes", rng.randbytes(size)
    for kind, start in {"PNG": PNG_SIGNATURE, "JPEG": b"\xff\xd8\xff", "WebP": b"RIFF\x40\0\0\0WEBPVP8 "}.items():
        for size in (10, 100, 1000):
            yield f"{size} random bytes that begin as {kind}", start + rng.randbytes(size)
    whole = picture()
    for at in (20, 30, 41, 60, len(whole) // 2):
        yield f"PNG with byte {at} turned over", whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]
    yield "PNG of 0 × 0", png_header(0, 0)
    text = _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50 << 20), 9))
    yield "PNG with 50 MiB of text in 50 kilobytes", whole[:33] + text + whole[33:]


def png_header(width: int, height: int) -> bytes:
    """A PNG of that size, whose pixels are missing."""
    return (
        PNG_SIGNATURE + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + _chunk(b"IDAT", b"x")
    )


def flat_png(width: int, height: int) -> bytes:
    """A PNG of one colour, which is small whatever its size."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    rows = zlib.compress(bytes(1 + (width + 7) // 8) * height, 9)
    return PNG_SIGNATURE + header + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _jpeg_header(width: int, height: int) -> bytes:
    whole = picture("JPEG")
    at = whole.index(b"\xff\xc0") + 5
    return whole[:at] + struct.pack(">HH", height, width) + whole[at + 4 :]


def _webp(kind: bytes, data: bytes) -> bytes:
    body = b"WEBP" + kind + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _animation_on_canvas(width: int, height: int) -> bytes:
    frames = [Image.new("RGB", (8, 8), (level, 0, 0)) for level in (0, 255)]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])
    return file.getvalue()[:24] + _three(width - 1) + _three(height - 1) + file.getvalue()[30:]


def _three(number: int) -> bytes:
    return number.to_bytes(3, "little")


def _turned() -> bytes:
    """A picture of SIDE × 12 whose EXIF says that it lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture("JPEG", (SIDE, 12), exif=exif)


def _edit(what: str, field: str, config: dict[str, Any] | None = None, **fields: Any) -> Malformed:
    return Malformed("EditImage", request_of("EditImage", config, **fields), field, what)
