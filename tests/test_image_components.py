"""What a pipeline folder is served as, and what is refused before it can do harm."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from annotated_types import Le
from conftest import TinyWorld
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from image_world import MULTIPLE, SIZE, TOKENS, tiny_folder, tiny_pipeline

from serving.image.api import MAX_GUIDANCE_SCALE, MAX_NUM_INFERENCE_STEPS, ImageParams
from serving.image.components import _PIPELINES, load_components
from serving.image.pixels import PixelAutoencoder
from serving.model_folder import describe
from training.config import PIXART_TOKENS, ImageConfig


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("sd") / "model")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(folder: Path, text: str) -> None:
    with pytest.raises(ValueError, match=text) as refusal:
        load_components(folder)
    assert str(folder) in str(refusal.value)


def test_a_folder_of_diffusers_is_loaded_as_it_is(made: Path) -> None:
    parts = load_components(made)
    pipe = tiny_pipeline()
    for name in ("vae", "text_encoder"):
        weights = getattr(pipe, name).state_dict()
        assert all(torch.equal(weights[k], v) for k, v in getattr(parts, name).state_dict().items())
    assert isinstance(parts.denoiser, UNet2DConditionModel) and not parts.denoiser.training
    assert type(parts.scheduler) is type(pipe.scheduler)
    assert (parts.latent_channels, parts.scale_factor, parts.multiple, parts.prompt_tokens) == (4, 2, MULTIPLE, TOKENS)
    assert parts.default_size == (SIZE, SIZE) and parts.is_unet
    assert parts.defaults == ImageParams(SIZE, SIZE, 30, 7.5)
    assert parts.device == torch.device("cpu") and parts.dtype == torch.float32
    assert describe(made).kind == "text-to-image"


def test_the_manifest_names_defaults(tmp_path: Path) -> None:
    named = {"width": 48, "height": 24, "num_inference_steps": 3, "guidance_scale": 2.0}
    parts = load_components(tiny_folder(tmp_path, "pixart", "flow", run="tiny", **named))
    assert parts.defaults == ImageParams(48, 24, 3, 2.0)
    assert not parts.is_unet and parts.manifest["run"] == "tiny"
    assert (parts.scale_factor, parts.multiple, parts.prompt_tokens) == (2, 4, TOKENS)


def test_a_folder_of_pixels_is_saved_and_loaded_by_diffusers_too(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "sd", "flow", True)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["vae"] == ["serving.image.pixels", "PixelAutoencoder"]
    assert isinstance(DiffusionPipeline.from_pretrained(folder).vae, PixelAutoencoder)
    parts = load_components(folder)
    assert isinstance(parts.vae, PixelAutoencoder)
    assert (parts.latent_channels, parts.scale_factor, parts.multiple) == (3, 1, 2)
    pixels = torch.rand(2, 3, 4, 4)
    assert parts.vae.encode(pixels).latent_dist.sample() is parts.vae.encode(pixels)["latent_dist"].mode() is pixels
    assert parts.vae.decode(pixels).sample is parts.vae.decode(pixels, return_dict=False)[0] is pixels


@pytest.mark.parametrize("name", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"])
def test_folders_of_its_edits_are_served_too(folder: Path, name: str) -> None:
    edit(folder / "model_index.json", _class_name=name)
    assert load_components(folder).is_unet


def test_pixarts_first_folders_name_their_transformer_otherwise(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "pixart")
    edit(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    assert not load_components(folder).is_unet


def test_prompts_of_pixart_are_as_long_as_its_pipeline_allows(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "pixart")
    edit(folder / "tokenizer" / "tokenizer_config.json", model_max_length=512)
    assert load_components(folder).prompt_tokens == 120
    edit(folder / "model_index.json", _class_name="PixArtSigmaPipeline")
    assert load_components(folder).prompt_tokens == 300


def test_what_comes_beside_is_left_alone(folder: Path) -> None:
    safety: Any = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    edit(folder / "model_index.json", safety_checker=safety, feature_extractor=["evil", "Extractor"])
    assert load_components(folder).is_unet


def test_another_family_is_refused(folder: Path, tiny_world: TinyWorld) -> None:
    edit(folder / "model_index.json", _class_name="FluxPipeline")
    refused(folder, "is a FluxPipeline folder, which is not served; StableDiffusionPipeline, .*PixArtSigmaPipeline are")
    edit(folder / "model_index.json", _class_name=["pipeline", "Evil"])
    refused(folder, "which is not served")
    refused(tiny_world.llama, "holds a causal-lm model; a text-to-image is needed here")
    edit(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    (folder / "chatforge.json").write_text(json.dumps({"kind": "reward"}))
    refused(folder, "holds a reward model")


def test_what_is_no_folder_is_refused(tmp_path: Path, folder: Path) -> None:
    refused(tmp_path / "nowhere", "no such model folder")
    (folder / "model_index.json").write_text("[]x")
    refused(folder, "not a JSON object")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(folder: Path, part: str) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    edit(folder / "model_index.json", **{part: [None, None]})
    refused(folder, f"has no {part}, which")
    (folder / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != part}))
    refused(folder, f"has no {part}, which")
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(folder / part)
    refused(folder, f"has no {part}, which")


def test_classes_that_come_with_the_folder_are_refused(folder: Path) -> None:
    (folder / "unet" / "evil.py").write_text("raise SystemExit('ran')")
    edit(folder / "model_index.json", unet=["evil", "Model"])
    refused(folder, "its unet is a evil.Model, which is code that comes with the folder")
    with pytest.raises(ValueError, match="comes with the folder"):
        load_components(folder, allow_unsafe=True)
    edit(folder / "model_index.json", unet=["os", "PathLike"])
    refused(folder, "only classes of diffusers, transformers, serving.image.pixels are loaded")


@pytest.mark.parametrize(
    ("part", "named", "wanted"),
    [
        ("unet", ["diffusers", "UNet2DModel"], "UNet2DConditionModel"),
        ("vae", ["diffusers", "VQModel"], "AutoencoderKL or PixelAutoencoder"),
        ("text_encoder", ["transformers", "pipeline"], "PreTrainedModel"),
        ("text_encoder", ["transformers", "NoSuchModel"], "PreTrainedModel"),
        ("tokenizer", ["transformers", "CLIPTextModel"], "PreTrainedTokenizerBase"),
        ("scheduler", ["diffusers", "AutoencoderKL"], "SchedulerMixin"),
    ],
)
def test_a_part_of_another_kind_is_refused(folder: Path, part: str, named: list[str], wanted: str) -> None:
    edit(folder / "model_index.json", **{part: named})
    refused(folder, rf"its {part} is a {named[0]}\.{named[1]}; a {wanted} is needed here")


@pytest.mark.parametrize(
    ("part", "file"),
    [("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")],
)
def test_pickled_weights_are_refused_unless_trusted(folder: Path, part: str, file: str) -> None:
    weights = getattr(load_components(folder), {"unet": "denoiser"}.get(part, part)).state_dict()
    other = (folder / part / f"{file}.safetensors").rename(folder / part / "other.safetensors")
    pickled = f"{'pytorch_model' if part == 'text_encoder' else file}.bin"
    torch.save(weights, folder / part / pickled)
    refused(folder, f"{part}: cannot be loaded")
    (folder / part / pickled).unlink()
    other.unlink()
    refused(folder, rf"{part}: has no {file}\.safetensors")
    torch.save(weights, folder / part / pickled)
    refused(folder, rf"{part}: has only pickled weights \({pickled}\).*allow_unsafe")
    trusted = load_components(folder, allow_unsafe=True)
    loaded = getattr(trusted, {"unet": "denoiser"}.get(part, part)).state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in loaded.items())


def test_weights_that_cannot_be_read_name_their_folder(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(folder, "unet: cannot be loaded")


def test_models_that_ask_for_more_than_a_prompt_are_refused(folder: Path) -> None:
    config = json.loads((folder / "unet" / "config.json").read_text())
    for changes, text in (
        ({"in_channels": 9}, r"takes 9 channels and its vae makes 4 \(an inpainting model has 9\)"),
        ({"time_cond_proj_dim": 8}, "its unet asks for more than a prompt"),
    ):
        UNet2DConditionModel.from_config(config | changes).save_pretrained(folder / "unet")
        refused(folder, text)


def test_a_scheduler_that_its_pipeline_cannot_run_is_refused(folder: Path) -> None:
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    refused(folder, "FlowMatchEulerDiscreteScheduler is no scheduler that its pipeline can run")
    with pytest.raises(AttributeError):  # as it is
        pipe = StableDiffusionPipeline.from_pretrained(folder)
        pipe("a red apple", num_inference_steps=1, width=SIZE, height=SIZE)


def test_a_tokenizer_without_a_limit_is_refused(folder: Path) -> None:
    edit(folder / "tokenizer" / "tokenizer_config.json", model_max_length=int(1e30))
    refused(folder, "tokenizer: names no model_max_length")


def test_nothing_is_written_into_a_model_folder(made: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in made.rglob("*")}
    load_components(made, torch.bfloat16)
    assert {file: file.stat().st_mtime_ns for file in made.rglob("*")} == before


def test_the_tiny_world_is_the_same_each_time(made: Path, tmp_path: Path) -> None:
    one, two = (load_components(folder) for folder in (made, tiny_folder(tmp_path)))
    for name, weight in one.denoiser.state_dict().items():
        assert np.array_equal(weight, two.denoiser.state_dict()[name])


def test_recipes_have_the_bounds_that_serving_has() -> None:
    """training.config may not import what serves (the arrows between packages), so it names them again."""
    bounds = {name: ImageConfig.model_fields[name].metadata for name in ("num_inference_steps", "guidance_scale")}
    assert Le(MAX_NUM_INFERENCE_STEPS) in bounds["num_inference_steps"]
    assert Le(MAX_GUIDANCE_SCALE) in bounds["guidance_scale"]
    assert _PIPELINES["PixArtAlphaPipeline"] == ("transformer", PIXART_TOKENS)
