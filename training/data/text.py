"""Text to pretrain on: documents -> token shards on disk -> packed windows.

Every document starts with the tokenizer's bos token, which therefore also ends the one before: a model learns to close
a document by predicting it. Windows of `seq_len` tokens are cut from the stream without regard to documents;
`position_ids` start again at every document, and that is what keeps documents apart in attention: transformers makes
the block-diagonal mask from them when it gets no attention_mask and use_cache=False.

Leaves out: shuffling between documents (the order of windows is shuffled, the order within the stream is the data's).
"""

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np

from training.data.records import DataError, Fields
from training.data.sources import fingerprint, read, record_key
from training.data.split import digest, held_out, normalised
from training.device import tokenizing_on_all_cores
from training.run import Run, folder_atomic

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

BATCH_BYTES = 4_000_000  # text that is tokenised at once, over all cores


@dataclass(frozen=True)
class Document:
    """A text that is learnt as one; `key` decides its side of the split."""

    text: str
    key: str

    @property
    def identity(self) -> str:
        return self.text


@dataclass
class Side:
    """What one side of the split holds."""

    tokens: int = 0
    bytes: int = 0  # of UTF-8 text, bos tokens not counted: bits per byte = nats per token / ln 2 · tokens / bytes
    documents: int = 0


def read_documents(sources: Sequence[str]) -> Iterator[Document]:
    """Documents in the data's order; blank ones are passed over.

    txt: blank lines part documents; jsonl, parquet and hub: field `text`. Raises DataError, after the last document,
    pointing to the first record that is wrong.
    """
    return read(sources, _parse)


def tokenize_to_shards(
    sources: Sequence[str],
    tokenizer: "PreTrainedTokenizerFast",
    run: Run,
) -> Path:
    """The folder `shards` of the stage: train.bin, val.bin and index.json, which holds both `Side`s.

    Returns at once where the folder is there for the same sources, tokenizer and split. One process writes, at the
    speed of all cores. Raises DataError as `read_documents` does.
    """
    folder = run.folder / "shards"
    inputs = {
        "sources": fingerprint(sources),
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "split": [run.seed, run.val_fraction],
    }
    if (folder / "index.json").is_file() and read_index(folder)["inputs"] == inputs:
        return folder
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    with folder_atomic(folder) as writing, tokenizing_on_all_cores():
        sides = _write(read_documents(sources), _Encoder(tokenizer, dtype), run, writing)
        index = {"inputs": inputs, "dtype": dtype.name, "bos_token_id": tokenizer.bos_token_id, **sides}
        (writing / "index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return folder


def read_index(folder: Path) -> dict[str, Any]:
    """index.json of a shards folder: inputs, dtype, bos_token_id, and `train` and `val` as `Side` has its fields."""
    return json.loads((folder / "index.json").read_text("utf-8"))


class PackedTokens:
    """The windows of one side, memory-mapped: worker processes share the pages."""

    def __init__(self, folder: Path, side: Literal["train", "val"], seq_len: int) -> None:
        """Raises DataError where the side is shorter than one window."""
        index = read_index(folder)
        self.side = Side(**index[side])
        self.windows = self.side.tokens // seq_len
        if not self.windows:
            more = "more text" if side == "train" else "more text or a larger val_fraction"
            raise DataError(f"{side}: {self.side.tokens} tokens do not fill a window of seq_len={seq_len}: give {more}")
        self._seq_len = seq_len
        self._bos = index["bos_token_id"]
        self._tokens = np.memmap(folder / f"{side}.bin", dtype=index["dtype"], mode="r")

    def __len__(self) -> int:
        return self.windows

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, "torch.Tensor"]:
        """`input_ids`, `labels` (the same: transformers shifts them) and `position_ids`, each int64 [B, T]."""
        import torch

        rows = [self._tokens[i * self._seq_len : (i + 1) * self._seq_len] for i in indices]
        ids = np.stack(rows).astype(np.int64)
        input_ids = torch.from_numpy(ids)
        return {
            "input_ids": input_ids,
            "labels": input_ids.clone(),
            "position_ids": torch.from_numpy(positions(ids, self._bos)),
        }


def positions(ids: np.ndarray, bos: int) -> np.ndarray:
    """Each token's place in its own document: [B, T] -> [B, T]; a window that starts inside one counts from 0."""
    place = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    starts = np.where(ids == bos, place, 0)
    return place - np.maximum.accumulate(starts, axis=1)


def order(step: int, batch_size: int, windows: int, seed: int) -> np.ndarray:
    """The windows of optimiser step `step`: [batch_size] indices below `windows`.

    A pure function: the data's position is the step and nothing else needs to be saved, and however the batch is cut
    into workers and micro-batches, it holds the same windows. Every epoch is a permutation of its own.
    """
    numbers = range(step * batch_size, (step + 1) * batch_size)
    return np.array([_permutation(n // windows, windows, seed)[n % windows] for n in numbers])


@functools.lru_cache(maxsize=4)
def _permutation(epoch: int, windows: int, seed: int) -> np.ndarray:
    return np.random.default_rng((seed % 2**64, epoch)).permutation(windows)


def _parse(fields: Fields) -> list[Document]:
    text = fields.get("text")
    if not isinstance(text, str):
        raise ValueError("text: is missing" if text is None else f"text: must be a text, not {text!r}")
    return [Document(text, record_key(fields, normalised(text)))] if text.strip() else []


class _Encoder:
    """Texts to token ids with a bos in front, over all cores."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", dtype: np.dtype) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True  # "<|im_end|>" written in a text is text
        self._bos = tokenizer.bos_token_id
        self._dtype = dtype

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array([self._bos, *one.ids], self._dtype) for one in encoded]


def _write(documents: Iterator[Document], encode: _Encoder, run: Run, folder: Path) -> dict[str, dict[str, int]]:
    """train.bin as it comes; val.bin at the end, when it is known which held-out texts training has too."""
    train, val = Side(), Side()
    trained: set[bytes] = set()
    waiting: list[tuple[Document, np.ndarray]] = []
    with (folder / "train.bin").open("wb") as train_file, (folder / "val.bin").open("wb") as val_file:
        for batch in _batches(documents):
            for document, ids in zip(batch, encode([document.text for document in batch]), strict=True):
                if held_out(document.key, run.seed, run.val_fraction):
                    waiting.append((document, ids))
                    continue
                _append(train_file, train, document, ids)
                if document.key != normalised(document.text):  # else its twins fall on its own side
                    trained.add(digest(document.text))
        for document, ids in waiting:
            if digest(document.text) not in trained:
                trained.add(digest(document.text))
                _append(val_file, val, document, ids)
    return {"train": asdict(train), "val": asdict(val)}


def _append(file: BinaryIO, side: Side, document: Document, ids: np.ndarray) -> None:
    file.write(ids.tobytes())
    side.tokens += len(ids)
    side.bytes += len(document.text.encode())
    side.documents += 1


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Runs of documents of about BATCH_BYTES."""
    batch: list[Document] = []
    total = 0
    for document in documents:
        batch.append(document)
        total += len(document.text)
        if total >= BATCH_BYTES:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
