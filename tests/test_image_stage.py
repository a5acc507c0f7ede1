"""The image stages in one process: they learn, go on after a stop, and what must not matter does not."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import losses
from diffusers import AutoencoderKL, PixArtAlphaPipeline, PixArtTransformer2DModel, StableDiffusionPipeline
from image_world import tiny_folder
from PIL import Image
from safetensors.torch import load_file
from workers import two_workers

from serving.image.components import load_components
from training import image, image_data, image_vae, zero
from training.config import ConfigError, ImageConfig, ImageVaeConfig
from training.data.pictures import Pictures
from training.image_data import Data, digest_of
from training.image_parts import fresh_scheduler, fresh_unet, load_text_encoder
from training.measure_image import measure_image
from training.picture_stage import cached, fetched
from training.recipe import load_recipe, shipped_recipes
from training.run import Run, StageError
from training.seeds import derived_seed

COLOURS = {"red": (230, 40, 30), "green": (40, 170, 60), "blue": (40, 70, 220), "black": (20, 20, 20)}
NET = {"channels": [16, 32], "attention_levels": [1], "num_heads": 2, "text_layers": 1, "text_hidden_size": 16}
DIT = {"denoiser": "dit", "hidden_size": 32, "num_layers": 2, "num_heads": 2, "patch_size": 2, "text_hidden_size": 16}


@pytest.fixture(scope="module", autouse=True)
def distributed():
    zero.init_distributed("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Sixteen captioned pictures: a square or a bar, in four colours and two places."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for name, colour in COLOURS.items():
        for shape, box in {"square": (4, 4, 12, 12), "bar": (2, 6, 14, 9)}.items():
            for place in ("left", "right"):
                image = Image.new("RGB", (16, 16), "white")
                shift = -2 if place == "left" else 2
                image.paste(colour, (box[0] + shift, box[1], box[2] + shift, box[3]))
                image.save(folder / f"{name}-{shape}-{place}.png")
                lines.append({"file_name": f"{name}-{shape}-{place}.png", "text": f"{name} {shape} on the {place}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return folder


@pytest.fixture
def make_run(tmp_path, pictures):
    def make(name="r", **changes):
        run = Run(tmp_path / name, "image", seed=3, val_fraction=0.2)
        run.folder.mkdir(parents=True)
        settings = {"images": [str(pictures)], "resolution": 16, "vae": "pixels", "steps": 6, "batch_size": 4}
        settings |= {"micro_batch_size": 4, "dtype": "fp32", "checkpoint_every": 2, "sample_every": 3}
        settings |= {"num_inference_steps": 2, "max_caption_tokens": 12}
        return ImageConfig(**{**settings, **NET, **changes}), run

    return make


@pytest.fixture
def make_vae_run(tmp_path, pictures):
    def make(name="r", **changes):
        run = Run(tmp_path / name, "image_vae", seed=3, val_fraction=0.2)
        run.folder.mkdir(parents=True)
        settings = {"images": [str(pictures)], "resolution": 16, "channels": [8, 16], "latent_channels": 2, "steps": 6}
        settings |= {"batch_size": 4, "micro_batch_size": 4, "dtype": "fp32", "checkpoint_every": 2, "sample_every": 3}
        return ImageVaeConfig(**{**settings, "perceptual_weight": 0.0, **changes}), run

    return make


def validations(run):
    return [line["val_loss"] for line in run.metrics() if "val_loss" in line]


# ---- the denoiser


def test_it_learns_which_caption_is_which_picture(make_run):
    settings = {"steps": 200, "batch_size": 12, "micro_batch_size": 12, "learning_rate": 4e-3, "ema_decay": 0.9}
    settings |= {"sample_every": 200, "checkpoint_every": 200, "num_inference_steps": 12, "guidance_scale": 2.0}
    config, run = make_run(**settings)
    image.run(config, run)
    train = Pictures(run.folder / "train")
    parts = load_components(run.model)
    drawings = image.drawn(parts, train.captions, image.params_of(config, parts))
    pictures = np.concatenate([train.batch([index]) for index in range(len(train))]).astype(float)
    far = [[np.abs(drawing - picture).mean() for picture in pictures] for drawing in np.array(drawings, float)]
    right = np.mean(np.argmin(far, axis=1) == np.arange(len(train)))
    assert right > 0.35  # one in thirteen by chance
    assert losses(run)[0] > 2 * np.mean(losses(run)[-10:])


@pytest.mark.parametrize("changes", [NET, DIT], ids=["unet", "dit"])
def test_what_it_leaves_is_a_pipeline_that_diffusers_loads_and_draws_alike(make_run, changes):
    config, run = make_run(**changes)
    image.run(config, run)
    card = json.loads((run.model / "chatforge.json").read_text("utf-8"))
    assert (card["kind"], card["width"], card["num_inference_steps"]) == ("text-to-image", 16, 2)
    kind = StableDiffusionPipeline if changes is NET else PixArtAlphaPipeline
    pipeline = kind.from_pretrained(run.model)
    pipeline.set_progress_bar_config(disable=True)
    own = {} if changes is NET else {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 12}
    theirs = pipeline(
        "red bar", width=16, height=16, num_inference_steps=2, guidance_scale=3.0,
        generator=torch.Generator("cpu").manual_seed(0), output_type="np", **own,
    ).images[0]  # fmt: skip
    parts = load_components(run.model)
    (ours,) = image.drawn(parts, ["red bar"], image.params_of(config, parts))
    assert np.array_equal((theirs * 255).round().astype(np.uint8), ours)


def test_a_run_that_was_stopped_goes_on_with_the_same_losses(make_run, goes_on_with_the_same_losses):
    goes_on_with_the_same_losses(image, make_run, at=5)


def test_a_run_that_was_stopped_ends_with_the_same_average(make_run, monkeypatch):
    config, undisturbed = make_run("undisturbed")
    image.run(config, undisturbed)
    _, stopped = make_run("stopped")
    monkeypatch.setattr(image, "export", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        image.run(config, stopped)
    monkeypatch.undo()
    image.run(config, stopped)
    weights = [(r.model / "unet/diffusion_pytorch_model.safetensors").read_bytes() for r in (undisturbed, stopped)]
    assert weights[0] == weights[1]
    assert validations(undisturbed) == validations(stopped)


def test_micro_batches_and_workers_are_no_matter_of_what_is_learnt(make_run, tmp_path):
    config, whole = make_run("whole")
    image.run(config, whole)
    config, parts = make_run("parts", micro_batch_size=1)
    image.run(config, parts)
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-5)
    config, _ = make_run("unused", micro_batch_size=2)
    codes, told = two_workers("image", config, tmp_path / "both", 0.2)
    assert codes == [0, 0], told
    both = Run(tmp_path / "both", "image")
    assert losses(both) == pytest.approx(losses(whole), abs=1e-5)
    assert validations(both) == pytest.approx(validations(whole), abs=1e-5)


@pytest.mark.parametrize(("zero_stage", "net"), [(0, DIT), (3, NET)])
def test_zero_stages_and_blocks_that_are_computed_again_give_the_same_losses(
    make_run, nothing_stays_whole, zero_stage, net
):
    config, reference = make_run("reference", **net)
    image.run(config, reference)
    config, sharded = make_run("sharded", **net, zero_stage=zero_stage, gradient_checkpointing=True)
    image.run(config, sharded)
    assert losses(sharded) == pytest.approx(losses(reference), abs=1e-5)
    assert validations(sharded) == pytest.approx(validations(reference), abs=1e-5)


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name.startswith("image")])
def test_a_norm_never_has_one_channel_for_a_group(name):
    """It would take each channel's mean away, and colour with it: an autoencoder painted everything brown."""
    recipe = load_recipe(name)
    with torch.device("meta"):
        nets = [fresh_unet(recipe.image, 4, 16, 32)]
        nets += [image_vae.build_vae(recipe.image_vae)] if recipe.image_vae else []
    norms = [m for net in nets for m in net.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert norms
    assert all(norm.num_channels // norm.num_groups >= 4 for norm in norms)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_chains_are_trained_too(make_run, prediction):
    config, run = make_run(prediction=prediction)
    image.run(config, run)
    assert all(np.isfinite(losses(run)))
    assert load_components(run.model).scheduler.config.prediction_type == prediction


@pytest.mark.parametrize("prediction", ["flow", "epsilon", "v_prediction"])
def test_what_is_predicted_leads_the_fresh_scheduler_to_the_data(make_run, prediction):
    """Drawing with a model that has learnt one picture perfectly."""
    config, _ = make_run(prediction=prediction)
    scheduler = fresh_scheduler(config)
    objective = image.objective_of(scheduler, config)
    x0, xt = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    scheduler.set_timesteps(20)
    for t in scheduler.timesteps:
        time = t / 1000 if prediction == "flow" else t
        alpha, sigma = 1 - time, time
        if prediction != "flow":
            alpha, sigma = (scheduler.alphas_cumprod[t] ** 0.5, (1 - scheduler.alphas_cumprod[t]) ** 0.5)
        noised, target, timesteps, _ = objective.noisy(x0, (xt - alpha * x0) / sigma, time.reshape(1))
        assert torch.allclose(noised, xt, atol=1e-4) and timesteps.item() == pytest.approx(t.item(), abs=1e-3)
        xt = scheduler.step(target, t, xt).prev_sample
    assert torch.allclose(xt, x0, atol=0.1)  # a chain's last step leaves noise of variance β_0


@pytest.mark.parametrize("t", [1, 100, 999])
def test_a_fresh_chain_is_drawn_by_bayes_rule(make_run, t):
    """q(x_{t-1} | x_t, x_0) ∝ q(x_t | x_{t-1}) q(x_{t-1} | x_0) (Ho et al. 2020, eqs. 6 and 7), on a grid."""
    scheduler = fresh_scheduler(make_run(prediction="epsilon")[0])
    scheduler.set_timesteps(1000)
    x0, xt = torch.tensor([[0.3]]).double(), torch.tensor([[-0.2]]).double()
    now, before = scheduler.alphas_cumprod[t].double(), scheduler.alphas_cumprod[t - 1].double()
    beta = 1 - now / before
    grid = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    log = -((xt - (1 - beta).sqrt() * grid) ** 2) / (2 * beta) - (grid - before.sqrt() * x0) ** 2 / (2 * (1 - before))
    weights = torch.softmax(log.flatten(), 0)
    mean = (weights * grid).sum()
    deviation = (weights * (grid - mean) ** 2).sum().sqrt()
    noise = (xt - now.sqrt() * x0) / (1 - now).sqrt()
    steps = [scheduler.step(noise, t, xt, eta=1.0, variance_noise=torch.full_like(xt, z)) for z in (0.0, 1.0)]
    ours, beyond = (step.prev_sample.item() for step in steps)
    assert ours == pytest.approx(mean.item(), abs=1e-4)
    assert beyond - ours == pytest.approx(deviation.item(), rel=1e-3)


def test_a_pretrained_text_encoder_stays_as_it_is_and_its_states_are_cached(make_run, tmp_path, monkeypatch):
    parts = load_components(tiny_folder(tmp_path / "start", encoder="bert"))
    folder = tmp_path / "bert"
    parts.text_encoder.save_pretrained(folder)
    parts.tokenizer.save_pretrained(folder)
    config, run = make_run(text_encoder=str(folder))
    digested = []
    monkeypatch.setattr(image_data, "digest_of", lambda module: digested.append(module) or digest_of(module))
    image.run(config, run)
    assert len(digested) == 2  # the autoencoder and the text encoder, for both sides
    before, _ = load_text_encoder(str(folder), 12)
    after = load_components(run.model)
    assert after.text_encoder.config.use_attention_mask and after.tokenizer.model_max_length == 12
    weights = before.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in after.text_encoder.state_dict().items())
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / ".cache").rglob("*.npy")}
    assert {path.name for path in made} == {"latents.npy", "states.npy"}
    config, again = make_run("again", text_encoder=str(folder), learning_rate=2e-3)
    image.run(config, again)
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / ".cache").rglob("*.npy")}


