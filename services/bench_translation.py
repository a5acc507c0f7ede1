"""`chatforge bench translate`: sentences per second of the service, beside transformers called directly.

Everything in one run on one machine with the same number of torch threads and the folder's own decoding: first
transformers alone, one sentence after another and then all in one batch, then (transformers gone) the server with 1, 16
and 64 clients who each send one sentence at a time, over gRPC; where CTranslate2 is installed, the same once more with
its int8 behind the same service.
"""

import gc
import os
import random
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from services.bench_clients import NAME, Measured, ask_all, over_grpc, served, table
from services.client import AsyncClient
from services.config import TranslationModelConfig
from services.folders import find_model

SENTENCES = 256
ONE_BY_ONE = 48  # of them: enough for a steady rate of the slow one
CLIENTS = (1, 16, 64)


def bench_translation(model: str, pairs: str, show: Callable[[Any], None]) -> list[Measured]:
    """Measures, shows a table and returns its rows. `pairs` is a source of sentence pairs, as recipes name it."""
    folder = str(find_model(model, service="translation"))
    threads = len(os.sched_getaffinity(0))
    texts = _sentences(folder, pairs)
    rows = _transformers(folder, threads, texts)
    gc.collect()
    rows += _served(folder, threads, texts, "torch")
    if find_spec("ctranslate2"):
        rows += _served(folder, threads, texts, "ct2")
    show(table(f"{folder}, {threads} threads", "sentences", rows))
    return rows


def _sentences(folder: str, pairs: str) -> list[str]:
    from serving.model_folder import describe
    from training.data.pairs import read_pairs

    card = describe(folder).manifest
    languages = card.get("source_language", "de"), card.get("target_language", "en")
    texts = sorted({pair.source for pair in read_pairs([pairs], *languages)})
    random.Random(0).shuffle(texts)
    return texts[:SENTENCES]


def _transformers(folder: str, threads: int, texts: Sequence[str]) -> list[Measured]:
    """`generate` on one sentence at a time, and on all in one call."""
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()

    def translate(batch: Sequence[str]) -> None:
        inputs = tokenizer(list(batch), return_tensors="pt", padding=True)
        model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])

    translate(texts[:2])  # warm-up
    alone = [[text] for text in texts[:ONE_BY_ONE]]
    return [
        _timed("transformers.generate, one by one", alone, translate),
        _timed(f"transformers.generate, a batch of {len(texts)}", [texts], translate),
    ]


def _timed(name: str, batches: Sequence[Sequence[str]], translate: Callable[[Sequence[str]], None]) -> Measured:
    started = time.perf_counter()
    for batch in batches:
        translate(batch)
    return Measured(name, sum(map(len, batches)), time.perf_counter() - started)


def _served(folder: str, threads: int, texts: Sequence[str], backend: Any) -> list[Measured]:
    translation = {NAME: TranslationModelConfig(model=folder, backend=backend)}
    return served(threads, lambda address: _clients(address, texts, f" ({backend})"), translation=translation)


async def _clients(address: str, texts: Sequence[str], backend: str) -> list[Measured]:
    await ask_all(Measured("warm-up"), address, texts[:64], 16, _ask)
    rows = []
    for clients in CLIENTS:
        asked = texts if clients > 1 else texts[:ONE_BY_ONE]
        rows.append(await ask_all(Measured(over_grpc(clients, backend)), address, asked, clients, _ask))
    return rows


async def _ask(client: AsyncClient, text: str) -> int:
    await client.translate(text)
    return 1
