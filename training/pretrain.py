"""Pretraining: a GPT-2 or Llama-style decoder learns the next token of packed text (Radford et al. 2019; Touvron 2023).

Read downwards: data, model, schedule, loop, validation, export. Leaves out: mixture of experts, sequence and tensor
parallelism, streaming data that does not fit on a disk, weights that do not fit into one worker's host memory before
ZeRO-3 shards them.
"""

import math
import time
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from training import zero
from training.config import PretrainConfig, padded_vocab
from training.data.text import PackedTokens, order, tokenize_to_shards
from training.run import Run
from training.schedules import schedule

VAL_WINDOWS = 64  # of the held-out split, for the validations along the way; the last one reads all of it


def run(config: PretrainConfig, run: Run) -> None:
    """Text to a causal LM. Raises StageError for text too short to train on, and for a loss that is not a number."""
    zero.init_distributed(run.device)
    zero.seed_everything(run.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(run.of("tokenizer").model)
    train, val = _data(config, run, tokenizer)

    model = build_model(config, tokenizer)
    optimizer = torch.optim.AdamW(
        zero.parameter_groups(model, config.weight_decay), lr=config.learning_rate, betas=(0.9, config.beta2), eps=1e-8
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        schedule(config.schedule, config.steps, config.warmup_ratio, config.min_lr_ratio, config.decay_ratio),
    )
    engine = zero.initialize(model, config, run, optimizer, scheduler)
    start = zero.resume(engine, run)

    for step in range(start, config.steps):
        began = time.perf_counter()
        loss = _train_step(engine, config, run, train, step)
        zero.require_finite(run, step, loss, config)
        taken = step + 1
        metrics = {
            "loss": loss,
            **zero.step_metrics(engine, scheduler),
            "tokens_per_second": config.batch_tokens / (time.perf_counter() - began),
        }
        if taken % config.eval_every == 0 or taken == config.steps:
            windows = len(val) if taken == config.steps else VAL_WINDOWS
            metrics["val_bits_per_byte"] = bits_per_byte(engine, val, config.micro_batch_size, run, windows)
        run.log(taken, config.steps, **metrics)
        if zero.checkpoint_is_due(config, run, taken, config.steps):
            zero.save(engine, run, taken)
    zero.export(engine, run, tokenizer, kind="causal-lm")


# ---- data


def _data(config: PretrainConfig, run: Run, tokenizer: PreTrainedTokenizerFast) -> tuple[PackedTokens, PackedTokens]:
    """The memory-mapped training and held-out tokens; rank 0 writes them where they are not there yet."""
    zero.on_first(run, lambda: tokenize_to_shards(config.text, tokenizer, run))
    shards = run.folder / "shards"
    return PackedTokens(shards, "train", config.seq_len), PackedTokens(shards, "val", config.seq_len)


# ---- model


def build_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A fresh model, its embeddings padded to a multiple of 64 rows; initialised from torch's current seed."""
    shape = model_config(config, padded_vocab(len(tokenizer)))
    shape.bos_token_id, shape.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    shape.pad_token_id = tokenizer.pad_token_id
    model_class = {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM}[config.architecture]
    model = model_class(shape)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.bos_token_id],  # the next document's start ends this one
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def model_config(config: PretrainConfig, vocab_size: int) -> GPT2Config | LlamaConfig:
    """The transformers config of a recipe's architecture."""
    if config.architecture == "gpt2":
        return GPT2Config(
            vocab_size=vocab_size,
            n_positions=config.seq_len,
            n_embd=config.hidden_size,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            resid_pdrop=config.dropout,
            embd_pdrop=config.dropout,
            attn_pdrop=config.dropout,
            use_cache=False,
        )
    return LlamaConfig(
        vocab_size=vocab_size,
        max_position_embeddings=config.seq_len,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads or config.num_heads,
        attention_dropout=config.dropout,
        tie_word_embeddings=True,
        use_cache=False,
    )


# ---- loop


def _train_step(engine: Any, config: PretrainConfig, run: Run, data: PackedTokens, step: int) -> float:
    """One optimiser step on batch_size windows over all workers; returns their mean loss (nats per token)."""
    mine = worker_share(order(step, config.batch_size, len(data), run.seed).tolist(), run)
    losses = []
    for first in range(0, len(mine), config.micro_batch_size):
        batch = data.batch(mine[first : first + config.micro_batch_size])
        loss = engine(**_to(batch, engine.device), use_cache=False).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return zero.mean_over_workers(torch.stack(losses).mean().item())


def worker_share(indices: list[int], run: Run) -> list[int]:
    """This worker's part of one global batch: the same batch however many workers share it."""
    share = len(indices) // run.workers
    return indices[run.rank * share : (run.rank + 1) * share]


# ---- validation


@torch.no_grad()
def bits_per_byte(engine: Any, data: PackedTokens, batch_size: int, run: Run, windows: int) -> float:
    """Held-out loss per byte of text, comparable between tokenizers: nats per token / ln 2 × tokens per byte."""
    engine.eval()
    chosen = range(run.rank, min(windows, len(data)), run.workers)
    nats = tokens = 0.0
    # The same number of passes on every worker, for those that gather parameters together.
    passes = math.ceil(min(windows, len(data)) / run.workers / batch_size)
    for i in range(passes):
        indices = list(chosen[i * batch_size : (i + 1) * batch_size])
        batch = _to(data.batch(indices or [0]), engine.device)
        count = batch["labels"][:, 1:].ne(-100).sum().item() if indices else 0
        nats += engine(**batch, use_cache=False).loss.item() * count
        tokens += count
    engine.train()
    nats, tokens = zero.sum_over_workers([nats, tokens])
    return nats / tokens / math.log(2) * data.side.tokens / data.side.bytes


def _to(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
