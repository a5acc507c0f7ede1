"""The parts of a diffusers pipeline folder, opened safely: denoiser, autoencoder, text encoder, tokenizer, scheduler.

What is served is what StableDiffusionPipeline and PixArt's two pipelines run from a prompt alone. Left out: unets that
take more than noisy latents (the 9 channels of inpainting models, guidance that was distilled into them), image
encoders, safety checkers, LoRA files beside the weights.
"""

from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel, SchedulerMixin, UNet2DConditionModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from serving.folder import Json, kind_of, read_json
from serving.image.api import ImageParams
from serving.image.pixels import PixelAutoencoder
from serving.model_folder import refuse_pickle

# By model_index.json's _class_name: what the denoiser is called there, and the most tokens that a prompt may have
# where that is the pipeline's rule and not its tokenizer's.
_PIPELINES: dict[str, tuple[str, int | None]] = {
    "StableDiffusionPipeline": ("unet", None),
    "StableDiffusionImg2ImgPipeline": ("unet", None),
    "StableDiffusionInpaintPipeline": ("unet", None),
    "PixArtAlphaPipeline": ("transformer", 120),
    "PixArtSigmaPipeline": ("transformer", 300),
}
_CLASSES: dict[str, tuple[type, ...]] = {
    "unet": (UNet2DConditionModel,),
    "transformer": (PixArtTransformer2DModel,),
    "vae": (AutoencoderKL, PixelAutoencoder),
    "text_encoder": (PreTrainedModel,),
    "tokenizer": (PreTrainedTokenizerBase,),
    "scheduler": (SchedulerMixin,),
}
_LIBRARIES = ("diffusers", "transformers", PixelAutoencoder.__module__)
_RENAMED = {"Transformer2DModel": "PixArtTransformer2DModel"}  # PixArt's first folders
_LONGEST_PROMPT = 4096  # tokens; a tokenizer that names no limit of its own says 10^30


@dataclass
class Components:
    """What draws. The models are in eval mode; the scheduler is never stepped itself, each batch has a copy."""

    denoiser: Any  # UNet2DConditionModel or PixArtTransformer2DModel
    vae: Any  # AutoencoderKL or PixelAutoencoder
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    max_prompt_tokens: int | None = None  # None: as the tokenizer has it
    manifest: Json = field(default_factory=dict)  # chatforge.json

    @property
    def is_unet(self) -> bool:
        """Whether it is Stable Diffusion's family; PixArt's otherwise."""
        return isinstance(self.denoiser, UNet2DConditionModel)

    @property
    def prompt_tokens(self) -> int:
        """How many tokens every prompt is cut or padded to."""
        return self.max_prompt_tokens or self.tokenizer.model_max_length

    @property
    def latent_channels(self) -> int:
        return self.denoiser.config.in_channels

    @property
    def scale_factor(self) -> int:
        """Pixels per latent, each way."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def multiple(self) -> int:
        """What width and height must be divisible by, so that the denoiser's levels meet."""
        inner = 2**self.denoiser.num_upsamplers if self.is_unet else self.denoiser.config.patch_size
        return self.scale_factor * inner

    @property
    def default_size(self) -> tuple[int, int]:
        """(width, height) in pixels that the manifest names, or that the denoiser was made for."""
        size = self.denoiser.config.sample_size or ImageParams.width // self.scale_factor
        height, width = (size, size) if isinstance(size, int) else size
        width, height = width * self.scale_factor, height * self.scale_factor
        return self.manifest.get("width", width), self.manifest.get("height", height)

    @property
    def defaults(self) -> ImageParams:
        """What a request has that asks for nothing."""
        width, height = self.default_size
        named = {k: self.manifest[k] for k in ("num_inference_steps", "guidance_scale") if k in self.manifest}
        return ImageParams(width, height, **named)

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's; all else computes in float32."""
        return self.denoiser.dtype


