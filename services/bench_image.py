"""`chatforge bench draw`: images per second of the service, beside diffusers' own pipeline called directly.

Everything in one run on one machine with the same number of torch threads, in the folder's own size, steps, guidance
and sampler: first diffusers alone, one image after another, then (diffusers gone) the server with 1 and 8 clients who
each ask for one image at a time, over gRPC, as PNG.
"""

import gc
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from services.bench_clients import NAME, Measured, ask_all, over_grpc, served, table
from services.client import AsyncClient
from services.config import ImageModelConfig
from services.folders import find_model

IMAGES = 32
ONE_BY_ONE = 8  # of them: enough for a steady rate of the slow ones
CLIENTS = (1, 8)
_PROMPTS = ("a red apple", "a house", "a cat", "a blue car")


def bench_drawing(model: str, show: Callable[[Any], None]) -> list[Measured]:
    """Measures, shows a table and returns its rows: diffusers, 1 client, 8 clients."""
    folder = str(find_model(model, service="image"))
    threads = len(os.sched_getaffinity(0))
    prompts = [_PROMPTS[i % len(_PROMPTS)] for i in range(IMAGES)]
    settings, baseline = _diffusers(folder, threads, prompts[:ONE_BY_ONE])
    gc.collect()
    image = {NAME: ImageModelConfig(model=folder)}
    rows = [baseline, *served(threads, lambda address: _clients(address, prompts), image=image)]
    show(table(f"{folder}, {settings}, {threads} threads", "images", rows))
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


async def _clients(address: str, prompts: Sequence[str]) -> list[Measured]:
    items = list(enumerate(prompts))
    await ask_all(Measured("warm-up"), address, items[:8], 8, _ask)
    rows = []
    for clients in CLIENTS:
        asked = items if clients > 1 else items[:ONE_BY_ONE]
        rows.append(await ask_all(Measured(over_grpc(clients)), address, asked, clients, _ask))
    return rows


async def _ask(client: AsyncClient, item: tuple[int, str]) -> int:
    seed, prompt = item
    await client.generate_image(prompt, seed=seed)
    return 1
