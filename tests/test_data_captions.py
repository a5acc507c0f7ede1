"""Captioned pictures: every format gives the same records, each picture is read when asked for, errors have a place."""

import gzip
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from training.data.captions import read_captioned
from training.data.pictures import decode
from training.data.records import DataError
from training.data.sources import fingerprint, resolve

COLOURS = {"a red field": (255, 0, 0), "a green field": (0, 128, 0), "a blue field": (0, 0, 255)}


def png(colour, size=(6, 4)):
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, "PNG")
    return content.getvalue()


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def formats(tmp_path):
    """The same three captioned pictures in every format."""
    pictures = [(caption, png(colour)) for caption, colour in COLOURS.items()]
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for index, (_, content) in enumerate(pictures):
        (folder / f"sub/{index}.png").write_bytes(content)
    named = [{"file_name": f"sub/{index}.png", "text": caption} for index, caption in enumerate(COLOURS)]
    (folder / "metadata.jsonl").write_text(jsonl(named))
    structs = [{"image": {"bytes": content, "path": "x.png"}, "text": caption} for caption, content in pictures]
    pq.write_table(pa.Table.from_pylist(structs), tmp_path / "structs.parquet", row_group_size=2)
    plain = [{"image": content, "caption": caption} for caption, content in pictures]
    pq.write_table(pa.Table.from_pylist(plain), tmp_path / "bytes.parquet")
    texts, cards = {}, {}
    for index, (caption, content) in enumerate(pictures):
        texts |= {f"a/{index}.txt": f" {caption}\n".encode(), f"a/{index}.png": content}
        cards |= {f"{index}.PNG": content, f"{index}.json": json.dumps({"caption": caption, "image": "url"}).encode()}
    write_tar(tmp_path / "texts.tar", {**texts, "notes.md": b"nothing", "9.txt": b"without a picture"})
    write_tar(tmp_path / "cards.tar", cards)
    (tmp_path / "packed.tar.gz").write_bytes(gzip.compress((tmp_path / "texts.tar").read_bytes()))
    np.savez(tmp_path / "arrays.npz", images=np.stack([np.asarray(Image.open(io.BytesIO(c))) for _, c in pictures]))
    (tmp_path / "arrays.jsonl").write_text(jsonl({"caption_en": caption, "caption_de": "?"} for caption in COLOURS))
    return tmp_path


FORMATS = ["pictures", "pictures/metadata.jsonl", "*.parquet", "texts.tar", "cards.tar", "packed.tar.gz", "arrays.npz"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_captioned_pictures(formats, name):
    records = read_captioned([str(formats / name)])
    shown = {record.caption: decode(record).getpixel((0, 0)) for record in reversed(records)}  # in any order
    assert shown == COLOURS
    assert [record.key for record in records[:3]] == ["red field", "green field", "blue field"]
    assert all(decode(record).size == (6, 4) for record in records)


def test_a_hub_data_set_keeps_its_pictures_packed(monkeypatch):
    import datasets

    rows = [{"image": {"bytes": png(colour), "path": None}, "text": caption} for caption, colour in COLOURS.items()]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    whole = datasets.Dataset.from_list(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: whole)
    records = read_captioned(["hub:owner/fields"])
    assert [record.where for record in records] == [f"hub:owner/fields:{number}" for number in (1, 2, 3)]
    assert isinstance(records[0].read(), bytes)
    assert [decode(record).getpixel((0, 0)) for record in records] == list(COLOURS.values())


def test_a_data_set_of_texts_is_read_from_the_hub_as_before(monkeypatch):
    import datasets

    from training.data.sources import read

    whole = datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: whole)
    assert list(read(["hub:owner/texts"], lambda fields: [fields["text"]])) == ["one", "two"]


