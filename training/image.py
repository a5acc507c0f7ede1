"""Images: a denoiser learns to draw latents that fit a caption (Rombach et al. 2022; Ho et al. 2020; Liu et al. 2023).

Read downwards: data (image_data.py), model, objective, loop. What is exported, and what the sheets are drawn with, is
the average of the weights.

Leaves out: pictures of more than one resolution, several workers that encode the latents (the first does), weights of
which the first worker's memory does not hold a second copy, to draw with.
"""

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from serving.image.api import ImageParams, ImageRequest
from serving.image.components import Components
from serving.image.sampling import draw, micro_conditions
from training import diffusion_math as maths
from training import zero
from training.config import ImageConfig, nearest_multiple
from training.data.bucket_sampler import BucketSampler, shard
from training.data.split import normalised
from training.ema import Ema
from training.image_data import SIDES, Data, captions_are_cached, prepare_data
from training.image_parts import adapted, check_config, components, merge_adapters, save_pipeline
from training.picture_stage import captioned_sides, prepare_pictures, resume, save
from training.run import Run, StageError, folder_atomic, save_model
from training.schedules import schedule
from training.seeds import derived_seed
from training.sheet import write_sheet
from training.subwords import train_subwords

VOCAB_SIZE = 8000  # of captions, where the text encoder is trained along: at most
SHOWN = 8  # captions of each side that the sheets are drawn from, where the config names none
TOGETHER = 8  # pictures that are drawn at once
VALIDATION = 1 << 40  # the "step" whose random numbers the held-out loss is taken with


def run(config: ImageConfig, run: Run) -> None:
    """Captioned pictures to a pipeline folder. Raises StageError for wrong data, and for a loss that is no number."""
    zero.init_distributed(run.device)
    zero.seed_everything(run.seed)
    zero.on_first(run, lambda: _prepare(config, run))
    zero.seed_everything(run.seed)  # anew: the first worker has drawn weights to prepare with
    parts = components(config, run)
    train, val = (Data(run, side) for side in SIDES)
    sampler = BucketSampler(train.pictures.sizes, config.batch_size, run.seed)
    objective = objective_of(parts.scheduler, config)

    model = Denoiser(parts, config, captions_are_cached(config))
    eval_model = copy.deepcopy(model).to(run.device) if run.rank == 0 else None
    optimizer = torch.optim.AdamW(zero.parameter_groups(model, config.weight_decay), config.learning_rate, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, schedule(config.schedule, config.steps, config.warmup_ratio)
    )
    engine = zero.initialize(model, config, run, optimizer, scheduler)
    ema = Ema(engine.module, config.ema_decay)
    start = resume(engine, ema, run)

    for step in range(start, config.steps):
        began = time.perf_counter()
        loss = _train_step(engine, config, run, train, objective, sampler.at(step), step)
        zero.require_finite(run, step, loss, config)
        ema.update(step)
        taken = step + 1
        metrics = {
            "loss": loss,
            **zero.step_metrics(engine, scheduler),
            "images_per_second": config.batch_size / (time.perf_counter() - began),
        }
        if taken % config.sample_every == 0 or taken == config.steps:
            with ema.swapped_in():
                metrics["val_loss"] = _held_out_loss(engine, val, objective, run, config.micro_batch_size)
                weights = zero.whole_parameters(engine.module, run)
            if eval_model is not None:
                eval_model.take(weights)
                _write_sheet(eval_model.parts, config, train, val, run, taken)
        run.log(taken, config.steps, **metrics)
        if zero.checkpoint_is_due(config, run, taken, config.steps):
            save(engine, ema, run, taken)
    if eval_model is not None:  # it has the last averages, of which it has drawn a sheet
        export(eval_model.parts, config, run)
    zero.barrier()


# ---- data


def _prepare(config: ImageConfig, run: Run) -> None:
    """Pictures, the tokenizer where there is none yet, and both encoded."""
    check_config(config)
    folder = run.folder / "tokenizer"
    if not (config.model or config.text_encoder or folder.exists()):
        captions = [record.caption for record in captioned_sides(config, run)[0]]
        with folder_atomic(folder) as temporary:
            train_subwords(captions, VOCAB_SIZE, config.max_caption_tokens).save_pretrained(temporary)
    parts = components(config, run)
    prepare_pictures(config, run, parts.multiple)
    for part in (parts.vae, parts.text_encoder, parts.denoiser):
        part.to(run.device)
    prepare_data(config, run, parts)


# ---- model


