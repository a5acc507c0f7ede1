"""Folders in a store: a real S3 API on loopback, killed writers, bad connections, and what is said where it fails."""

import random
import shutil
import subprocess
import sys
import time
import uuid

import pytest
from s3 import bad_connection, files, fill
from services_world import run_command
from workers import ROOT

from training.store import INDEX, StoreError, check, open_store


@pytest.fixture
def uri(bucket):
    return f"{bucket}/runs"


@pytest.mark.parametrize("kind", ["s3", "file", "memory"])
def test_a_folder_comes_back_as_it_was_and_as_it_became(kind, uri, tmp_path):
    if kind != "s3":
        uri = f"{kind}://{tmp_path / uuid.uuid4().hex}"
    there = open_store(uri)
    here, back = tmp_path / "here", tmp_path / "back"
    for contents in ({"a": "1", "sub/b": "2", "empty": ""}, {"a": "3", "sub/b": "2"}, {"a": "3"}, {"c": "4"}):
        there.push(fill(here, contents), "model")
        there.pull("model", back)
        assert files(back) == files(here)
        assert len(there.objects("model")) == len(contents) + 1  # and nothing of the versions before
    assert there.list() == ("model",) and there.exists("model") and not there.exists("mod")
    there.push(fill(here, {"manifest.json": "{}"}) / "manifest.json", "manifest.json")
    assert (there.files(), there.read("manifest.json")) == (("manifest.json",), b"{}")
    there.delete("model")
    there.delete("model")
    assert list(there.objects()) == ["manifest.json"]


def test_only_what_differs_is_fetched(uri, tmp_path):
    there, back = open_store(uri), tmp_path / "back"
    there.push(fill(tmp_path / "here", {"a": "1", "b": "2"}), "model")
    there.pull("model", back)
    same = (back / "b").stat()
    there.push(fill(tmp_path / "here", {"a": "changed", "b": "2"}), "model")
    there.pull("model", back)
    assert (back / "a").read_text() == "changed"
    assert ((back / "b").stat().st_ino, (back / "b").stat().st_mtime_ns) == (same.st_ino, same.st_mtime_ns)


def test_a_large_file_goes_in_parts(uri, tmp_path):
    folder = fill(tmp_path / "here", {"config.json": "{}"})
    (folder / "weights").write_bytes(random.Random(0).randbytes(11 << 20))
    there = open_store(uri)
    there.push(folder, "model")
    assert there.etag("model/weights").strip('"').endswith("-2")  # S3's mark of an object of two parts
    there.pull("model", tmp_path / "back")
    assert files(tmp_path / "back") == files(folder)


def test_what_was_not_committed_is_not_there(uri, tmp_path):
    there = open_store(uri)
    there.upload(fill(tmp_path / "here", {"a": "1"}), "checkpoints/step-00000001")
    assert there.list("checkpoints") == () and not there.exists("checkpoints/step-00000001")
    assert there.folders("checkpoints") == ("step-00000001",)
    with pytest.raises(StoreError, match="step-00000001: cannot be read"):
        there.pull("checkpoints/step-00000001", tmp_path / "back")