def load_components(
    folder: str | Path, dtype: torch.dtype | None = None, *, device: str = "cpu", allow_unsafe: bool = False
) -> Components:
    """The parts of a pipeline folder; `dtype` is the denoiser's, by default float32 whatever the folder holds.

    Raises ValueError where the folder is none or of another kind, lacks a part or has one that is not served, and where
    loading would run code that comes with it: classes of its own, and pickled weights unless `allow_unsafe`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such model folder")
    if (held := kind_of(folder)) != "text-to-image":
        raise ValueError(f"{folder}: holds a {held} model; a text-to-image is needed here")
    index, manifest = read_json(folder / "model_index.json"), read_json(folder / "chatforge.json")
    denoiser, longest = _pipeline(folder, index)
    parts = {}
    for name in (denoiser, "vae", "text_encoder", "tokenizer", "scheduler"):
        kind = _class_of(folder, index, name)
        parts[name] = _load(folder, name, kind, dtype if name == denoiser else None, device, allow_unsafe)
    limit = parts["tokenizer"].model_max_length
    components = Components(
        denoiser=parts.pop(denoiser), **parts, max_prompt_tokens=min(limit, longest or limit), manifest=manifest
    )
    _check(folder, components)
    return components


def _pipeline(folder: Path, index: Json) -> tuple[str, int | None]:
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in _PIPELINES:
        raise ValueError(f"{folder}: is a {name} folder, which is not served; {', '.join(_PIPELINES)} are")
    return _PIPELINES[name]


def _class_of(folder: Path, index: Json, name: str) -> type:
    """The class that model_index.json names for a part, where it is one that is served."""
    library, named = index.get(name) or (None, None)
    if not library or not named or not (folder / name).is_dir():
        raise ValueError(f"{folder}: has no {name}, which its model_index.json must name and a folder of it must hold")
    if library not in _LIBRARIES:
        raise ValueError(
            f"{folder}: its {name} is a {library}.{named}, which is code that comes with the folder and would run with "
            f"your rights; only classes of {', '.join(_LIBRARIES)} are loaded"
        )
    found = getattr(import_module(library), _RENAMED.get(named, named), None)
    if not isinstance(found, type) or not issubclass(found, _CLASSES[name]):
        wanted = " or ".join(kind.__name__ for kind in _CLASSES[name])
        raise ValueError(f"{folder}: its {name} is a {library}.{named}; a {wanted} is needed here")
    return found


def _load(folder: Path, name: str, kind: type, dtype: torch.dtype | None, device: str, allow_unsafe: bool) -> Any:
    loaded: Any = kind
    if name in ("tokenizer", "scheduler"):
        return _from_pretrained(loaded, folder / name)
    transformers = issubclass(kind, PreTrainedModel)
    if not allow_unsafe:
        refuse_pickle(folder / name, "model.safetensors" if transformers else "diffusion_pytorch_model.safetensors")
    options = {
        "dtype" if transformers else "torch_dtype": dtype or torch.float32,
        "use_safetensors": None if allow_unsafe else True,
    }
    return _from_pretrained(loaded, folder / name, **options).eval().to(device)


def _from_pretrained(kind: Any, folder: Path, **options: Any) -> Any:
    try:
        return kind.from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder}: cannot be loaded: {error}") from error


def _check(folder: Path, components: Components) -> None:
    """Raises ValueError for what would fail at the first request."""
    config = components.denoiser.config
    if config.in_channels != components.vae.config.latent_channels:
        raise ValueError(
            f"{folder}: its denoiser takes {config.in_channels} channels and its vae makes "
            f"{components.vae.config.latent_channels} (an inpainting model has 9); the same number is needed here"
        )
    if config.get("time_cond_proj_dim") is not None or config.get("addition_embed_type") not in (None, "text"):
        raise ValueError(f"{folder}: its unet asks for more than a prompt (time_cond_proj_dim or addition_embed_type)")
    if not hasattr(components.scheduler, "init_noise_sigma"):
        name = type(components.scheduler).__name__
        raise ValueError(f"{folder}: its {name} is no scheduler that its pipeline can run (it has no init_noise_sigma)")
    if components.prompt_tokens > _LONGEST_PROMPT:
        raise ValueError(f"{folder}/tokenizer: names no model_max_length, which prompts are padded to")