class Denoiser(torch.nn.Module):
    """What is trained, as one module for DeepSpeed: the denoiser, and the text encoder where it learns along."""

    def __init__(self, parts: Components, config: ImageConfig, captions_are_cached: bool) -> None:
        super().__init__()
        self.denoiser = adapted(parts.denoiser, config).train()
        self.text_encoder = None if captions_are_cached else parts.text_encoder.train()
        self._parts = [parts]  # in a list: torch would take its modules for ours, frozen ones among them

    def forward(self, noisy: Tensor, timesteps: Tensor, captions: dict[str, Tensor]) -> Tensor:
        """The prediction [B, C, h, w] for noisy latents of that shape at timesteps [B], 0 to 1000."""
        mask = captions["mask"]
        states = captions.get("states")
        parts = self._parts[0]
        if states is None:
            assert self.text_encoder is not None
            states = self.text_encoder(captions["input_ids"], attention_mask=None if parts.is_unet else mask)[0]
        if parts.is_unet:
            return self.denoiser(noisy, timesteps, encoder_hidden_states=states).sample
        output = self.denoiser(
            noisy,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            timestep=timesteps,
            added_cond_kwargs=micro_conditions(parts, noisy),
        ).sample
        return output.chunk(2, dim=1)[0] if output.shape[1] == 2 * noisy.shape[1] else output  # a learned variance

    def take(self, weights: dict[str, Tensor]) -> None:
        """Other weights by name."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(weights[name])

    @property
    def parts(self) -> Components:
        """With the weights of this module, in eval mode."""
        self.eval()
        parts = copy.copy(self._parts[0])
        parts.denoiser = self.denoiser
        parts.text_encoder = (self.text_encoder or parts.text_encoder).to(self.denoiser.device).eval()
        parts.vae = parts.vae.to(self.denoiser.device)
        return parts


# ---- objective


@dataclass(frozen=True)
class Objective:
    """What is predicted of noisy data; the terms are diffusion_math's."""

    prediction: str  # flow, epsilon or v_prediction
    alpha_bars: Tensor  # [T]; empty for a flow
    gamma: float | None
    logit_mean: float  # of a flow's times

    def times(self, generators: Sequence[torch.Generator]) -> Tensor:
        """[B]: in (0, 1) of a flow, whole numbers below T of a chain."""
        if self.prediction == "flow":
            return torch.cat([maths.logit_normal_times(1, self.logit_mean, generator) for generator in generators])
        return torch.cat([torch.randint(len(self.alpha_bars), (1,), generator=g) for g in generators])

    def noisy(self, x0: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(noised data, target, timesteps from 0 to 1000, loss weights)."""
        if self.prediction == "flow":
            noised, target = maths.interpolate(x0, noise, times), maths.flow(x0, noise)
            return noised, target, times * maths.NUM_TRAIN_TIMESTEPS, torch.ones_like(times)
        bars = self.alpha_bars.to(x0.device)[times]
        target = noise if self.prediction == "epsilon" else maths.velocity(x0, noise, bars)
        weights = maths.min_snr_weight(bars, self.gamma, self.prediction) if self.gamma else torch.ones_like(bars)
        return maths.add_noise(x0, noise, bars), target, times, weights


def objective_of(scheduler: Any, config: ImageConfig) -> Objective:
    """What a model with that scheduler predicts. Raises StageError for what cannot be trained here."""
    named = getattr(scheduler.config, "prediction_type", "flow_prediction").removesuffix("_prediction")
    if named == "flow":
        return Objective("flow", torch.empty(0), None, config.logit_mean)
    prediction = {"v": "v_prediction", "epsilon": "epsilon"}.get(named)
    if prediction is None:
        raise StageError(f"image.model: its scheduler predicts {named!r}; epsilon, v_prediction and flow are trained")
    return Objective(prediction, scheduler.alphas_cumprod.float(), config.min_snr_gamma, config.logit_mean)


# ---- loop


def _train_step(
    engine: Any, config: ImageConfig, run: Run, data: Data, objective: Objective, batch: np.ndarray, step: int
) -> float:
    """One optimiser step on one batch over all workers; returns its loss."""
    passes = config.gradient_accumulation_steps(run.workers)
    total = 0.0
    for positions in shard(batch, run.rank, run.workers, passes):
        seeds = [derived_seed(run.seed, step, position) for position in positions.tolist()]
        with _attention(run.device):
            loss = _loss(engine, data, objective, batch[positions].tolist(), seeds, config.caption_dropout)
            engine.backward(loss)
        engine.step()
        total += loss.item() / passes
    return zero.mean_over_workers(total)


def _attention(device: str) -> AbstractContextManager[None]:
    """On CPU the fused kernel's backward takes longer than that of plain products, at the few tokens that there are.

    Round the backward pass too: blocks that are computed again in it need the same kernel.
    """
    return sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext()


def _loss(
    engine: Any, data: Data, objective: Objective, indices: Sequence[int], seeds: Sequence[int], dropout: float
) -> Tensor:
    """The mean over pictures of the weighted mean square; every picture's random numbers come from its own seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    latents = data.latents(indices)
    dropped = [torch.rand(1, generator=generator).item() < dropout for generator in generators]
    times = objective.times(generators).to(engine.device)
    noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators]).to(engine.device)
    captions = {name: tensor.to(engine.device) for name, tensor in data.captions(indices, dropped).items()}
    noised, target, timesteps, weights = objective.noisy(latents.to(engine.device), noise, times)
    predicted = engine(noised, timesteps, captions).float()
    return (weights * (predicted - target).square().flatten(1).mean(1)).mean()


