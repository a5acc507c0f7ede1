"""Data and model folders that are named by URIs: what is copied, how it is known, and what goes when room is short."""

import os

import pytest
from s3 import files, fill

from training import copies
from training.config import EvaluateConfig, ImageConfig, SFTConfig
from training.copies import content_id, local_copy
from training.data.captions import read_captioned
from training.data.chats import read_chats
from training.data.pairs import read_pairs
from training.data.records import DataError
from training.data.sources import fingerprint
from training.exam import Exam
from training.run import Run
from training.store import StoreError, open_store
from training.zero import mirrored

CHAT = '{"messages": [{"role": "user", "content": "Hi %s"}, {"role": "assistant", "content": "Hello."}]}\n'


@pytest.fixture
def data(s3, bucket):
    """A bucket with objects that no code of ours has written."""
    for name in ("one", "two"):
        s3.put(f"{bucket}/chats/{name}.jsonl", (CHAT % name).encode())
    s3.put(f"{bucket}/news.de", b"Ja\nNein\n")
    s3.put(f"{bucket}/news.en", b"Yes\nNo\n")
    s3.put(f"{bucket}/pictures/metadata.jsonl", b'{"file_name": "a/1.png", "text": "a red apple"}\n')
    s3.put(f"{bucket}/pictures/a/1.png", b"a picture")
    return bucket


def test_every_kind_of_source_is_read(data):
    assert len(read_chats([f"{data}/chats/one.jsonl"])[0]) == 1
    assert len(read_chats([f"{data}/chats/*.jsonl"])[0]) == len(read_chats([f"{data}/**/*o*.jsonl"])[0]) == 2
    pairs = read_pairs([f"{data}/news.{{de,en}}"], "de", "en")
    assert [(pair.source, pair.target) for pair in pairs] == [("Ja", "Yes"), ("Nein", "No")]
    for name in ("pictures", "pictures/metadata.jsonl"):
        (record,) = read_captioned([f"{data}/{name}"])
        assert (record.caption, record.read()) == ("a red apple", b"a picture")


def test_a_wrong_record_is_found_in_its_file(s3, data):
    s3.put(f"{data}/chats/two.jsonl", b'{"messages": []}\n')
    with pytest.raises(DataError, match=rf"/two.jsonl:1: messages: .* \(a copy of {data}/chats/two.jsonl\)"):
        read_chats([f"{data}/chats/two.jsonl"])


def test_a_source_that_is_not_there_is_named(data):
    with pytest.raises(StoreError, match=rf"{data}/chat/\*.jsonl: there is nothing"):
        fingerprint([f"{data}/chat/*.jsonl"])


def test_a_fingerprint_changes_with_the_content_alone(s3, data):
    name = f"{data}/news.de"
    before, copy = fingerprint([name]), local_copy(name)
    s3.put(name, b"Ja\nNein\n")
    assert fingerprint([name]) == before and local_copy(name) == copy
    s3.put(name, b"Ja\nDoch\n")
    assert fingerprint([name]) != before
    assert local_copy(name).read_text() == "Ja\nDoch\n"


def test_a_model_folder_is_copied_whole_and_known_by_its_hashes(bucket, tmp_path):
    there, here, name = open_store(bucket), tmp_path / "here", f"{bucket}/r/sft/model"
    ids = []
    for weights in ("1", "2", "1"):
        there.push(fill(here, {"config.json": "{}", "sub/weights": weights}), "r/sft/model")
        assert files(local_copy(name)) == files(here)
        ids.append(content_id(name))
    assert ids[0] != ids[1]


def test_a_stage_finds_the_model_that_its_config_names_by_a_uri(bucket, tmp_path):
    open_store(bucket).push(fill(tmp_path / "here", {"config.json": "{}"}), "m")
    config = SFTConfig(chats=["a"], model=f"{bucket}/m")
    with mirrored(config, Run(tmp_path / "r", "sft")) as settings:
        assert files(tmp_path / settings.model) == {"config.json": b"{}"}
    with mirrored(ImageConfig(images=["a"], steps=1, vae="pixels"), Run(tmp_path / "r", "image")) as settings:
        assert settings.vae == "pixels"


def test_an_evaluation_finds_it_too(bucket, tmp_path):
    from training.recipe import Recipe

    open_store(bucket).push(fill(tmp_path / "here", {"config.json": "{}"}), "m")
    ppo = {"prompts": ["a"], "total_episodes": 1, "model": f"{bucket}/m", "reward_model": "owner/name"}
    exam = Exam(EvaluateConfig(), Run(tmp_path / "r", "evaluate"), Recipe.model_validate({"name": "r", "ppo": ppo}))
    assert files(tmp_path / exam.folder("sft")) == {"config.json": b"{}"}
    assert exam.ppo_start == exam.folder("sft")
    assert exam.folder("reward") == "owner/name"


def processes_end():
    """Nobody uses a copy any more."""
    while copies._in_use:
        os.close(copies._in_use.popitem()[1])


def test_the_copy_that_was_not_used_for_the_longest_time_goes_first(s3, bucket, tmp_path):
    a, b, c = names = [f"{bucket}/{name}" for name in "abc"]
    for name in names:
        s3.put(name, b"12345")
    at = [local_copy(name, tmp_path, max_bytes=10) for name in (a, b, a)]
    assert at[0] == at[2]
    with pytest.raises(StoreError, match=r"do not fit into the cache of .* in use: raise CHATFORGE_CACHE_GB"):
        local_copy(c, tmp_path, max_bytes=10)
    processes_end()
    assert local_copy(c, tmp_path, max_bytes=10).read_bytes() == b"12345"
    assert at[0].exists() and not at[1].exists()
    assert sum(map(len, files(tmp_path / "copies").values())) == 10


def test_an_emptied_cache_is_filled_again(s3, bucket, tmp_path):
    s3.put(f"{bucket}/a", b"12345")
    copy = local_copy(f"{bucket}/a", tmp_path)
    copy.unlink()
    copy.parent.rmdir()
    assert local_copy(f"{bucket}/a", tmp_path).read_bytes() == b"12345"


def test_a_cache_that_cannot_be_written_is_named(s3, bucket, tmp_path):
    s3.put(f"{bucket}/a", b"")
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot be written here \(Not a directory\): set CHATFORGE_CACHE"):
        local_copy(f"{bucket}/a", tmp_path / "file")


def test_a_bound_that_is_no_number_is_named(s3, bucket, monkeypatch):
    s3.put(f"{bucket}/a", b"")
    monkeypatch.setenv("CHATFORGE_CACHE_GB", "many")
    with pytest.raises(StoreError, match="CHATFORGE_CACHE_GB=many: is no number"):
        local_copy(f"{bucket}/a")
