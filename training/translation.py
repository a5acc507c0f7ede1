"""Translation: an encoder-decoder transformer learns from sentence pairs (Vaswani et al. 2017).

Read downwards: data, tokenizer, model, schedule, loop. Batches are counted in tokens and made of pairs of like length;
how many workers and passes share one changes nothing but the order of sums. Training ends where the chrF of held-out
translations gets no better, and the mean of the last validations' weights is exported (translation_validation.py).

Leaves out: back-translation, several language pairs in one model (though one that is there can be fine-tuned), weights
of which the first worker's memory does not hold a second copy, to validate with.
"""

import copy
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    MarianConfig,
    MarianMTModel,
)
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

from serving.model_folder import describe, load_translation
from serving.translation.codec import Codec
from training import zero
from training.config import TranslationConfig, padded_vocab
from training.data.examples import Batches, Example, Examples, write_examples
from training.data.pairs import Pair, counted, read_sides
from training.run import Run, StageError, folder_atomic
from training.schedules import schedule
from training.subwords import train_subwords
from training.trainer import peft_config
from training.translation_validation import HeldOut, Validation

IGNORED = -100  # a label that no loss is taken of


def run(config: TranslationConfig, run: Run) -> None:
    """Pairs to a translation model. Raises StageError for data that cannot teach, and for a loss that is no number."""
    zero.init_distributed(run.device)
    zero.seed_everything(run.seed)
    held_out = zero.on_first(run, lambda: _prepare(config, run))
    tokenizer = _tokenizer(config, run)
    train, val = (Batches(Examples(run.folder / side), config.batch_tokens, run.seed) for side in ("train", "val"))

    model = build_model(config, tokenizer)
    eval_model = copy.deepcopy(model) if held_out else None
    validation = Validation(config, run, tokenizer, eval_model, held_out)
    optimizer = torch.optim.AdamW(
        zero.parameter_groups(model, config.weight_decay), lr=config.learning_rate, betas=(0.9, config.beta2), eps=1e-9
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, schedule(config.schedule, config.steps, config.warmup_ratio)
    )
    engine = zero.initialize(model, config, run, optimizer, scheduler)
    start = zero.resume(engine, run)
    validation.rewind(start)

    for step in range(start, config.steps):
        if validation.is_over:
            break
        began = time.perf_counter()
        batch = train.at(step)
        loss = _train_step(engine, config, run, batch)
        zero.require_finite(run, step, loss, config)
        taken = step + 1
        metrics = {
            "loss": loss,
            **zero.step_metrics(engine, scheduler),
            "tokens_per_second": sum(len(e.source) + len(e.target) for e in batch) / (time.perf_counter() - began),
        }
        if taken % config.eval_every == 0 or taken == config.steps:
            metrics["val_loss"] = _held_out_loss(engine, val, run)
            metrics["val_chrf"] = validation.measure(engine, taken)
        run.log(taken, config.steps, **metrics)
        if zero.checkpoint_is_due(config, run, taken, config.steps):
            zero.save(engine, run, taken)
    validation.export()


# ---- data


def _prepare(config: TranslationConfig, run: Run) -> HeldOut:
    """Reads, cleans and splits the pairs; leaves the tokenizer and both sides' tokens where they are not there yet."""
    if config.model:
        _check_start(config.model, config.max_length)
    sides = read_sides(config.pairs, config.source_language, config.target_language, run.seed, run.val_fraction)
    folder = run.folder / "tokenizer"
    if not config.model and not folder.exists():
        with folder_atomic(folder) as temporary:
            train_subwords(_texts(sides.training), config.vocab_size, config.max_length).save_pretrained(temporary)
    codec = Codec(_tokenizer(config, run), config.source_language, config.target_language)
    for name, pairs in (("train", sides.training), ("val", sides.validation)):
        if not (run.folder / name).exists():
            write_examples(pairs, codec, config.max_length, run.folder / name)
    dropped = sides.dropped | {"longer than max_length": len(sides.training) - len(Examples(run.folder / "train"))}
    sizes = {"learn from": sides.training, "validate on": sides.validation, "test on": sides.test}
    run.note("pairs: " + ", ".join(f"{len(side)} to {what}" for what, side in sizes.items()))
    if left_out := counted(dropped):
        run.note(f"left out: {left_out}")
    return HeldOut(sides.validation, sides.source_script)


def _check_start(model: str, max_length: int) -> None:
    """Raises StageError where no translation model of that length is there; loads no weights."""
    try:
        about = describe(model)
    except ValueError as error:
        raise StageError(f"translation.model={model}: {error}") from None
    if about.kind != "translation":
        raise StageError(f"translation.model={model}: holds a {about.kind} model; a translation model is needed")
    if about.context_length and max_length > about.context_length:
        limit = about.context_length
        raise StageError(f"translation.max_length={max_length}: {model} takes {limit} tokens at most")


def _texts(pairs: Sequence[Pair]) -> list[str]:
    return [text for pair in pairs for text in (pair.source, pair.target)]


