"""`chatforge bench draw`: images per second of the service, beside diffusers' own pipeline called directly.

Everything in one run on one machine with the same number of torch threads, in the folder's own size, steps, guidance
and sampler: first diffusers alone, one image after another, then (diffusers gone) the server with 1 and 8 callers who
each ask for one image at a time, over gRPC, as PNG.
"""

import asyncio
import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from services.client import AsyncClient
from services.config import ImageModelConfig, ServerConfig
from services.folders import find_model

IMAGES = 32
ONE_BY_ONE = 8  # of them: enough for a steady rate of the slow ones
CALLERS = (1, 8)
NAME = "model"
_PROMPTS = ("a red apple", "a house", "a cat", "a blue car")


@dataclass(frozen=True)
class Measured:
    """One way to draw the images."""

    name: str
    images: int
    seconds: float

    @property
    def rate(self) -> float:
        return self.images / self.seconds


def bench_drawing(model: str, show: Callable[[Any], None]) -> list[Measured]:
    """Measures, shows a table and returns its rows: diffusers, 1 caller, 8 callers."""
    folder = str(find_model(model, service="image"))
    threads = len(os.sched_getaffinity(0))
    prompts = [_PROMPTS[i % len(_PROMPTS)] for i in range(IMAGES)]
    settings, baseline = _diffusers(folder, threads, prompts[:ONE_BY_ONE])
    gc.collect()
    rows = [baseline, *_served(folder, threads, prompts)]
    show(_table(f"{folder}, {settings}, {threads} threads", rows))
    return rows


def _diffusers(folder: str, threads: int, prompts: Sequence[str]) -> tuple[str, Measured]:
    """What is drawn, in words, and the pipeline's own way of drawing it, one image after another."""
    import torch
    from diffusers import DiffusionPipeline

    from serving.image.components import load_components

    torch.set_num_threads(threads)
    components = load_components(folder)
    params = components.defaults
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    own: dict[str, Any] = {}
    if not components.is_unet:  # PixArt's pipeline would change size and prompt
        own = {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": components.prompt_tokens}

    def draw(prompt: str, seed: int) -> None:
        pipeline(
            prompt, width=params.width, height=params.height, num_inference_steps=params.num_inference_steps,
            guidance_scale=params.guidance_scale, generator=torch.Generator().manual_seed(seed), **own,
        )  # fmt: skip

    del components
    draw(prompts[0], 0)  # warm-up
    started = time.perf_counter()
    for seed, prompt in enumerate(prompts):
        draw(prompt, seed)
    name = f"diffusers' {type(pipeline).__name__}, one by one"
    measured = Measured(name, len(prompts), time.perf_counter() - started)
    size = f"{params.width} × {params.height}"
    return f"{size}, {params.num_inference_steps} steps, guidance {params.guidance_scale:g}", measured


def _served(folder: str, threads: int, prompts: Sequence[str]) -> list[Measured]:
    from services.app import free_port, running

    image = {NAME: ImageModelConfig(model=folder)}
    with running(ServerConfig(image=image, port=free_port(), threads=threads, gpus_per_replica=0)) as server:
        return asyncio.run(_callers(server.address, prompts))


async def _callers(address: str, prompts: Sequence[str]) -> list[Measured]:
    await _ask_all(address, prompts[:8], 8)  # warm-up
    alone = await _ask_all(address, prompts[:ONE_BY_ONE], CALLERS[0])
    return [alone, *[await _ask_all(address, prompts, callers) for callers in CALLERS[1:]]]


async def _ask_all(address: str, prompts: Sequence[str], callers: int) -> Measured:
    queue = list(enumerate(prompts))
    started = time.perf_counter()
    await asyncio.gather(*(_ask_until_empty(address, queue) for _ in range(callers)))
    name = f"chatforge over gRPC, {callers} caller{'s' * (callers > 1)}"
    return Measured(name, len(prompts), time.perf_counter() - started)


async def _ask_until_empty(address: str, queue: list[tuple[int, str]]) -> None:
    async with AsyncClient(address) as client:
        while queue:
            seed, prompt = queue.pop()
            await client.generate_image(prompt, seed=seed)


def _table(title: str, rows: Sequence[Measured]) -> Any:
    from rich.table import Table

    table = Table("", "images/s", "×", title=title, box=None)
    for row in rows:
        table.add_row(row.name, f"{row.rate:.2f}", f"{row.rate / rows[0].rate:.2f}")
    return table
