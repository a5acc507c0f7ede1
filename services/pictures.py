"""Pictures as files and as pixels: PNG, JPEG and WebP bytes to [height, width, 3] uint8 and back.

What comes from outside is opened only where its header declares a size within the limit, and by those three decoders
alone, whatever its name or its type is said to be.
"""

import io
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

Format = Literal["PNG", "JPEG", "WEBP"]

MIME_TYPES: dict[Format, str] = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
MAX_SIDE = 16_383  # pixels; WebP has no more
PREVIEW_SIDE = 256  # pixels, at most
_PREVIEW_QUALITY = 80
_HEADERS = 2048  # bytes of a file that are no pixels, at most
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # the limit here is far lower
_USER_COMMENT_UTF16 = b"UNICODE\0"  # how EXIF says what follows


@dataclass(frozen=True)
class Encoding:
    """How a picture is written."""

    format: Format = "PNG"
    quality: int = 90  # of JPEG and WebP, 1 to 100

    @property
    def mime_type(self) -> str:
        return MIME_TYPES[self.format]


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """The picture in RGB, turned as its EXIF says, laid on white where it is transparent; of an animation the first.

    Raises ValueError where it is none, declares more than `max_pixels`, or does not hold what it declares.
    """
    try:
        if size := _declared(data):
            _check_size(size, max_pixels)
        with Image.open(io.BytesIO(data), formats=tuple(MIME_TYPES)) as opened:
            _check_size(opened.size, max_pixels)
            opened.load()
            return _flat(ImageOps.exif_transpose(opened))
    except _TooLarge as error:
        raise ValueError(str(error)) from None
    except Image.DecompressionBombError:
        raise ValueError(f"declares far more pixels than the limit of {max_pixels}") from None
    except Image.UnidentifiedImageError:
        raise ValueError("is no PNG, JPEG or WebP picture that can be read") from None
    except Exception:  # decoders raise many kinds, and each is about these bytes
        raise ValueError("is damaged or cut off") from None


def fitted(picture: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """[height, width, 3] uint8, or [height, width] of a picture in grey: scaled to cover `size`, its middle kept."""
    return np.array(ImageOps.fit(picture, size, Image.Resampling.LANCZOS))


def encode(pixels: np.ndarray, encoding: Encoding, parameters: str = "") -> bytes:
    """The file's content; `parameters` are written into it where there are any."""
    options: dict[str, Any] = {} if encoding.format == "PNG" else {"quality": encoding.quality}
    if parameters and encoding.format == "PNG":
        options["pnginfo"] = _png_text(parameters)
    elif parameters:
        options["exif"] = _exif(parameters)
    return _saved(Image.fromarray(pixels), encoding.format, **options)


def most_bytes(width: int, height: int, parameters: str = "") -> int:
    """No picture of that size is written with more: noise as PNG, which is longer than noise as JPEG or WebP."""
    rows = height * (3 * width + 1)
    return rows + rows // 100 + 4 * len(parameters) + _HEADERS


def preview(pixels: np.ndarray) -> tuple[bytes, tuple[int, int]]:
    """A small JPEG of a picture, and its (width, height)."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    return _saved(picture, "JPEG", quality=_PREVIEW_QUALITY), picture.size


class _TooLarge(Exception):
    """A declared size above the limit."""


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels or max(size) > MAX_SIDE:
        limit = f"the limit of {max_pixels} pixels" if width * height > max_pixels else f"{MAX_SIDE} pixels a side"
        raise _TooLarge(f"is {width} × {height}, above {limit}; send a smaller one")


def _declared(data: bytes) -> tuple[int, int] | None:
    """(width, height) out of the header of a PNG or of one of the three kinds of WebP; None for all else.

    Pillow tells them too, but has WebP's decoder allocate a canvas of that size before. Of a JPEG it only reads them.
    """
    match data[:4], data[12:16]:
        case b"\x89PNG", b"IHDR":
            return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
        case b"RIFF", b"VP8X":
            return 1 + _little(data[24:27]), 1 + _little(data[27:30])
        case b"RIFF", b"VP8L":
            bits = _little(data[21:25])
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        case b"RIFF", b"VP8 ":
            return _little(data[26:28]) & 0x3FFF, _little(data[28:30]) & 0x3FFF
    return None


def _little(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _flat(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bits of grey, of which Pillow's own conversion keeps the wrong ones
        return Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")


def _png_text(parameters: str) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", parameters)  # Pillow writes iTXt where it is not Latin-1
    return info


def _exif(parameters: str) -> bytes:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _USER_COMMENT_UTF16 + parameters.encode("utf-16-be")
    return exif.tobytes()


def _saved(picture: Image.Image, format: Format, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()
