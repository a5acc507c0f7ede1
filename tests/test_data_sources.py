"""Source strings, the rows behind them, and the one error that points to the first bad record."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from training.data import sources
from training.data.records import DataError
from training.data.sources import fingerprint, read, resolve

ROWS = [{"text": "one"}, {"text": "two\nlines"}, {"text": "drei – 🙂"}]


def texts(*names: str) -> list[str]:
    return list(read([str(name) for name in names], lambda fields: [fields["text"]]))


@pytest.fixture
def files(tmp_path):
    """The same three documents in every format."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    (tmp_path / "a.txt").write_text("one\n\n\ntwo\nlines\n  \ndrei – 🙂", "utf-8")
    (tmp_path / "b.jsonl").write_text(lines, "utf-8")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    (tmp_path / "e.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\r\nlines\r\n\r\n" + "drei – 🙂\r\n".encode())
    return tmp_path


def test_every_format_gives_the_same_records(files):
    for name in ("a.txt", "b.jsonl", "c.jsonl.gz", "d.parquet", "e.txt"):
        assert texts(files / name) == [row["text"] for row in ROWS], name


def test_globs_match_in_name_order(files):
    assert [path.name for path in resolve([f"{files}/*.jsonl*"])[0].paths] == ["b.jsonl", "c.jsonl.gz"]
    assert len(texts(f"{files}/**/*.*")) == 15


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing/*.txt", r"nothing/\*\.txt: matches no file"),
        ("hub:owner", r"hub:owner: write it as hub:OWNER/NAME"),
        ("sample:poems", r"sample:poems: there is no such sample; there are chitchat-text, "),
    ],
)
def test_a_source_that_matches_nothing_is_named(name, message):
    with pytest.raises(DataError, match=message):
        resolve([name])
    with pytest.raises(DataError, match=message):
        fingerprint([name])


def test_a_folder_and_an_unknown_format_are_refused(tmp_path):
    (tmp_path / "table.csv").write_text("a,b\n")
    with pytest.raises(DataError, match=r"is a folder; name its files"):
        resolve([str(tmp_path)])
    with pytest.raises(DataError, match=r"table\.csv: not a format"):
        resolve([f"{tmp_path}/*"])


def test_an_unreachable_hub_data_set_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    name = "hub:chatforge-no-such-owner/no-such-set:test"
    with pytest.raises(DataError, match=name):
        texts(name)
    with pytest.raises(DataError, match=name):
        fingerprint([name])


def test_hub_names_hold_subset_and_split():
    assert sources._hub_parts("hub:a/b") == ("a/b", None, "train")
    assert sources._hub_parts("hub:a/b/c:test") == ("a/b", "c", "test")


def test_the_first_bad_record_is_pointed_to_and_the_rest_are_counted(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n{"text": oops}\n[1]\n{"text": "\xff"}\n{"text": "fine"}\n')
    with pytest.raises(DataError) as caught:
        texts(path)
    assert str(caught.value) == f"{path}:3: not valid JSON: Expecting value at column 10 (and 2 more bad records)"


def test_text_that_is_not_utf8_is_pointed_to(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"fine\n\nna\xefve\n")
    with pytest.raises(DataError, match=r"latin\.txt:3: not UTF-8: byte 3 of the line"):
        texts(tmp_path / "latin.txt")


@pytest.mark.parametrize("name", ["cut.jsonl.gz", "cut.parquet"])
def test_a_damaged_file_is_named(tmp_path, name):
    whole = gzip.compress(b'{"text": "one"}\n' * 1000) if name.endswith("gz") else b"PAR1 and nothing else"
    (tmp_path / name).write_bytes(whole[:-9])
    with pytest.raises(DataError, match=name):
        texts(tmp_path / name)


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"empty\.jsonl: holds no records"):
        texts(tmp_path / "empty.jsonl")


def test_fingerprint_follows_content_and_nothing_else(files):
    name = f"{files}/*.jsonl"
    before = fingerprint([name])
    (files / "b.jsonl").touch()
    assert fingerprint([name]) == before
    with (files / "b.jsonl").open("a") as file:
        file.write('{"text": "four"}\n')
    assert fingerprint([name])[name] != before[name]
    assert fingerprint(["sample:chitchat"])["sample:chitchat"].startswith("chitchat-dataset 0.9.0")
