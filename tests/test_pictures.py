"""Files to pixels and back: what is shown is what a viewer shows, what is no whole picture is refused, sizes first."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from malformed_images import flat_png, picture, png_header
from PIL import Image
from services_world import environment

from services import pictures
from services.pictures import Encoding

TESTS = Path(__file__).parent
MANY = 1 << 20
RED, WHITE = (255, 0, 0), (255, 255, 255)
FILES = {
    "PNG": picture(),
    "grey PNG": picture(mode="L"),
    "JPEG": picture("JPEG"),
    "progressive JPEG": picture("JPEG", progressive=True),
    "WebP": picture("WEBP"),
    "lossless WebP": picture("WEBP", lossless=True),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_cut_file_is_refused_unless_every_pixel_is_there(kind: str) -> None:
    whole = FILES[kind]
    shown = np.asarray(pictures.decode(whole, MANY))
    refused = 0
    for length in range(len(whole)):
        try:
            decoded = pictures.decode(whole[:length], MANY)
        except ValueError as error:
            assert str(error) in ("is damaged or cut off", "is no PNG, JPEG or WebP picture that can be read")
            refused += 1
        else:
            assert (np.asarray(decoded) == shown).all()
    assert refused >= len(whole) - 24  # a PNG's last chunks hold no pixels


def test_the_declared_size_is_checked_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(ValueError, match=r"^is 50000 × 50000, above the limit of 1048576 pixels; send a smaller one$"):
        pictures.decode(png_header(50_000, 50_000), MANY)
    with pytest.raises(ValueError, match=r"^is 1025 × 1024, above the limit"):
        pictures.decode(flat_png(1025, 1024), MANY)
    with pytest.raises(ValueError, match=r"^is 16384 × 1, above 16383 pixels a side; send a smaller one$"):
        pictures.decode(flat_png(16_384, 1), MANY)


def test_refusing_a_bomb_takes_no_memory() -> None:
    """In a process of its own, which has had no other peak: some would take a gigabyte."""
    code = """if True:
        import re
        from malformed_images import too_large
        from services import pictures
        def peak():  # KiB
            return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
        bombs, before = [data for _, data in too_large()], peak()
        for data in bombs:
            try:
                pictures.decode(data, 128 * 128)
            except ValueError:
                continue
            raise AssertionError("it was decoded")
        print(len(bombs) > 10, peak() - before < 8 * 1024)
    """
    told = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=TESTS, capture_output=True, text=True)
    assert (told.stdout, told.stderr) == ("True True\n", "")


def test_a_picture_at_the_limit_is_decoded() -> None:
    assert pictures.decode(flat_png(1024, 1024), MANY).size == (1024, 1024)
    with pytest.raises(ValueError, match=r"^is 64 × 65, above the limit of 4096 pixels"):
        pictures.decode(picture("JPEG", (64, 65)), 64 * 64)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_lies_on_white(format: str, mode: str) -> None:
    rgba = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    rgba.paste((0, 0, 0, 255), (0, 0, 2, 2))
    shown = pictures.decode(saved(rgba.convert(mode), format, lossless=True), MANY)
    assert (shown.mode, shown.getpixel((0, 0)), shown.getpixel((3, 1))) == ("RGB", (0, 0, 0), WHITE)


def test_half_transparent_red_on_white_is_pink() -> None:
    assert pictures.decode(saved(Image.new("RGBA", (2, 2), (255, 0, 0, 128)), "PNG"), MANY).getpixel((0, 0)) == (
        255, 127, 127,
    )  # fmt: skip


@pytest.mark.parametrize(("format", "orientation"), [(f, o) for f in ("PNG", "JPEG", "WEBP") for o in range(1, 9)])
def test_a_picture_stands_as_its_exif_says(format: str, orientation: int) -> None:
    upright = Image.new("RGB", (16, 32), WHITE)
    upright.paste(RED, (0, 0, 8, 16))  # top left
    turns = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180], 4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE], 6: [Image.Transpose.ROTATE_90], 7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }  # fmt: skip
    stored = upright
    for turn in turns.get(orientation, []):
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = pictures.decode(saved(stored, format, exif=exif), MANY)
    assert shown.size == (16, 32)
    assert np.abs(np.asarray(shown, np.int16) - np.asarray(upright, np.int16)).mean() < 8


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "I;16"])
def test_pictures_of_any_mode_become_rgb(mode: str) -> None:
    if mode == "I;16":
        stored = Image.fromarray(np.full((2, 3), 0x80FF, np.uint16))
        wanted: Any = (128, 128, 128)
    else:
        stored, wanted = Image.new("RGB", (3, 2), WHITE).convert(mode), WHITE
    shown = pictures.decode(saved(stored, "JPEG" if mode == "CMYK" else "PNG"), MANY)
    assert (shown.mode, shown.size, shown.getpixel((1, 1))) == ("RGB", (3, 2), wanted)


def test_of_an_animation_the_first_picture_is_shown() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, WHITE)]
    for format in ("WEBP", "PNG"):
        file = saved(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
        assert pictures.decode(file, MANY).getpixel((0, 0)) == RED


def test_fitting_covers_and_keeps_the_middle() -> None:
    wide = Image.new("RGB", (40, 10), WHITE)
    wide.paste(RED, (10, 0, 30, 10))
    pixels = pictures.fitted(wide, (8, 8))
    assert (pixels.shape, pixels.dtype) == ((8, 8, 3), np.uint8) and (pixels == RED).all()
    assert pictures.fitted(wide.convert("L"), (8, 16)).shape == (16, 8)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("size", [(1, 1), (8, 4000), (300, 200)])
def test_what_is_written_is_read_again_and_never_above_its_bound(format: Any, size: tuple[int, int]) -> None:
    width, height = size
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    parameters = "é🦁" * 100
    file = pictures.encode(noise, Encoding(format, 100), parameters)
    assert len(file) <= pictures.most_bytes(width, height, parameters)
    shown = np.asarray(pictures.decode(file, MANY))
    assert shown.shape == noise.shape and (format != "PNG" or (shown == noise).all())


def test_the_longest_metadata_fit_into_every_format() -> None:
    for format in pictures.MIME_TYPES:
        parameters = "🦁" * 10_500  # a server's largest max_characters, and the settings
        assert pictures.encode(np.zeros((8, 8, 3), np.uint8), Encoding(format), parameters)


def test_a_preview_is_a_small_jpeg() -> None:
    data, size = pictures.preview(np.zeros((512, 1024, 3), np.uint8))
    assert size == (256, 128) == pictures.decode(data, MANY).size and len(data) < 2000
    assert pictures.preview(np.zeros((32, 32, 3), np.uint8))[1] == (32, 32)


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()
