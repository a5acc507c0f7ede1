"""Tiny image model folders with random weights and real component classes, as diffusers saves them."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from serving.image.pixels import PixelAutoencoder

Family = Literal["sd", "pixart"]
Prediction = Literal["epsilon", "v_prediction", "flow"]

SIZE = 32  # pixels, of both sides
MULTIPLE = 4  # which sizes must be divisible by: a latent is 2 × 2 pixels, and the denoiser halves once; 2 for pixels
WIDTH = 16  # of the text encoder
TOKENS = 24  # of a prompt: a letter each, and two more
_NOISE: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def tiny_folder(
    folder: Path,
    family: Family = "sd",
    prediction: Prediction = "epsilon",
    pixels: bool = False,
    encoder: Literal["clip", "bert"] = "clip",
    **manifest: Any,
) -> Path:
    """A pipeline folder for images of 32 × 32 pixels; `chatforge.json` holds `manifest` where there is any."""
    pipeline = tiny_pipeline(family, prediction, pixels, encoder)
    pipeline.save_pretrained(folder)
    if manifest:
        (folder / "chatforge.json").write_text(json.dumps({"kind": "text-to-image"} | manifest), "utf-8")
    return folder


def tiny_pipeline(
    family: Family = "sd",
    prediction: Prediction = "epsilon",
    pixels: bool = False,
    encoder: Literal["clip", "bert"] = "clip",
) -> Any:
    """The pipeline itself, in eval mode, without progress bars; the same weights each time."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    vae: Any = PixelAutoencoder() if pixels else _autoencoder()
    text_encoder = (_clip if encoder == "clip" else _bert)(tokenizer)
    parts = {"vae": vae.eval(), "text_encoder": text_encoder.eval(), "tokenizer": tokenizer}
    parts["scheduler"] = tiny_scheduler(prediction)
    if family == "sd":
        parts |= dict.fromkeys(("safety_checker", "feature_extractor"))
        # The sentence encoder's is of the kind that is trained here: told of the whole caption beside the time.
        unet = _unet(vae.config.latent_channels, SIZE if pixels else SIZE // 2, encoder == "bert").eval()
        pipeline: Any = StableDiffusionPipeline(**parts, unet=unet, requires_safety_checker=False)
    else:
        transformer = _transformer(vae.config.latent_channels, SIZE if pixels else SIZE // 2).eval()
        pipeline = PixArtAlphaPipeline(**parts, transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_tokenizer() -> CLIPTokenizer:
    """A token for each byte, and one for each at a word's end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=TOKENS)


def tiny_scheduler(prediction: Prediction) -> Any:
    if prediction == "flow":
        flow: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}
        return DPMSolverMultistepScheduler(**flow, steps_offset=1)  # StableDiffusionPipeline would set it, and say so
    return DDIMScheduler(
        **_NOISE, prediction_type=prediction, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )


def _clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=TOKENS, initializer_range=0.5, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip


def _bert(tokenizer: CLIPTokenizer) -> BertModel:
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=TOKENS, initializer_range=0.5,
    )  # fmt: skip
    config.use_attention_mask = True  # which StableDiffusionPipeline looks for
    return BertModel(config, add_pooling_layer=False)


def _autoencoder() -> Any:
    vae: Any = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=SIZE,
    )  # fmt: skip
    return _louder(vae, vae.decoder.conv_out)


def _unet(channels: int, size: int, pooled: bool) -> Any:
    unet: Any = UNet2DConditionModel(
        sample_size=size, in_channels=channels, out_channels=channels, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn", cross_attention_dim=WIDTH, attention_head_dim=2, norm_num_groups=4,
        addition_embed_type="text" if pooled else None, addition_embed_type_num_heads=2,
    )  # fmt: skip
    return _louder(unet, unet.conv_out)


def _transformer(channels: int, size: int) -> Any:
    transformer: Any = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=channels, out_channels=2 * channels, num_layers=2,
        cross_attention_dim=16, sample_size=size, patch_size=2, caption_channels=WIDTH,
    )  # fmt: skip
    return _louder(transformer, transformer.proj_out)


def _louder(model: Any, last: torch.nn.Module) -> Any:
    """Random weights whisper: with the last layer's times four, pictures use all of their range."""
    with torch.no_grad():
        for weight in last.parameters():
            weight.mul_(4)
    return model
