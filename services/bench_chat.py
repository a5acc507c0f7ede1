"""`chatforge bench serve`: what a server adds over transformers.generate, and what a caller waits for.

Everything in one run on one machine with the same number of torch threads, in bf16, greedy: first transformers alone,
one answer after another, then (transformers gone) the server with one and with 16 clients over gRPC. Latencies have
vLLM's definitions: TTFT from sending a request to its first output, inter-token latency between successive outputs.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.bench_clients import NAME, Measured, ask_all, over_grpc, served, table
from services.client import AsyncClient
from services.config import ChatModelConfig
from services.folders import find_model

CLIENTS = 16
NEW_TOKENS = 64
SHORTEST, LONGEST = 20, 200  # tokens of a prompt, template included
BASELINE_PROMPTS = 6  # enough for a steady rate: transformers takes seconds for each
_STORY = (
    "Tell me a long story about the sea, the old lighthouse and the people who lived beside it when the winter came "
    "early, and the boats could not leave the harbour for weeks. "
)


@dataclass
class Answered(Measured):
    """One way of answering the prompts; what it makes are tokens."""

    first_token: list[float] = field(default_factory=list)  # seconds, one a request
    between: list[float] = field(default_factory=list)  # seconds, one an output after the first


def bench_serving(model: str, show: Callable[[Any], None]) -> list[Answered]:
    """Measures, shows a table and returns its rows: transformers, one client, 16 clients."""
    folder = str(find_model(model))
    threads = len(os.sched_getaffinity(0))
    prompts, baseline = _transformers(folder, threads)
    chat = {NAME: ChatModelConfig(model=folder, dtype="bf16", max_num_seqs=CLIENTS)}
    rows = [baseline, *served(threads, lambda address: _clients(address, prompts), chat=chat)]
    title = f"{folder}, bf16, {threads} threads, prompts of {SHORTEST} to {LONGEST} tokens, {NEW_TOKENS} new tokens"
    show(table(title, "tokens", rows, ("TTFT p50", "p99", "inter-token p50", "p99"), _latencies))
    return rows


def _transformers(folder: str, threads: int) -> tuple[list[str], Answered]:
    """The prompts, and transformers.generate on some of them, from the shortest to the longest."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    prompts = ragged_prompts(tokenizer)
    measured = Answered("transformers.generate, one at a time")
    chosen = prompts[:: len(prompts) // BASELINE_PROMPTS][:BASELINE_PROMPTS]
    for number, prompt in enumerate([chosen[0], *chosen]):  # the first is the warm-up
        ids = torch.tensor([_ids(tokenizer, prompt)])
        started = time.perf_counter()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        if number:
            measured.seconds += time.perf_counter() - started
            measured.made += out.shape[1] - ids.shape[1]
    del model
    gc.collect()
    return prompts, measured


def ragged_prompts(tokenizer: Any) -> list[str]:
    """CLIENTS user messages whose prompts, template included, have about SHORTEST to LONGEST tokens."""
    empty = len(_ids(tokenizer, ""))
    story = tokenizer.encode(_STORY * 12, add_special_tokens=False)
    lengths = [SHORTEST + (LONGEST - SHORTEST) * i // (CLIENTS - 1) for i in range(CLIENTS)]
    return [tokenizer.decode(story[: max(4, length - empty)]) for length in lengths]


def _ids(tokenizer: Any, text: str) -> list[int]:
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


async def _clients(address: str, prompts: Sequence[str]) -> list[Answered]:
    async def ask(prompts: Sequence[str], clients: int) -> Answered:
        row = Answered(over_grpc(clients))
        return await ask_all(row, address, prompts, clients, lambda client, prompt: _ask(client, prompt, row))

    await ask(prompts[:2], 1)  # warm-up
    await ask(prompts, CLIENTS)
    one = await ask(prompts[:: len(prompts) // BASELINE_PROMPTS][:BASELINE_PROMPTS], 1)
    return [one, await ask(prompts, CLIENTS)]


async def _ask(client: AsyncClient, prompt: str, row: Answered) -> int:
    last, first = time.perf_counter(), True
    stream = client.stream_chat(prompt, model=NAME, max_new_tokens=NEW_TOKENS, temperature=0)
    async for _ in stream:
        now = time.perf_counter()
        (row.first_token if first else row.between).append(now - last)
        last, first = now, False
    return stream.reply.completion_tokens


def _latencies(row: Answered) -> list[str]:
    return [_ms(values, q) for values in (row.first_token, row.between) for q in (50, 99)]


def _ms(seconds: Sequence[float], percentile: int) -> str:
    if len(seconds) < 2:
        return ""
    return f"{1000 * statistics.quantiles(seconds, n=100, method='inclusive')[percentile - 1]:.0f} ms"