@torch.no_grad()
def _held_out_loss(engine: Any, data: Data, objective: Objective, run: Run, count: int) -> float:
    """The loss of the held-out pictures with their captions, at the same times and noises whenever it is taken."""
    engine.eval()
    total = 0.0
    chunks = list(_of_one_shape(data.pictures.sizes, count))
    # Every worker takes part in as many passes, as ZeRO-3 needs.
    for number in range(run.rank, -(-len(chunks) // run.workers) * run.workers, run.workers):
        indices = chunks[min(number, len(chunks) - 1)]
        seeds = [derived_seed(run.seed, VALIDATION, index) for index in indices]
        with _attention(run.device):
            loss = _loss(engine, data, objective, indices, seeds, 0.0).item()
        total += loss * len(indices) if number < len(chunks) else 0.0
    engine.train()
    return zero.sum_over_workers([total])[0] / len(data.pictures)


def _of_one_shape(sizes: Sequence[tuple[int, int]], count: int) -> Iterator[list[int]]:
    """All indices, `count` at most together, those of equal size."""
    order = sorted(range(len(sizes)), key=lambda index: sizes[index])
    chunk: list[int] = []
    for index in order:
        if chunk and (len(chunk) == count or sizes[chunk[0]] != sizes[index]):
            yield chunk
            chunk = []
        chunk.append(index)
    if chunk:
        yield chunk


# ---- what is seen of it, and what is left of it


def params_of(config: ImageConfig, parts: Components) -> ImageParams:
    """How the stage's model is drawn unless a request says otherwise."""
    side = nearest_multiple(config.resolution, parts.multiple)
    return ImageParams(side, side, config.num_inference_steps, config.guidance_scale)


def drawn(parts: Components, prompts: Sequence[str], params: ImageParams) -> list[np.ndarray]:
    """A picture of each prompt, the n-th with seed n; [height, width, 3] uint8."""
    pictures: list[np.ndarray] = []
    for first in range(0, len(prompts), TOGETHER):
        some = prompts[first : first + TOGETHER]
        requests = [ImageRequest(prompt, params, (first + n,)) for n, prompt in enumerate(some)]
        pictures += [images[0] for images in draw(parts, requests)]
    return pictures


def _write_sheet(parts: Components, config: ImageConfig, train: Data, val: Data, run: Run, step: int) -> None:
    """The config's prompts, or captions of both sides, drawn: samples/step-N.png."""
    prompts = config.prompts
    captions = list(prompts)
    if not prompts:
        known = set(map(normalised, train.pictures.captions))
        unknown = [caption for caption in val.pictures.captions if normalised(caption) not in known]
        sides = [list(dict.fromkeys(captions))[:SHOWN] for captions in (train.pictures.captions, unknown)]
        prompts = [caption for side in sides for caption in side]
        captions = [*sides[0], *(f"held out: {caption}" for caption in sides[1])]
    pictures = drawn(parts, prompts, params_of(config, parts))
    write_sheet(run.folder / "samples" / f"step-{step:08d}.png", [pictures], captions)


def export(parts: Components, config: ImageConfig, run: Run) -> None:
    """The stage's model folder, adapters merged."""
    merge_adapters(parts.denoiser)
    params = params_of(config, parts)
    about = {name: getattr(params, name) for name in ("width", "height", "num_inference_steps", "guidance_scale")}
    save_model(run, lambda folder: save_pipeline(parts, folder), "text-to-image", **about)