def collate(examples: Sequence[Example], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` [B, S] and `labels` [B, T], padded on the right; labels with IGNORED."""

    def padded(rows: list[np.ndarray], value: int) -> torch.Tensor:
        tensors = [torch.from_numpy(row.astype(np.int64)) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value).to(device)

    sources, targets = [e.source for e in examples], [e.target for e in examples]
    mask = padded([np.ones_like(row) for row in sources], 0)
    return {"input_ids": padded(sources, pad), "attention_mask": mask, "labels": padded(targets, IGNORED)}


# ---- tokenizer


def _tokenizer(config: TranslationConfig, run: Run) -> Any:
    """The start's own, or the joint one that `_prepare` has left."""
    return AutoTokenizer.from_pretrained(config.model or run.folder / "tokenizer")


# ---- model


def build_model(config: TranslationConfig, tokenizer: Any) -> Any:
    """A fresh Marian model of the paper's shape, or the start with adapters where LoRA is asked for."""
    if not config.model:
        return fresh_model(config, tokenizer)
    try:
        model, _ = load_translation(config.model, torch.float32)
    except ValueError as error:
        raise StageError(f"translation.model={config.model}: {error}") from None
    model.train()
    for module in model.modules():
        if isinstance(module, MarianSinusoidalPositionalEmbedding):  # fixed in a fresh model, not in a loaded one
            module.requires_grad_(False)
    if lora := peft_config(config.lora, "SEQ_2_SEQ_LM"):
        from peft import get_peft_model

        return get_peft_model(model, lora)
    return model


def fresh_model(config: TranslationConfig, tokenizer: Any) -> MarianMTModel:
    """Post-norm layers, sinusoidal positions, one embedding for both sides and the output, scaled by √hidden_size."""
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    shape = MarianConfig(
        vocab_size=padded_vocab(len(tokenizer)),
        d_model=config.hidden_size,
        encoder_layers=config.num_layers,
        decoder_layers=config.num_layers,
        encoder_attention_heads=config.num_heads,
        decoder_attention_heads=config.num_heads,
        encoder_ffn_dim=config.intermediate_size,
        decoder_ffn_dim=config.intermediate_size,
        max_position_embeddings=max(512, config.max_length),
        activation_function="relu",
        dropout=config.dropout,
        scale_embedding=True,
        pad_token_id=pad,
        eos_token_id=eos,
        decoder_start_token_id=pad,
        forced_eos_token_id=None,
    )
    model = MarianMTModel(shape)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and parameter.requires_grad:
            if "shared" in name:  # with the scale of √hidden_size an embedding's variance is 1
                torch.nn.init.normal_(parameter, std=config.hidden_size**-0.5)
            else:
                torch.nn.init.xavier_uniform_(parameter)
    model.generation_config = GenerationConfig(
        num_beams=config.num_beams,
        length_penalty=config.length_penalty,
        max_length=max(512, config.max_length),
        pad_token_id=pad,
        eos_token_id=eos,
        decoder_start_token_id=pad,
    )
    return model


# ---- loop


def token_loss(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Σ over tokens of the cross-entropy with ε spread over the vocabulary (Szegedy et al. 2016, section 7), in nats.

    logits: [B, T, V]; labels: [B, T], IGNORED where there is no token. Returns a scalar.
    """
    flat = logits.float().flatten(0, 1)
    return F.cross_entropy(
        flat, labels.flatten(), ignore_index=IGNORED, label_smoothing=label_smoothing, reduction="sum"
    )


def _train_step(engine: Any, config: TranslationConfig, run: Run, batch: Sequence[Example]) -> float:
    """One optimiser step on one batch over all workers; returns its loss in nats per target token, smoothed."""
    passes = config.gradient_accumulation_steps(run.workers)
    tokens = sum(len(example.target) for example in batch)
    total = 0.0
    for number in range(passes):
        mine = batch[run.rank + run.workers * number :: run.workers * passes]
        nats = _nats(engine, mine, batch, config.label_smoothing)
        # DeepSpeed takes the mean over passes and workers: times both, it is the mean over the batch's tokens.
        engine.backward(nats * (passes * run.workers / tokens))
        engine.step()
        total += nats.item()
    return zero.sum_over_workers([total])[0] / tokens


def _nats(engine: Any, mine: Sequence[Example], batch: Sequence[Example], label_smoothing: float = 0.0) -> torch.Tensor:
    """Σ of the token losses of this worker's part; one that is empty takes part with a pass that teaches nothing."""
    model = engine.module
    inputs = collate(mine or batch[:1], model.config.pad_token_id, engine.device)
    labels = inputs.pop("labels")
    inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    logits = engine(**inputs, use_cache=False).logits
    return token_loss(logits, labels if mine else torch.full_like(labels, IGNORED), label_smoothing)


@torch.no_grad()
def _held_out_loss(engine: Any, data: Batches, run: Run) -> float:
    """Nats per target token of the validation side, without smoothing."""
    engine.eval()
    nats = 0.0
    for number in range(len(data)):
        batch = data.at(number)
        nats += _nats(engine, batch[run.rank :: run.workers], batch).item()
    engine.train()
    return zero.sum_over_workers([nats])[0] / float(data.examples.target_lengths.sum())
