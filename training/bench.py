"""`chatforge bench train`: tokens per second of one pretraining step, ours beside a bare PyTorch loop.

The same model, batch and optimiser in one process, in turns, so that a machine whose speed drifts drifts for both.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from training import zero
from training.config import PretrainConfig, padded_vocab
from training.pretrain import model_config
from training.run import Run

STEPS = 12  # of each, after WARMUP
WARMUP = 3
VOCAB = 4096
CONFIG = PretrainConfig(text=["none"], tokens=1, batch_size=8, micro_batch_size=8)


def bench_training() -> dict[str, float]:
    """Prints a table and returns each loop's median tokens per second over the bare loop's, both in bf16."""
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    zero.init_distributed(device)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    batch = torch.randint(0, VOCAB, (CONFIG.batch_size, CONFIG.seq_len), device=device)

    def fresh() -> Any:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(model_config(CONFIG, padded_vocab(VOCAB))).to(device)

    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), "pretrain", device=device)
        loops = {"bare PyTorch loop": _bare(fresh(), batch)}
        for stage in (0, 1, 2):
            loops[f"pretrain, ZeRO-{stage}"] = _ours(fresh(), batch, run, stage)
        medians = _in_turns(loops)
    reference = medians["bare PyTorch loop"]
    print(f"bf16, {CONFIG.batch_tokens:,} tokens a step, {torch.get_num_threads()} threads, device {device}")
    for name, seconds in medians.items():
        print(f"  {name:<20} {CONFIG.batch_tokens / seconds:>8,.0f} tokens/s   × {reference / seconds:.2f}")
    return {name: reference / seconds for name, seconds in medians.items()}


def _in_turns(loops: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Median seconds of a step of each loop, one step of each at a time."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(WARMUP + STEPS):
        for name, step in loops.items():
            began = time.perf_counter()
            step()
            if turn >= WARMUP:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _bare(model: Any, batch: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=CONFIG.learning_rate)

    def step() -> None:
        with torch.autocast(batch.device.type, dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CONFIG.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def _ours(model: Any, batch: torch.Tensor, run: Run, stage: int) -> Callable[[], None]:
    """What `pretrain._train_step` does with one micro-batch."""
    config = CONFIG.model_copy(update={"zero_stage": stage})
    optimizer = torch.optim.AdamW(zero.parameter_groups(model, config.weight_decay), lr=config.learning_rate)
    engine = zero.initialize(model, config, run, optimizer)

    def step() -> None:
        loss = engine(input_ids=batch, labels=batch, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        loss.item()

    return step
