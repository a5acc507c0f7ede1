"""Image autoencoder: pictures to latents that a denoiser can learn, and back (Rombach et al. 2022, section 3.1).

Read downwards: data, model, loss, loop. The loss is |x - x̂|, a difference of pretrained features, and KL to N(0, I); in
the end the latents' scale over the training pictures is measured, by which the denoiser divides (section 4.3.2).

With `adversarial_weight`, a discriminator learns from the first step on, and in the second half the decoder learns to
pass it: what is blurred becomes sharp, and no longer true to the pixel.

Leaves out: vector quantisation, learnt weights of the perceptual term, pictures of more than one resolution.
"""

import copy
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from training import zero
from training.adversary import PatchDiscriminator, adversarial_terms
from training.config import ImageVaeConfig
from training.data.bucket_sampler import BucketSampler, shard
from training.data.pictures import Pictures
from training.diffusion_math import kl_to_standard_normal
from training.ema import Ema
from training.features import features_at_hand, perceptual
from training.picture_stage import as_pictures, as_pixels, norm_groups, prepare_pictures, resume, save
from training.run import Run, save_model
from training.schedules import schedule
from training.seeds import derived_seed
from training.sheet import write_sheet

SHOWN = 8  # pictures of a sheet, each above what comes back
MEASURED = 2000  # pictures over which the latents' scale is measured, at most


def run(config: ImageVaeConfig, run: Run) -> None:
    """Pictures to an autoencoder. Raises StageError for data that cannot teach, and for a loss that is no number."""
    zero.init_distributed(run.device)
    zero.seed_everything(run.seed)
    zero.on_first(run, lambda: prepare_pictures(config, run, config.downsampling))
    train, val = (Pictures(run.folder / side) for side in ("train", "val"))
    sampler = BucketSampler(train.sizes, config.batch_size, run.seed)

    model = Autoencoder(build_vae(config), config)
    eval_model = copy.deepcopy(model.vae).to(run.device) if run.rank == 0 else None
    betas = (0.5, 0.9) if config.adversarial_weight else (0.9, 0.999)  # an adversary's past is soon out of date
    groups = zero.parameter_groups(model, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, config.learning_rate, betas, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, schedule(config.schedule, config.steps, config.warmup_ratio)
    )
    engine = zero.initialize(model, config, run, optimizer, scheduler)
    ema = Ema(engine.module, config.ema_decay)
    start = resume(engine, ema, run)

    for step in range(start, config.steps):
        began = time.perf_counter()
        losses = _train_step(engine, config, run, train, sampler.at(step), step)
        zero.require_finite(run, step, losses["loss"], config)
        ema.update(step)
        taken = step + 1
        metrics = losses | {
            **zero.step_metrics(engine, scheduler),
            "images_per_second": config.batch_size / (time.perf_counter() - began),
        }
        if taken % config.sample_every == 0 or taken == config.steps:
            with ema.swapped_in():
                metrics["val_loss"] = _held_out_error(engine, val, config, run)
                weights = zero.whole_parameters(engine.module.vae, run)
            if eval_model is not None:
                eval_model.load_state_dict(weights, strict=False)
                _write_sheet(eval_model, train, val, run, taken)
        run.log(taken, config.steps, **metrics)
        if zero.checkpoint_is_due(config, run, taken, config.steps):
            save(engine, ema, run, taken)
    if eval_model is not None:  # it has the last averages, of which there is a sheet
        _export(eval_model, train, run)
    zero.barrier()


# ---- model


def build_vae(config: ImageVaeConfig) -> Any:
    """diffusers' AutoencoderKL of the config's shape, as Stable Diffusion has it but for its width."""
    levels = len(config.channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.channels),
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=norm_groups(config.channels),
        sample_size=config.resolution,
    )