def test_pictures_say_where_they_are(formats):
    where = {name: read_captioned([str(formats / name)])[1].where for name in FORMATS}
    assert where["pictures"] == str(formats / "pictures/sub/1.png")
    assert where["*.parquet"] == f"{formats / 'bytes.parquet'}:2"
    assert where["texts.tar"] == f"{formats / 'texts.tar'}:a/1.png"
    assert where["arrays.npz"] == f"{formats / 'arrays.jsonl'}:2"


def test_an_id_is_the_key_and_captions_are_nfc_with_single_spaces(tmp_path):
    card = json.dumps({"id": 7, "caption": " Cafe\u0301  au\nlait "}).encode()
    (record,) = read_captioned([str(write_tar(tmp_path / "x.tar", {"x.png": png("red"), "x.json": card}))])
    assert (record.key, record.caption, record.identity) == ("7", "Café au lait", "Café au lait")


def test_members_of_one_name_in_two_folders_are_two_records(tmp_path):
    members = {"a/x.png": png("red"), "b/x.png": png("blue"), "a/x.txt": b"one", "b/x.txt": b"other"}
    records = read_captioned([str(write_tar(tmp_path / "x.tar", members))])
    assert [(r.caption, decode(r).getpixel((0, 0))) for r in records] == [("one", (255, 0, 0)), ("other", (0, 0, 255))]


def test_a_caption_of_its_own_file_goes_before_the_card(tmp_path):
    members = {"x.png": png("red"), "x.txt": b"said", "x.json": b'{"caption": "found", "id": "k"}'}
    (record,) = read_captioned([str(write_tar(tmp_path / "x.tar", members))])
    assert (record.caption, record.key) == ("said", "k")


WRONG = {
    "no caption": ([{"file_name": "a.png"}], r"metadata\.jsonl:1: caption: is missing; there are file_name$"),
    "a number": ([{"file_name": "a.png", "text": 5}], r"metadata\.jsonl:1: text: must be a text, not 5"),
    "an empty one": ([{"file_name": "a.png", "caption": " "}], r"metadata\.jsonl:1: caption: is empty"),
    "no picture": ([{"caption": "x"}], r"metadata\.jsonl:1: image: is missing; a picture's file is named by file_name"),
    "a path": ([{"image": "a.png", "caption": "x"}], r"image: must be a picture's bytes, not 'a\.png'"),
    "no name": ([{"file_name": 3, "caption": "x"}], r"metadata\.jsonl:1: file_name: must be a file's path .* not 3"),
    "several": ([{"caption": "x"}] * 3, r"metadata\.jsonl:1: image: is missing.* \(and 2 more bad records\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_record_is_pointed_to(case, tmp_path):
    rows, said = WRONG[case]
    (tmp_path / "metadata.jsonl").write_text(jsonl(rows))
    with pytest.raises(DataError, match=said):
        read_captioned([str(tmp_path)])


WRONG_TARS = {
    "no caption": ({"a/1.png": b""}, r"x\.tar:a/1\.png: caption: is missing"),
    "bad json": ({"1.png": b"", "1.json": b"{oops"}, r"x\.tar:1\.json: not valid json: Expecting"),
    "no object": ({"1.png": b"", "1.json": b"[1]"}, r"x\.tar:1\.json: must hold a JSON object, not list"),
    "not utf-8": ({"1.png": b"", "1.txt": b"\xff\xff"}, r"x\.tar:1\.txt: not valid txt: "),
    "no picture": ({"1.txt": b"x"}, r"x\.tar: holds no records"),
}


@pytest.mark.parametrize("case", WRONG_TARS)
def test_a_wrong_member_of_a_tar_is_named(case, tmp_path):
    members, said = WRONG_TARS[case]
    with pytest.raises(DataError, match=said):
        read_captioned([str(write_tar(tmp_path / "x.tar", members))])


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_a_tar_that_is_cut_short_is_named(tmp_path, name):
    whole = write_tar(tmp_path / "whole", {f"{i}.{kind}": b"x" * 2000 for i in range(9) for kind in ("png", "txt")})
    content = gzip.compress(whole.read_bytes()) if name.endswith("gz") else whole.read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2 - 300])
    with pytest.raises(DataError, match=rf"{name}: not a whole tar file: "):
        read_captioned([str(tmp_path / name)])