@pytest.mark.parametrize("stage", ["image", "image_vae"])
def test_two_workers_under_zero_3_end_with_the_average_of_one(make_run, make_vae_run, tmp_path, stage):
    """DeepSpeed keeps small parameters whole: their shards alone were averaged. Three pictures are held out, an odd
    number, of which one worker had one more to wait for."""
    made, file = {"image": (make_run, "unet/"), "image_vae": (make_vae_run, "")}[stage]
    settings = {"ema_decay": 0.5, "learning_rate": 1e-2, "warmup_ratio": 0.0}
    config, one = made("one", **settings)
    {"image": image, "image_vae": image_vae}[stage].run(config, one)
    config, _ = made("unused", **settings, zero_stage=3, micro_batch_size=2)
    codes, told = two_workers(stage, config, tmp_path / "both", 0.2)
    assert codes == [0, 0], told
    both = Run(tmp_path / "both", stage)
    paths = [run.model / f"{file}diffusion_pytorch_model.safetensors" for run in (one, both)]
    ours, theirs = map(load_file, paths)
    assert len(Pictures(one.folder / "val")) % 2
    assert all(torch.allclose(theirs[name], tensor, atol=1e-3) for name, tensor in ours.items())
    assert validations(both) == pytest.approx(validations(one), abs=1e-4)


