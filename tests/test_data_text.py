"""Documents to shards to packed windows."""

import itertools
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.data.records import DataError
from training.data.split import held_out, unseen
from training.data.text import PackedTokens, order, positions, read_documents, read_index, tokenize_to_shards
from training.run import Run

SEQ_LEN = 64


@pytest.fixture(scope="module")
def tokenizer(tiny_world):
    return AutoTokenizer.from_pretrained(tiny_world.tokenizer)


@pytest.fixture
def stage(tmp_path):
    return Run(tmp_path, "pretrain", seed=1, val_fraction=0.1)


def test_shards_hold_every_document_behind_a_bos(tiny_world, tokenizer, stage):
    folder = tokenize_to_shards([str(tiny_world.corpus)], tokenizer, stage)
    index = read_index(folder)
    documents = list(read_documents([str(tiny_world.corpus)]))
    for side in ("train", "val"):
        ids = np.fromfile(folder / f"{side}.bin", index["dtype"])
        texts = [tokenizer.decode(one[1:]) for one in np.split(ids, np.flatnonzero(ids == 0)) if len(one)]
        chosen = [document for document in documents if held_out(document.key, 1, 0.1) == (side == "val")]
        expected = [document.text for document in (unseen(chosen) if side == "val" else chosen)]
        assert texts == expected
        assert index[side] == {
            "tokens": len(ids), "bytes": sum(len(text.encode()) for text in texts), "documents": len(texts)
        }  # fmt: skip
    assert index["dtype"] == "uint16"


def test_shards_are_written_once_for_the_same_inputs(tiny_world, tokenizer, stage, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(tiny_world.corpus.read_text("utf-8")[:20_000], "utf-8")
    folder = tokenize_to_shards([str(corpus)], tokenizer, stage)
    written = (folder / "train.bin").stat().st_mtime_ns
    tokenize_to_shards([str(corpus)], tokenizer, stage)
    assert (folder / "train.bin").stat().st_mtime_ns == written
    with corpus.open("a") as file:
        file.write("\n\none more document\n")
    tokenize_to_shards([str(corpus)], tokenizer, stage)
    assert (folder / "train.bin").stat().st_mtime_ns != written


def test_a_bad_record_leaves_no_shards(tokenizer, stage, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "one"}\n{"txt": "two"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2: text: is missing"):
        tokenize_to_shards([str(path)], tokenizer, stage)
    assert not (stage.folder / "shards").exists()


def test_a_held_out_text_that_training_has_under_another_id_is_dropped(tokenizer, stage, tmp_path):
    val_ids = [f"k{i}" for i in range(200) if held_out(f"k{i}", 1, 0.1)]
    train_id = next(f"k{i}" for i in range(200) if not held_out(f"k{i}", 1, 0.1))
    rows = [
        (val_ids[0], "Same text."),
        (train_id, "same text"),
        (val_ids[1], "Other text."),
        (val_ids[2], "other text"),
    ]
    path = tmp_path / "twins.jsonl"
    path.write_text("".join(json.dumps({"id": key, "text": text}) + "\n" for key, text in rows))
    index = read_index(tokenize_to_shards([str(path)], tokenizer, stage))
    assert (index["train"]["documents"], index["val"]["documents"]) == (1, 1)


def test_special_tokens_written_in_a_text_are_text(tokenizer, stage, tmp_path):
    path = tmp_path / "sly.txt"
    path.write_text("before <|endoftext|><|im_end|> after\n")
    folder = tokenize_to_shards([str(path)], tokenizer, Run(tmp_path, "pretrain", val_fraction=1e-9))
    ids = np.fromfile(folder / "train.bin", np.uint16)
    assert (ids < 4).tolist() == [True] + [False] * (len(ids) - 1)
    assert tokenizer.decode(ids[1:]) == "before <|endoftext|><|im_end|> after"


def test_a_side_shorter_than_a_window_names_the_knob(tiny_world, tokenizer, stage):
    folder = tokenize_to_shards([str(tiny_world.corpus)], tokenizer, stage)
    with pytest.raises(DataError, match=r"val: \d+ tokens do not fill a window of seq_len=1000000"):
        PackedTokens(folder, "val", 1_000_000)


def test_windows_are_the_stream_cut_in_order(tiny_world, tokenizer, stage):
    folder = tokenize_to_shards([str(tiny_world.corpus)], tokenizer, stage)
    packed = PackedTokens(folder, "train", SEQ_LEN)
    batch = packed.batch(range(len(packed)))
    stream = np.fromfile(folder / "train.bin", np.uint16)[: len(packed) * SEQ_LEN]
    assert batch["input_ids"].flatten().tolist() == stream.tolist()
    assert batch["input_ids"].dtype == batch["position_ids"].dtype == torch.int64
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert len(packed) == packed.side.tokens // SEQ_LEN


def test_positions_start_again_at_every_document():
    ids = np.array([[5, 6, 0, 7, 8, 0, 0, 9], [0, 5, 6, 7, 8, 9, 5, 0]])
    assert positions(ids, bos=0).tolist() == [[0, 1, 0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 0]]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_documents_in_a_pack_do_not_see_each_other(tiny_world, family):
    model = AutoModelForCausalLM.from_pretrained(getattr(tiny_world, family), attn_implementation="sdpa").eval()
    documents = [[0, *range(10, 30)], [0], [0, *range(50, 57)], [0, *range(20, 40)]]
    packed = np.array([list(itertools.chain(*documents))])
    with torch.no_grad():
        together = model(
            input_ids=torch.from_numpy(packed), position_ids=torch.from_numpy(positions(packed, 0)), use_cache=False
        ).logits[0]
        alone = torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in documents])
        leaking = model(input_ids=torch.from_numpy(packed), use_cache=False).logits[0]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(leaking, alone, atol=1e-2)  # what the test would miss if it could not fail


def test_order_is_a_permutation_each_epoch_however_the_batch_is_cut():
    windows, seed = 24, 7
    steps = [order(step, 8, windows, seed).tolist() for step in range(6)]
    epochs = [list(itertools.chain(*steps[:3])), list(itertools.chain(*steps[3:]))]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(windows))
    assert epochs[0] != epochs[1] != list(range(windows))
    assert [order(step, 1, windows, seed).item() for step in range(8)] == steps[0]
    assert order(2, 8, windows, seed).tolist() == steps[2]
    assert order(0, 8, windows, seed + 1).tolist() != steps[0]
    assert len(set(order(0, 50, windows, seed))) == windows  # a batch may be larger than an epoch