PUSHES = """
import pathlib, sys
from training.store import open_store
folder, uri, first = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
folder.mkdir()
for version in range(first, first + 1000):
    for name, size in (("a", 1000), ("b", 3_000_000), ("c", 1000)):
        (folder / name).write_bytes(version.to_bytes(4, "big") * size)
    open_store(uri).push(folder, "model")
    print(version, flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_the_version_before_or_the_new_one(uri, tmp_path):
    there, last = open_store(uri), 0
    for life in range(2):
        command = [sys.executable, "-c", PUSHES, str(tmp_path / f"here{life}"), uri, str(last + 1)]
        writer = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        last = int(writer.stdout.readline())
        time.sleep(random.uniform(0.0, 1.5))
        writer.kill()
        last = int((writer.stdout.read().split() or [last])[-1])
        writer.wait()
        there.pull("model", tmp_path / "back")
        versions = {int.from_bytes(content[:4], "big") for content in files(tmp_path / "back").values()}
        assert len(versions) == 1 and versions <= {last, last + 1}
        last = versions.pop()
    there.push(fill(tmp_path / "here", {"a": "1"}), "model")
    assert set(there.objects("model")) == {entry.name for entry in there.index("model").values()} | {INDEX}


def test_what_was_changed_behind_our_back_is_not_used(s3, uri, tmp_path):
    there = open_store(uri)
    there.push(fill(tmp_path / "here", {"a": "right"}), "model")
    s3.put(f"{uri}/model/a", b"wrong")
    with pytest.raises(StoreError, match=r"/model/a: is not what was written there .*delete its folder"):
        there.pull("model", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_lost_connections_are_tried_again(s3, uri, tmp_path):
    folder = fill(tmp_path / "here", {f"file{n}": str(n) for n in range(6)})
    with bad_connection(s3) as proxy:
        there = open_store(f"{uri}?endpoint_override=http://127.0.0.1:{proxy.server_address[1]}")
        there.push(folder, "model")
        there.pull("model", tmp_path / "back")
    assert files(tmp_path / "back") == files(folder)
    assert proxy.cut


# ---- what is said where it cannot be used


def test_a_check_leaves_nothing(uri):
    check(uri)
    assert not open_store(uri).objects()


MISTAKES = {
    "s3://no-such-bucket/runs": "cannot be written: there is no such bucket; create it, or correct the URI",
    "s3://b/runs?endpoint_override=http://127.0.0.1:1": "no connection to http://127.0.0.1:1; correct AWS_ENDPOINT_URL",
    "s3://": "s3://: is no URI; write it as s3://BUCKET/PREFIX",
    "runs": "runs: is no URI",
    "nothing://runs/x": "cannot be opened: Protocol not known: nothing",
}


@pytest.mark.parametrize("wrong", MISTAKES)
def test_a_mistake_is_named_with_its_fix(wrong, bucket):
    with pytest.raises(StoreError) as error:
        check(wrong)
    assert MISTAKES[wrong] in str(error.value) and "\n" not in str(error.value)
    assert error.value.may_pass == ("no connection" in MISTAKES[wrong])  # a network may come back by itself


def test_missing_rights_and_credentials_are_named(s3, uri, monkeypatch):
    open_store(uri).write("a", b"")
    with s3.only_reading("reader") as reader:
        for name, value in reader.items():
            monkeypatch.setenv(name, value)
        user = f"{uri}?region=us-east-1"  # another URI, else the client would be the one of before
        assert open_store(user).read("a") == b""
        with pytest.raises(StoreError, match=r"cannot be written: access is denied; give these credentials s3:GetObj"):
            check(user)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(StoreError, match=r"the credentials are not valid; renew AWS_ACCESS_KEY_ID"):
            open_store(f"{uri}?region=us-east-2").list()
        for name in reader:
            monkeypatch.delenv(name)
        with pytest.raises(StoreError, match=r"access is denied; there are no credentials: set AWS_ACCESS_KEY_ID"):
            open_store(f"{uri}?region=eu-west-1").read("a")


def test_a_full_disk_is_named_before_anything_is_fetched(uri, tmp_path, monkeypatch):
    open_store(uri).push(fill(tmp_path / "here", {"a": "12345"}), "model")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4))
    with pytest.raises(StoreError, match=r"are needed in .*back.tmp, whose disk has 0.00 GB left"):
        open_store(uri).pull("model", tmp_path / "back")


def test_a_run_that_cannot_be_stored_fails_before_it_starts(bucket, tmp_path):
    told = run_command(["train", "tiny", "--runs", "s3://no-such-bucket/runs"], tmp_path)
    assert told.returncode == 2 and told.stdout == ""
    assert told.stderr.startswith("error: s3://no-such-bucket/runs/tiny") and "no such bucket" in told.stderr