def test_few_captions_of_many_pictures_are_all_learnt(make_run, tmp_path):
    """To hold out one of two words, as of many captions, would be to leave half of the world out."""
    folder, lines = tmp_path / "cats", []
    folder.mkdir()
    for number in range(40):
        shade = Image.new("RGB", (16, 16), (6 * number, 255 - 6 * number, 40))
        shade.save(folder / f"{number}.png")
        lines.append({"file_name": f"{number}.png", "text": "a cat" if number % 2 else "a dog"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    config, run = make_run(images=[str(folder)])
    image.run(config, run)
    train, val = (Pictures(run.folder / side) for side in ("train", "val"))
    assert len(train) + len(val) == 40 and 2 <= len(val) <= 16
    assert set(train.captions) == {"a cat", "a dog"}
    assert not set(train.hashes) & set(val.hashes)


def test_of_runs_that_want_the_same_latents_one_makes_them(make_run, tmp_path):
    _, run = make_run()
    made = []

    def write(folder):
        made.append(folder)
        time.sleep(0.3)
        (folder / "it").touch()

    threads = [threading.Thread(target=cached, args=(run, "latents", ["x"], write)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and (fetched(run, cached(run, "latents", ["x"], write)) / "it").exists()


def test_captions_that_are_cut_are_counted(make_run):
    config, run = make_run(max_caption_tokens=4)
    image._prepare(config, run)
    (note,) = (note for note in run.notes() if "captions are cut" in note)
    cut, of = (int(number) for number in note.split(" captions")[0].split(" of "))
    assert 0 < cut <= of == 13 and note.endswith("to 4 tokens")


def test_a_pixart_of_1024_pixels_is_told_its_size_in_training_too(make_run, tmp_path):
    folder = tiny_folder(tmp_path / "start", family="pixart")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    config |= {"sample_size": 128, "attention_head_dim": 12, "cross_attention_dim": 24}
    PixArtTransformer2DModel.from_config(config).save_pretrained(folder / "transformer")
    config, run = make_run(vae=None, model=str(folder))
    image.run(config, run)
    assert load_components(run.model).denoiser.adaln_single.emb.use_additional_conditions


@pytest.mark.parametrize("family", ["sd", "pixart"])
@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_a_folder_that_is_there_is_fine_tuned(make_run, tmp_path, family, lora):
    start = tiny_folder(tmp_path / "start", family=family)
    config, run = make_run(vae=None, model=str(start), lora=lora, learning_rate=1e-3)
    image.run(config, run)
    before, after = load_components(start), load_components(run.model)
    weights = before.denoiser.state_dict()
    changed = {name for name, w in after.denoiser.state_dict().items() if not torch.equal(w, weights[name])}
    assert changed and after.denoiser.state_dict().keys() == weights.keys()
    if lora:
        assert all("attn" in name or "ff" in name for name in changed)
    frozen = before.text_encoder.state_dict()
    assert all(torch.equal(frozen[name], w) for name, w in after.text_encoder.state_dict().items())


def test_latents_are_known_by_the_weights_and_settings_that_made_them(tmp_path):
    start = tiny_folder(tmp_path / "start")
    one, same, other = (load_components(start).vae for _ in range(3))
    other.register_to_config(scaling_factor=2 * one.config.scaling_factor)
    assert digest_of(one) == digest_of(same) != digest_of(other)
    with torch.no_grad():
        next(same.parameters()).add_(1.0)
    assert digest_of(one) != digest_of(same)
    one.save_pretrained(tmp_path / "elsewhere")
    assert digest_of(AutoencoderKL.from_pretrained(tmp_path / "elsewhere")) == digest_of(one)


def test_captions_are_dropped_as_often_as_is_said(make_run):
    config, run = make_run(caption_dropout=0.5)
    image._prepare(config, run)
    data = Data(run, "train")
    nothing, something = data.captions([0, 0], [True, False])["input_ids"]
    assert data._row[""] == 0 and nothing.tolist() == data._ids[0].tolist() and not torch.equal(nothing, something)
    dropped = []
    data.captions = lambda indices, drop: dropped.extend(drop) or 1 / 0  # type: ignore[method-assign]
    objective = image.objective_of(fresh_scheduler(config), config)
    for step in range(100):
        with pytest.raises(ZeroDivisionError):
            seeds = [derived_seed(3, step, position) for position in range(4)]
            image._loss(_Engine(), data, objective, [0, 1, 2, 3], seeds, config.caption_dropout)
    assert 0.4 < np.mean(dropped) < 0.6


class _Engine:
    device = torch.device("cpu")


def test_what_is_wrong_is_told_before_anything_is_trained(make_run, make_vae_run, tmp_path):
    for changes, message in (
        ({"vae": str(tmp_path)}, "no autoencoder's folder"),
        ({"text_encoder": str(tmp_path)}, "text_encoder=.*cannot be loaded"),
        ({"resolution": 17}, "resolution=17 must be a multiple of 2 pixels; the nearest is 16"),
    ):
        config, run = make_run(str(len(message)), **changes)
        with pytest.raises(StageError, match=message):
            image.run(config, run)
    with pytest.raises(ValueError, match="there is no level 5"):
        make_run("level", attention_levels=[5])
    with pytest.raises(ValueError, match="max_caption_tokens=121: a dit takes 120 at most"):
        make_run("tokens", max_caption_tokens=121, **DIT)
    with pytest.raises(ValueError, match=r"resolution=19 must be a multiple of 2 pixels, .*; the nearest is 20"):
        make_vae_run("odd", resolution=19)
    with pytest.raises(ConfigError, match="not divisible"):
        make_run("batch", batch_size=6)[0].gradient_accumulation_steps(1)


BY_NAME = """
from training.config import ImageConfig
from training.image import components
from training.image_data import digest_of
from training.image_parts import load_vae
from training.run import StageError

for make, named in ((components, {"model": "owner/%s"}), (load_vae, {"vae": "owner/%s"})):
    (field, name), = named.items()
    for repository in ("here", "nowhere"):
        config = ImageConfig(images=["x"], steps=1, batch_size=1, micro_batch_size=1, **{field: name % repository})
        try:
            made = make(config, None)
            print(digest_of(getattr(made, "vae", made)))
        except StageError as error:
            print(str(error).splitlines()[0])
"""


@pytest.mark.timeout(120)
def test_a_pipeline_and_an_autoencoder_may_be_the_hubs(tmp_path):
    """Out of the cache where the hub's client puts them; what is not there is named."""
    start = tiny_folder(tmp_path / "start")
    digest, commit = digest_of(load_components(start).vae), "0" * 40
    repository = tmp_path / "hf" / "hub" / "models--owner--here"
    shutil.copytree(start, repository / "snapshots" / commit)
    for file in (start / "vae").iterdir():  # one repository is both here
        shutil.copy(file, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    env = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", BY_NAME], env=env, capture_output=True, text=True, check=False)
    pipeline, no_pipeline, vae, no_vae = done.stdout.splitlines()
    assert pipeline == vae == digest
    assert no_pipeline.startswith("image.model=owner/nowhere: ")
    assert no_vae.startswith("image.vae=owner/nowhere: cannot be loaded: ")


def test_evaluation_counts_drawings_of_both_sides(make_run):
    config, run = make_run()
    image.run(config, run)
    evaluate = run.of("evaluate")
    evaluate.folder.mkdir()
    result = measure_image(str(run.model), config, evaluate, 8)
    held_out = [row for row in result["drawings"] if row["held_out"]]
    assert result["trained"]["n"] + result["held_out"]["n"] == len(result["drawings"]) == 8
    assert len(held_out) == result["held_out"]["n"] == 2
    training = {record["caption"] for record in result["drawings"] if not record["held_out"]}
    assert training <= set(Pictures(run.folder / "train").captions)
    assert 0 <= result["trained"]["match_1"]["mean"] <= result["trained"]["match_5"]["mean"] <= 1
    with Image.open(evaluate.folder / "drawings.png") as sheet:
        assert sheet.width > 700


# ---- the autoencoder


def test_the_autoencoder_learns_and_measures_its_latents(make_vae_run):
    config, run = make_vae_run(steps=80, learning_rate=3e-3, ema_decay=0.9, sample_every=80, checkpoint_every=100)
    image_vae.run(config, run)
    assert np.mean(losses(run)[-5:]) < 0.5 * losses(run)[0]
    vae = AutoencoderKL.from_pretrained(run.model)
    pixels = image_vae.as_pixels(
        np.concatenate([Pictures(run.folder / "train").batch([i]) for i in range(12)]), vae.device
    )
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    assert latents.std().item() == pytest.approx(1.0, abs=0.1)
    assert (run.folder / "samples" / "step-00000080.png").is_file()


@pytest.mark.parametrize("adversarial_weight", [0.0, 0.5])
def test_an_autoencoder_that_was_stopped_goes_on_with_the_same_losses(
    make_vae_run, goes_on_with_the_same_losses, adversarial_weight
):
    def make(name):
        return make_vae_run(name, adversarial_weight=adversarial_weight)

    goes_on_with_the_same_losses(image_vae, make, at=5)


def test_an_autoencoders_blocks_that_are_computed_again_give_the_same_losses(make_vae_run):
    config, reference = make_vae_run("reference", adversarial_weight=0.5)
    image_vae.run(config, reference)
    config, again = make_vae_run("again", adversarial_weight=0.5, gradient_checkpointing=True)
    image_vae.run(config, again)
    assert losses(again) == pytest.approx(losses(reference), abs=1e-5)


def test_an_adversary_learns_to_tell_pictures_and_then_teaches_the_decoder(make_vae_run):
    """The first half is what it is without an adversary; the model folder knows nothing of it."""
    settings = {"steps": 40, "learning_rate": 2e-3, "sample_every": 40, "checkpoint_every": 100, "max_grad_norm": 1e9}
    config, plain = make_vae_run("plain", **settings)
    image_vae.run(config, plain)
    config, run = make_vae_run("opposed", adversarial_weight=0.5, **settings)
    image_vae.run(config, run)
    lines = [line for line in run.metrics() if "loss" in line]
    hinge = [line["discriminator"] for line in lines]
    assert hinge[0] == pytest.approx(1.0, abs=0.2) and np.mean(hinge[15:20]) < 0.7 * hinge[0]
    for line in lines:
        weight = 0.5 if line["step"] > 20 else 0.0
        parts = line["reconstruction"] + config.kl_weight * line["kl"] / (3 * 16 * 16) + line["discriminator"]
        assert line["loss"] == pytest.approx(parts + weight * line["adversarial"], abs=1e-4)
    assert AutoencoderKL.from_pretrained(run.model).state_dict().keys() == (
        AutoencoderKL.from_pretrained(plain.model).state_dict().keys()
    )
    with pytest.raises(ValueError, match=r"zero_stage=3 .* with adversarial_weight=0\.5: set zero_stage: 2, or"):
        make_vae_run("sharded", adversarial_weight=0.5, zero_stage=3)


def test_the_denoiser_learns_in_the_latents_of_the_stage_before(make_run, make_vae_run):
    config, run = make_vae_run()
    image_vae.run(config, run)
    config = make_run("unused", vae=None)[0]
    run.of("image").folder.mkdir()
    image.run(config, run.of("image"))
    assert load_components(run.of("image").model).latent_channels == 2


def test_features_of_a_pretrained_network_are_part_of_the_loss(make_vae_run):
    config, run = make_vae_run(perceptual_weight=0.5, steps=2)
    image_vae.run(config, run)
    first = run.metrics()[0]
    told = first["reconstruction"] + 0.5 * first["perceptual"] + 1e-6 * first["kl"] / (3 * 16 * 16)
    assert first["perceptual"] > 0 and first["loss"] == pytest.approx(told, rel=1e-5)
    assert not any("features" in name for name in AutoencoderKL.from_pretrained(run.model).state_dict())