def arrays(tmp_path, images, lines):
    np.savez(tmp_path / "x.npz", **images)
    if lines is not None:
        (tmp_path / "x.jsonl").write_text("\ufeff" + lines, "utf-8", "surrogateescape")
    return [str(tmp_path / "x.npz")]


TWO = {"images": np.zeros((2, 4, 4, 3), np.uint8)}
LINE = '{"caption": "x"}\n'
WRONG_ARRAYS = {
    "no lines": (TWO, None, r"x\.npz: there is no x\.jsonl beside it"),
    "too few": (TWO, LINE, r"x\.npz: has 2 images, and x\.jsonl has 1 lines"),
    "bad line": (TWO, LINE + "{oops\n", r"x\.jsonl:2: not valid JSON: Expecting"),
    "not UTF-8": (TWO, LINE + '{"caption": "\udcff"}\n', r"x\.jsonl:2: not UTF-8: byte 14 of the line"),
    "two bad lines": (TWO, '{"text": 5}\n[1]\n', r"x\.jsonl:1: text: must .*, not 5 \(and 1 more bad record\)"),
    "no object": (TWO, LINE + "[1]\n", r"x\.jsonl:2: a record is a JSON object, not list"),
    "another name": ({"pictures": TWO["images"]}, LINE * 2, r"x\.npz: has no array `images`"),
    "floats": ({"images": np.zeros((2, 4, 4, 3))}, LINE * 2, r"images: must be uint8 .* not float64 \(2, 4, 4, 3\)"),
    "grey": ({"images": np.zeros((2, 4, 4), np.uint8)}, LINE * 2, r"images: must be uint8 .* not uint8 \(2, 4, 4\)"),
    "pickled": ({"images": np.array([{}], object)}, LINE * 2, r"x\.npz: has no array `images` that can be read"),
}


@pytest.mark.parametrize("case", WRONG_ARRAYS)
def test_wrong_arrays_are_refused_by_file_and_line(case, tmp_path):
    images, lines, said = WRONG_ARRAYS[case]
    with pytest.raises(DataError, match=said):
        read_captioned(arrays(tmp_path, images, lines))


def test_an_npz_is_not_packed_again(tmp_path):
    (tmp_path / "x.npz.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"x\.npz\.gz: not a format .*, \.npz \(all but \.npz also as \.gz\)"):
        resolve([str(tmp_path / "x.npz.gz")])


def test_what_is_no_npz_is_refused(tmp_path):
    for content in (b"", b"PK nothing", b"text"):
        (tmp_path / "x.npz").write_bytes(content)
        (tmp_path / "x.jsonl").write_text(LINE)
        with pytest.raises(DataError, match=r"x\.npz: has no array"):
            read_captioned([str(tmp_path / "x.npz")])


def test_a_folder_without_metadata_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"is a folder; name its files.*holds a metadata\.jsonl"):
        resolve([str(tmp_path)])


@pytest.mark.parametrize("name", ["pictures", "arrays.npz"])
def test_the_fingerprint_follows_pictures_and_captions(formats, name):
    source = str(formats / name)
    other = {"pictures": formats / "pictures/sub/1.png", "arrays.npz": formats / "arrays.jsonl"}[name]
    before = fingerprint([source])
    assert fingerprint([source]) == before
    other.write_bytes(other.read_bytes() + b"\n")
    assert fingerprint([source]) != before


def test_a_picture_that_is_missing_changes_the_fingerprint_and_is_no_error_of_it(formats):
    before = fingerprint([str(formats / "pictures")])
    (formats / "pictures/sub/1.png").unlink()
    assert fingerprint([str(formats / "pictures")]) != before
    (formats / "pictures/metadata.jsonl").write_text('{oops\n{"file_name": 3}\n')
    assert fingerprint([str(formats / "pictures")]) != before