class Autoencoder(torch.nn.Module):
    """The autoencoder with its loss, as one module for DeepSpeed."""

    def __init__(self, vae: Any, config: ImageVaeConfig) -> None:
        super().__init__()
        self.vae = vae
        self.adversary = PatchDiscriminator() if config.adversarial_weight else None
        self.features = perceptual(features_at_hand()) if config.perceptual_weight else None
        self._kl_weight, self._perceptual_weight = config.kl_weight, config.perceptual_weight
        self._adversarial_weight = config.adversarial_weight

    def forward(self, pixels: Tensor, noise: Tensor, adversarial: bool) -> dict[str, Tensor]:
        """Means over pictures: `loss` and its terms. pixels: [B, 3, H, W] in -1..1; noise: [B, latents...], N(0, I).

        `adversarial`: whether the decoder learns from the adversary, which learns in any case.
        """
        posterior = self.vae.encode(pixels).latent_dist
        reconstructed = self.vae.decode(posterior.mean + posterior.std * noise).sample.float()
        nats = kl_to_standard_normal(posterior.mean.float(), posterior.logvar.float())
        terms = {"reconstruction": (reconstructed - pixels).abs().mean(), "kl": nats.mean()}
        # Nats of a picture over its numbers, so that the weight means what it means in the paper, whose terms are sums.
        loss = terms["reconstruction"] + self._kl_weight * terms["kl"] / pixels[0].numel()
        if self.features is not None:
            terms["perceptual"] = self.features(reconstructed, pixels).mean()
            loss = loss + self._perceptual_weight * terms["perceptual"]
        if self.adversary is not None:
            last = self.vae.decoder.conv_out.weight
            terms |= adversarial_terms(self.adversary, pixels, reconstructed, loss, last)
            weight = self._adversarial_weight if adversarial else 0.0
            loss = loss + weight * terms["adversarial"] + terms["discriminator"]
        return {"loss": loss, **terms}


# ---- loop


def _train_step(
    engine: Any, config: ImageVaeConfig, run: Run, pictures: Pictures, batch: np.ndarray, step: int
) -> dict[str, float]:
    """One optimiser step on one batch over all workers; returns the means of its losses."""
    passes = config.gradient_accumulation_steps(run.workers)
    totals: dict[str, float] = {}
    for positions in shard(batch, run.rank, run.workers, passes):
        pixels = as_pixels(pictures.batch(batch[positions]), engine.device)
        noise = _noise(config, pixels, [derived_seed(run.seed, step, p) for p in positions.tolist()])
        losses = engine(pixels, noise, 2 * step >= config.steps)
        engine.backward(losses["loss"])
        engine.step()
        for name, value in losses.items():
            totals[name] = totals.get(name, 0.0) + value.item() / passes
    shares = [value / run.workers for value in totals.values()]
    return dict(zip(totals, zero.sum_over_workers(shares), strict=True))


def _noise(config: ImageVaeConfig, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
    """N(0, I) of the latents' shape, each picture's from its own seed."""
    side = config.downsampling
    shape = (config.latent_channels, pixels.shape[2] // side, pixels.shape[3] // side)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]).to(pixels)


@torch.no_grad()
def _held_out_error(engine: Any, pictures: Pictures, config: ImageVaeConfig, run: Run) -> float:
    """Mean |x - x̂| of the held-out pictures in -1..1, from the posterior's means."""
    total = 0.0
    vae = engine.module.vae
    # Every worker takes part in as many passes, as ZeRO-3 needs.
    for number in range(run.rank, -(-len(pictures) // run.workers) * run.workers, run.workers):
        pixels = as_pixels(pictures.batch(np.array([min(number, len(pictures) - 1)])), engine.device)
        error = (vae.decode(vae.encode(pixels).latent_dist.mean).sample - pixels).abs().mean().item()
        total += error if number < len(pictures) else 0.0
    return zero.sum_over_workers([total])[0] / len(pictures)


# ---- what is seen of it, and what is left of it


@torch.no_grad()
def _write_sheet(vae: Any, train: Pictures, val: Pictures, run: Run, step: int) -> None:
    """Training and held-out pictures above what comes back of them: samples/step-N.png."""
    originals, reconstructed, captions = [], [], []
    for side, name in ((train, ""), (val, "held out: ")):
        for index in range(min(SHOWN, len(side))):
            picture = side.batch(np.array([index]))
            originals.append(picture[0])
            pixels = as_pixels(picture, vae.device)
            reconstructed.append(as_pictures(vae.decode(vae.encode(pixels).latent_dist.mean).sample)[0])
            captions.append(name + side.captions[index])
    write_sheet(run.folder / "samples" / f"step-{step:08d}.png", [originals, reconstructed], captions, SHOWN)


@torch.no_grad()
def _export(vae: Any, pictures: Pictures, run: Run) -> None:
    """The model folder, with scaling_factor = 1 / std of the training pictures' latents."""
    squares, sums, count = 0.0, 0.0, 0
    for index in range(0, len(pictures), -(-len(pictures) // MEASURED)):
        latents = vae.encode(as_pixels(pictures.batch(np.array([index])), vae.device)).latent_dist.mean.double()
        squares, sums = squares + latents.square().sum().item(), sums + latents.sum().item()
        count += latents.numel()
    deviation = math.sqrt(squares / count - (sums / count) ** 2)
    vae.register_to_config(scaling_factor=1.0 / deviation)

    def write(folder: Path) -> None:
        vae.save_pretrained(folder)

    save_model(run, write, "autoencoder")
