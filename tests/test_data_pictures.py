"""Pictures as pixels: decoding what people's files hold, sizes, and what is written and read back."""

import hashlib
import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from training.data.captions import Captioned
from training.data.pictures import MAX_PIXELS, Pictures, buckets, decode, fit, nearest_bucket, write_pictures
from training.data.records import DataError

RED, WHITE = (255, 0, 0), (255, 255, 255)


def record(content, caption="x", where="here"):
    return Captioned(caption, caption, where, lambda: content)


def file(image, kind="PNG", **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def shown(image, kind="PNG", **options):
    return decode(record(file(image, kind, **options)))


def left_red(mode="RGB"):
    """4 × 2 pixels, the left half red, the right half blue."""
    image = Image.new("RGB", (4, 2), "blue")
    image.paste("red", (0, 0, 2, 2))
    return image.convert(mode)


# ---- decoding


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats_are_told_by_their_content(kind):
    image = shown(left_red(), kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert (image.mode, image.size) == ("RGB", (4, 2))
    assert image.getpixel((0, 0)) == RED and image.getpixel((3, 1)) == (0, 0, 255)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_picture_is_turned_as_its_exif_says(kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the first row is the right side
    image = shown(left_red().resize((64, 32), Image.Resampling.NEAREST), kind, exif=exif)
    assert image.size == (32, 64)
    assert image.getpixel((16, 8))[0] > 200 and image.getpixel((16, 56))[2] > 200  # red above, blue below


def test_what_is_transparent_is_white():
    clear = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 128))
    half, none = (shown(clear).getpixel((x, 0)) for x in (0, 1))
    assert none == WHITE and half == (255, 127, 127)
    assert shown(Image.new("LA", (1, 1), (0, 0))).getpixel((0, 0)) == WHITE
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([0, 0, 0, *RED])
    palette.putpixel((1, 0), 1)
    image = shown(palette, transparency=0)
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [WHITE, RED]
    keyed = shown(left_red(), transparency=(0, 0, 255))
    assert [keyed.getpixel((x, 0)) for x in (0, 3)] == [RED, WHITE]


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_other_modes_become_rgb(mode):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    assert shown(left_red(mode), kind).mode == "RGB"


def test_sixteen_bits_are_scaled_and_not_cut_off():
    grey = Image.fromarray(np.array([[0, 128 * 257, 65_535]], np.uint16))
    image = shown(grey)
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_pixels_are_taken_as_they_are_or_refused():
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert np.array_equal(np.asarray(decode(record(pixels))), pixels)
    with pytest.raises(ValueError, match=r"^here: must be uint8 \[height, width, 3\], not float64 \(2, 4, 3\)$"):
        decode(record(pixels / 2))


def bomb(width, height):
    """A PNG of a few bytes whose header claims so many pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    packed = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


BAD = {
    "empty": (b"", "not a picture in a format that is read here"),
    "text": (b"<svg></svg>", "not a picture in a format that is read here"),
    "cut": (file(Image.effect_noise((64, 64), 99))[:900], "truncated"),
    "cut jpeg": (file(Image.effect_noise((64, 64), 99), "JPEG")[:900], "truncated"),
    "bomb": (bomb(9_000, 9_000), f"9000 × 9000 pixels are more than {MAX_PIXELS:,}"),
    "huge bomb": (bomb(50_000, 50_000), "exceeds limit|more than"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not a picture in a format"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_said_to_be_bad_and_where(case):
    content, why = BAD[case]
    with pytest.raises(ValueError, match=rf"^here: .*({why})"):
        decode(record(content))


def test_a_file_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match=r"^here: there is no such file$"):
        decode(Captioned("x", "x", "here", path.read_bytes))


# ---- sizes


@pytest.mark.parametrize(("resolution", "multiple"), [(32, 8), (64, 8), (64, 4), (136, 8), (256, 16), (512, 64)])
def test_buckets_are_of_one_area_within_two_to_one(resolution, multiple):
    sizes = buckets(resolution, multiple)
    assert (resolution, resolution) in sizes and 3 <= len(sizes) <= 9 and len(set(sizes)) == len(sizes)
    assert sizes == sorted(sizes) and {(h, w) for w, h in sizes} == set(sizes)
    for w, h in sizes:
        assert w % multiple == 0 and h % multiple == 0 and 0.5 <= w / h <= 2
        assert 0.8 * resolution**2 < w * h <= resolution**2


def test_the_smallest_resolution_has_one_bucket_and_others_must_divide():
    assert buckets(8, 8) == [(8, 8)]
    for resolution, nearest in ((0, 8), (4, 8), (61, 64)):
        said = rf"resolution={resolution} must be a multiple of 8 pixels; the nearest is {nearest}"
        with pytest.raises(ValueError, match=said):
            buckets(resolution, 8)


def test_the_nearest_bucket_is_by_aspect_ratio():
    sizes = [(40, 88), (64, 64), (88, 40)]
    assert [nearest_bucket(size, sizes) for size in ((1000, 999), (10, 100), (300, 150))] == [sizes[1], *sizes[::2]]
    assert nearest_bucket((90, 60), [(64, 64), (72, 56), (80, 48)]) == (80, 48)  # 1.5 is nearer to 1.67 than to 1.29


def test_fit_covers_and_cuts_out_the_centre():
    image = Image.new("RGB", (300, 100), "blue")
    image.paste("red", (100, 0, 200, 100))
    pixels = fit(image, (50, 50))
    assert pixels.shape == (50, 50, 3) and pixels.dtype == np.uint8
    assert (pixels[:, 5:-5] == RED).all() and (pixels[..., 0] > pixels[..., 2]).all()  # the edge is smoothed
    assert fit(image, (60, 20)).shape == (20, 60, 3)


def test_what_fits_is_left_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    assert np.array_equal(fit(Image.fromarray(pixels), (24, 16)), pixels)


# ---- written once


def noise(index, size=(32, 32)):
    return np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), np.uint8)


def test_pictures_come_back_in_their_order_whatever_their_bucket(tmp_path):
    sizes = [(32, 32), (40, 24), (32, 32), (24, 40), (40, 24)]
    pixels = [noise(index, size) for index, size in enumerate(sizes)]
    records = [record(content, f"picture {index} – 🙂") for index, content in enumerate(pixels)]
    assert write_pictures(records, 32, 8, tmp_path / "pictures") == []
    pictures = Pictures(tmp_path / "pictures")
    assert len(pictures) == 5 and pictures.sizes == sizes
    assert pictures.captions == [record.caption for record in records]
    assert pictures.hashes == [hashlib.sha256(content.tobytes()).hexdigest() for content in pixels]
    for index, content in enumerate(pixels):
        assert np.array_equal(pictures.batch([index])[0], content)
    assert np.array_equal(pictures.batch(np.array([4, 1])), np.stack([pixels[4], pixels[1]]))
    with pytest.raises(AssertionError, match="several sizes"):
        pictures.batch([0, 1])


def test_pictures_that_were_seen_are_left_out(tmp_path):
    write_pictures([record(noise(i), str(i)) for i in range(3)], 32, 8, tmp_path / "train")
    held_out = [record(noise(i), f"held out {i}") for i in (2, 3, 1)]
    write_pictures(held_out, 32, 8, tmp_path / "val", seen=frozenset(Pictures(tmp_path / "train").hashes))
    assert Pictures(tmp_path / "val").captions == ["held out 3"]


def test_the_files_are_plain_arrays_and_lines(tmp_path):
    write_pictures([record(noise(i), str(i)) for i in range(12)], 32, 8, tmp_path / "pictures")
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["32x32.npy", "index.jsonl"]
    array = np.load(tmp_path / "pictures/32x32.npy")
    assert array.shape == (12, 32, 32, 3) and np.array_equal(array[11], noise(11))
    line = json.loads((tmp_path / "pictures/index.jsonl").read_text("utf-8").splitlines()[11])
    assert {name: line[name] for name in ("caption", "bucket", "row")} == {
        "caption": "11",
        "bucket": "32x32",
        "row": 11,
    }


def test_bad_pictures_are_skipped_by_name_up_to_a_bound(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("training.data.pictures.MAX_BAD", 0.18)
    records = [record(noise(i), str(i)) for i in range(9)]
    records.insert(3, record(b"junk", "bad", where="pictures/17.png"))
    bad = write_pictures(records, 32, 8, tmp_path / "pictures")
    assert len(bad) == 1 and bad[0].startswith("pictures/17.png: not a picture")
    assert capsys.readouterr().out == f"skipped: {bad[0]}\n"
    assert Pictures(tmp_path / "pictures").captions == [str(i) for i in range(9)]
    records.append(record(b"junk", "bad too", where="pictures/18.png"))
    said = r"^images: 2 of 11 pictures cannot be decoded \(at most 18 % may be\); .* first: pictures/17\.png: not a"
    with pytest.raises(DataError, match=said):
        write_pictures(records, 32, 8, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_single_bad_picture_of_a_few_is_no_reason_to_stop(tmp_path):
    assert len(write_pictures([record(noise(0)), record(b"junk")], 32, 8, tmp_path / "pictures")) == 1


def test_what_was_written_stays_when_the_next_writing_fails(tmp_path):
    write_pictures([record(noise(0), "kept")], 32, 8, tmp_path / "pictures")
    with pytest.raises(DataError, match="images: 2 of 2 pictures cannot be decoded"):
        write_pictures([record(b"junk")] * 2, 32, 8, tmp_path / "pictures")
    assert Pictures(tmp_path / "pictures").captions == ["kept"]


def test_a_side_of_which_nothing_is_left_is_refused_by_name(tmp_path):
    write_pictures([record(noise(0))], 32, 8, tmp_path / "train")
    seen = frozenset(Pictures(tmp_path / "train").hashes)
    said = "^images, held out: none of 3 pictures is left: 1 cannot be decoded, 2 are on .*; give more pictures"
    with pytest.raises(DataError, match=said):
        records = [record(noise(0)), record(b"junk"), record(noise(0))]
        write_pictures(records, 32, 8, tmp_path / "val", "images, held out", seen)
