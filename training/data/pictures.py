"""Pictures as pixels: decoded, fitted to a few sizes, written once, memory-mapped by every worker.

Leaves out augmentation (a pictogram that is mirrored is another one) and decoding while training: at a denoiser's
resolution the pixels take less room than most files do.
"""

import hashlib
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
from PIL import Image, ImageOps

from training.config import nearest_multiple
from training.data.captions import Captioned
from training.data.records import DataError
from training.run import folder_atomic, read_jsonl

Size: TypeAlias = tuple[int, int]  # width and height in pixels, as Pillow has them

MAX_PIXELS = 2**26  # of a picture before it is fitted: 8192 × 8192; more is taken for a decompression bomb
MAX_ASPECT = 2.0  # of a bucket: a longer picture loses its ends
STEPS = 8  # the resolution is at least so many times the step from one bucket's width to the next
MAX_BAD = 0.01  # of all pictures: so many may be impossible to decode
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


# ---- decoding


def decode(record: Captioned) -> Image.Image:
    """The picture in RGB: turned as its EXIF says, on white where it is transparent. ValueError `where: why`."""
    try:
        content = record.read()
        image = _from_pixels(content) if isinstance(content, np.ndarray) else _from_bytes(content)
    except Exception as error:  # Pillow lets through whatever its parsers meet in a broken file
        raise ValueError(f"{record.where}: {_why(error)}") from None
    return image


def _why(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not a picture in a format that is read here ({', '.join(FORMATS)})"
    return str(error) or type(error).__name__


def _from_pixels(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"must be uint8 [height, width, 3], not {pixels.dtype} {pixels.shape}")
    return Image.fromarray(pixels)


def _from_bytes(content: bytes) -> Image.Image:
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} × {image.height} pixels are more than {MAX_PIXELS:,}")
        return _on_white(_eight_bits(ImageOps.exif_transpose(image)))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Sixteen bits a pixel (grey, of scanners) as eight; Pillow would cut off what is above 255."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).clip(0, 65_535) // 257).astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white.convert("RGB")


# ---- sizes


def buckets(resolution: int, multiple: int) -> list[Size]:
    """Sizes of at most resolution² pixels and nearly as many, 1:2 to 2:1, narrowest first; a few at any resolution.

    Sides are multiples of `multiple`, what the model's downsampling needs. Raises DataError where resolution is none.
    """
    if resolution != (nearest := nearest_multiple(resolution, multiple)):
        raise DataError(f"resolution={resolution} must be a multiple of {multiple} pixels; the nearest is {nearest}")
    step = multiple * max(1, resolution // (STEPS * multiple))
    wide = []
    for width in range(resolution + step, resolution * 2, step):
        height = resolution**2 // width // multiple * multiple
        if height and width <= MAX_ASPECT * height:
            wide.append((width, height))
    return [*((height, width) for width, height in reversed(wide)), (resolution, resolution), *wide]


def nearest_bucket(size: Size, sizes: Sequence[Size]) -> Size:
    """The one of `sizes` whose aspect ratio is nearest to that of a picture of this size."""
    return min(sizes, key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - math.log(size[0] / size[1])))


def fit(image: Image.Image, size: Size) -> np.ndarray:
    """uint8 [height, width, 3]: scaled until it covers `size`, its centre cut out."""
    return np.asarray(ImageOps.fit(image, size, Image.Resampling.LANCZOS))


# ---- written once


def write_pictures(
    records: Sequence[Captioned],
    resolution: int,
    multiple: int,
    folder: Path,
    name: str = "images",
    seen: frozenset[str] = frozenset(),
) -> list[str]:
    """Pixels of every bucket as WIDTHxHEIGHT.npy uint8 [N, height, width, 3], and index.jsonl; whole or not at all.

    Those whose pixels have a hash in `seen` are left out. Pictures that cannot be decoded are skipped and printed; the
    list of them, `where: why`, is returned. Raises DataError, with what messages call the pictures, `name`, where they
    are more than MAX_BAD of all (one is never too many), or nothing is left.
    """
    sizes = buckets(resolution, multiple)
    bad: list[str] = []
    with folder_atomic(folder) as temporary:
        writer = _Writer(temporary, seen)
        for record in records:
            try:
                image = decode(record)
            except ValueError as error:
                bad.append(str(error))
                print(f"skipped: {error}", flush=True)
                continue
            writer.add(record.caption, fit(image, nearest_bucket(image.size, sizes)))
        if len(bad) > max(1, MAX_BAD * len(records)):
            raise DataError(
                f"{name}: {len(bad)} of {len(records)} pictures cannot be decoded (at most {100 * MAX_BAD:g} % may be);"
                f" remove or repair them; first: {bad[0]}"
            )
        if not writer.index:
            raise DataError(
                f"{name}: none of {len(records)} pictures is left: {len(bad)} cannot be decoded, "
                f"{len(records) - len(bad)} are on the training side too; give more pictures, or another val_fraction"
            )
        writer.finish()
    return bad


class _Writer:
    """Rows appended to one .npy a bucket; the number of rows in its header is written last."""

    def __init__(self, folder: Path, seen: frozenset[str]) -> None:
        self._folder, self._seen = folder, seen
        self._files: dict[Size, BinaryIO] = {}
        self._rows: dict[Size, int] = {}
        self.index: list[dict[str, str | int]] = []

    def add(self, caption: str, pixels: np.ndarray) -> None:
        content = pixels.tobytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest in self._seen:
            return
        size = pixels.shape[1], pixels.shape[0]
        if size not in self._files:
            self._files[size], self._rows[size] = (self._folder / f"{_name(size)}.npy").open("wb"), 0
            self._header(size)
        self._files[size].write(content)
        self.index.append({"caption": caption, "bucket": _name(size), "row": self._rows[size], "sha256": digest})
        self._rows[size] += 1

    def finish(self) -> None:
        for size, file in self._files.items():
            self._header(size)
            file.close()
        lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.index)
        (self._folder / "index.jsonl").write_text(lines, "utf-8")

    def _header(self, size: Size) -> None:
        """NumPy leaves room in a header for the first axis to grow, so every header of a file has the same length."""
        shape = (self._rows[size], size[1], size[0], 3)
        self._files[size].seek(0)
        about = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._files[size], about)


def _name(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


class Pictures:
    """What `write_pictures` has written, read as it is needed; in the order of the records."""

    def __init__(self, folder: Path) -> None:
        index = read_jsonl(folder / "index.jsonl")
        self.captions: list[str] = [line["caption"] for line in index]
        self.hashes: list[str] = [line["sha256"] for line in index]  # of the pixels
        self.sizes: list[Size] = [_size(line["bucket"]) for line in index]
        self._rows = np.array([line["row"] for line in index])
        self._pixels = {size: np.load(folder / f"{_name(size)}.npy", mmap_mode="r") for size in set(self.sizes)}

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 [B, height, width, 3]. All of one size."""
        sizes = {self.sizes[index] for index in indices}
        assert len(sizes) == 1, f"pictures of several sizes: {sizes}"
        return self._pixels[sizes.pop()][self._rows[np.asarray(indices)]]


def _size(name: str) -> Size:
    width, height = name.split("x")
    return int(width), int(height)
