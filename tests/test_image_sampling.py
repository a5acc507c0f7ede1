"""Drawing: bit for bit what diffusers' pipelines draw, and the same whatever else is in the batch."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from image_world import SIZE, TOKENS, tiny_folder, tiny_pipeline, tiny_scheduler
from PIL import Image
from transformers import BertModel

from serving.image.api import ImageParams, ImageRequest
from serving.image.components import Components, load_components
from serving.image.sampling import Drawing, check, draw, guide, scheduler_for

PREDICTIONS = ("epsilon", "v_prediction", "flow")
SAMPLERS = (None, "ddim", "dpm++", "euler")
PARAMS = ImageParams(SIZE, SIZE, num_inference_steps=4, guidance_scale=3.0)
PLAIN = replace(PARAMS, guidance_scale=1.0)
CLASSES = {
    "ddim": diffusers.DDIMScheduler, "dpm++": diffusers.DPMSolverMultistepScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
}  # fmt: skip
_GRADIENT = np.add.outer(np.arange(SIZE), 2 * np.arange(SIZE))
IMAGE = np.stack([_GRADIENT, _GRADIENT * 2, 255 - _GRADIENT], -1).astype(np.uint8)
MASK = np.zeros((SIZE, SIZE), np.uint8)
MASK[5:19, 8:27] = 255
MASK[0, :4] = (127, 127, 128, 128)  # the border between kept and redrawn


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def pipeline(family: str = "sd", prediction: str = "epsilon", pixels: bool = False, encoder: str = "clip") -> Any:
    return tiny_pipeline(family, prediction, pixels, encoder)  # type: ignore[arg-type]


def components(pipe: Any) -> Components:
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer")}
    return Components(getattr(pipe, "unet", None) or pipe.transformer, **parts, scheduler=copy.deepcopy(pipe.scheduler))


def request(params: ImageParams = PARAMS, *seeds: int, **fields: Any) -> ImageRequest:
    fields = {"prompt": "a red apple", "negative_prompt": "blue Ink"} | fields
    return ImageRequest(params=params, seeds=seeds or (7,), **fields)


def edit(params: ImageParams, *seeds: int, mask: np.ndarray | None = None, **fields: Any) -> ImageRequest:
    return request(params, *seeds, image=IMAGE, mask=mask, **fields)


def theirs(pipe: Any, wanted: ImageRequest, output: str = "latent") -> Any:
    """What diffusers draws: latents, or images with output="pil"."""
    params = wanted.params
    options: dict[str, Any] = {
        "prompt": wanted.prompt, "negative_prompt": wanted.negative_prompt, "guidance_scale": params.guidance_scale,
        "num_inference_steps": params.num_inference_steps, "num_images_per_prompt": len(wanted.seeds),
        "generator": [torch.Generator("cpu").manual_seed(seed) for seed in wanted.seeds], "output_type": output,
    }  # fmt: skip
    given = copy.deepcopy(pipe.scheduler)
    if params.sampler is not None:
        given = another(given, params.sampler)
    if isinstance(pipe, StableDiffusionPipeline):
        kinds = (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline)
        kind = kinds[(wanted.image is not None) + (wanted.mask is not None)]
        pipe = kind(**pipe.components, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
    else:
        options |= {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": TOKENS}
        pipe = copy.copy(pipe)
    pipe.scheduler = given
    if wanted.image is not None:
        options |= {"image": Image.fromarray(wanted.image), "strength": params.strength}
    if wanted.mask is not None:
        options |= {"mask_image": Image.fromarray(wanted.mask)}
    if wanted.image is None or wanted.mask is not None:
        options |= {"width": params.width, "height": params.height}
    images = pipe(**options).images
    return images if output == "latent" else [np.array(image) for image in images]


def another(scheduler: Any, sampler: str) -> Any:
    if scheduler.config.prediction_type == "flow_prediction":
        return CLASSES["dpm++"].from_config(scheduler.config, solver_order=2 if sampler == "dpm++" else 1)
    return CLASSES[sampler].from_config(scheduler.config)


def run(parts: Components, *requests: ImageRequest) -> Drawing:
    drawing = Drawing(parts, [(wanted, seed) for wanted in requests for seed in wanted.seeds])
    while drawing.step < drawing.total:
        drawing.advance()
    return drawing


def assert_same_as_theirs(pipe: Any, wanted: ImageRequest) -> None:
    """The latents to the last bit, and the images."""
    drawing = run(components(pipe), wanted)
    assert torch.equal(drawing._latents, theirs(pipe, wanted))
    images = drawing.images(range(len(wanted.seeds)))
    for image, want in zip(images, theirs(pipe, wanted, "pil"), strict=True):
        assert image.dtype == np.uint8 and np.array_equal(image, want)
        assert image.std() > 10  # a picture, of which something could be wrong


def assert_close(images: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    """One level of 255 at most: sums of floats are rounded otherwise in batches of another size."""
    for image, want in zip(images, wanted, strict=True):
        assert np.abs(image.astype(int) - want.astype(int)).max() <= 1


@pytest.mark.parametrize("params", [PARAMS, PLAIN], ids=["guided", "plain"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_prompt_is_drawn_as_diffusers_draws_it(prediction: str, sampler: Any, params: ImageParams) -> None:
    assert_same_as_theirs(pipeline("sd", prediction), request(replace(params, sampler=sampler)))


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_an_edit_is_drawn_as_diffusers_draws_it(prediction: str, sampler: Any, strength: float) -> None:
    params = replace(PARAMS, num_inference_steps=5, sampler=sampler, strength=strength)
    assert_same_as_theirs(pipeline("sd", prediction), edit(params))
    assert_same_as_theirs(pipeline("sd", prediction), edit(params, mask=MASK))


@pytest.mark.parametrize("params", [PARAMS, PLAIN], ids=["guided", "plain"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_pixart_is_drawn_as_diffusers_draws_it(prediction: str, sampler: Any, params: ImageParams) -> None:
    assert_same_as_theirs(pipeline("pixart", prediction), request(replace(params, sampler=sampler)))


def test_edits_without_guidance_are_as_theirs() -> None:
    params = replace(PLAIN, strength=0.5)
    assert_same_as_theirs(pipeline(), edit(params))
    assert_same_as_theirs(pipeline(), edit(params, mask=MASK))


def test_other_sizes_and_several_seeds_are_as_theirs() -> None:
    params = replace(PARAMS, width=48, height=16)
    assert_same_as_theirs(pipeline(), request(params, 1, 2))
    assert_same_as_theirs(pipeline(), edit(PARAMS, 1, 2))
    assert_same_as_theirs(pipeline("pixart"), request(params, 1, 2))


def test_a_frozen_bert_sees_no_padding() -> None:
    pipe = pipeline(encoder="bert")
    assert isinstance(pipe.text_encoder, BertModel)
    assert_same_as_theirs(pipe, request())


def test_pixels_are_drawn_as_latents_are() -> None:
    pipe = pipeline("sd", "flow", True)
    assert_same_as_theirs(pipe, request())
    assert_same_as_theirs(pipe, edit(replace(PARAMS, strength=0.5)))


@pytest.mark.parametrize("family", ["sd", "pixart"])
def test_a_single_step_is_as_theirs(family: str) -> None:
    for sampler in ("ddim", "euler"):
        assert_same_as_theirs(pipeline(family), request(replace(PARAMS, num_inference_steps=1, sampler=sampler)))


def test_pixart_is_told_its_size_where_it_was_made_for_1024_pixels() -> None:
    pipe = copy.copy(pipeline("pixart"))
    config = {**pipe.transformer.config, "sample_size": 128, "attention_head_dim": 12, "cross_attention_dim": 24}
    torch.manual_seed(1)
    pipe.register_modules(transformer=diffusers.PixArtTransformer2DModel.from_config(config).eval())
    assert pipe.transformer.adaln_single.emb.use_additional_conditions
    assert_same_as_theirs(pipe, request(replace(PARAMS, width=48)))


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),  # Stable Diffusion 1's own
    "ddpm": ("DDPMScheduler", {}),
    "ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "singlestep": ("DPMSolverSinglestepScheduler", {}),
    "sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++3": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
}


def with_scheduler(name: str) -> Any:
    kind, options = OTHERS[name]
    pipe = copy.copy(pipeline())
    pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config, **options)
    return pipe


@pytest.mark.parametrize("name", OTHERS)
def test_a_folders_scheduler_may_be_another(name: str) -> None:
    pipe = with_scheduler(name)
    assert_same_as_theirs(pipe, request(replace(PARAMS, num_inference_steps=5)))
    params = replace(PARAMS, num_inference_steps=5, strength=0.8)
    assert_same_as_theirs(pipe, edit(params))
    assert_same_as_theirs(pipe, edit(params, mask=MASK))


def test_steps_of_equal_timesteps_begin_where_theirs_do() -> None:
    """Timesteps are whole numbers: a schedule that is dense somewhere has some of them twice."""
    kind = diffusers.DPMSolverMultistepScheduler
    pixart, pipe = copy.copy(pipeline("pixart")), copy.copy(pipeline())
    many = request(replace(PARAMS, num_inference_steps=20))
    pixart.scheduler = pipe.scheduler = kind.from_config(tiny_scheduler("flow").config, flow_shift=100.0)
    assert_same_as_theirs(pixart, many)
    with pytest.raises(IndexError):  # it begins at the second, and runs over the end
        theirs(pipe, many)
    assert run(components(pipe), many).step == 20
    pipe.scheduler = kind.from_config(tiny_scheduler("epsilon").config, use_karras_sigmas=True)
    params = replace(PARAMS, num_inference_steps=40, strength=0.1)
    assert_same_as_theirs(pipe, edit(params))
    assert_same_as_theirs(pipe, edit(params, mask=MASK))


def test_a_loaded_folder_is_drawn_as_diffusers_loads_it(tmp_path: Path) -> None:
    """Its scheduler's config is outdated: StableDiffusionPipeline clips nothing, and begins at step 1."""
    pipe = tiny_pipeline()
    pipe.scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=True, steps_offset=0)
    pipe.save_pretrained(tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    for sampler in SAMPLERS:
        wanted = request(replace(PARAMS, sampler=sampler))  # type: ignore[arg-type]
        assert torch.equal(run(load_components(tmp_path), wanted)._latents, theirs(loaded, wanted))


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_steps_of_rectified_flow_are_eulers(sampler: Any) -> None:
    ours = scheduler_for(components(pipeline("sd", "flow")), sampler)
    ours.set_timesteps(6)
    euler = diffusers.FlowMatchEulerDiscreteScheduler()
    euler.set_timesteps(sigmas=ours.sigmas[:-1].tolist())
    generator = torch.Generator().manual_seed(0)
    mine = want = torch.randn(2, 4, 3, 3, generator=generator)
    for t, t_euler in zip(ours.timesteps, euler.timesteps, strict=True):
        velocity = torch.randn(2, 4, 3, 3, generator=generator)
        mine = ours.step(velocity, t, mine, return_dict=False)[0]
        want = euler.step(velocity, t_euler, want, return_dict=False)[0]
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-4)


def test_guidance_goes_on_from_uncond_past_cond() -> None:
    output = torch.tensor([[1.0, 2.0], [3.0, 1.0]])
    assert guide(output, 2.0).tolist() == [[5.0, 0.0]]
    assert guide(output, 1.0).tolist() == [[3.0, 1.0]]


def many(params: ImageParams, **fields: Any) -> list[ImageRequest]:
    """Three requests that differ in all that they may differ in."""
    return [
        request(params, 1, 2, **fields),
        request(params, 3, prompt="a cat", negative_prompt="", **fields),
        request(params, 2, 4, prompt="The sea!", **fields),
    ]


@pytest.mark.parametrize("fields", [{}, {"image": IMAGE}, {"image": IMAGE, "mask": MASK}], ids=["new", "edit", "mask"])
@pytest.mark.parametrize("family", ["sd", "pixart"])
def test_a_request_alone_and_in_a_batch_is_the_same(family: str, fields: dict[str, Any]) -> None:
    parts = components(pipeline(family))
    requests = many(replace(PARAMS, sampler="dpm++", strength=0.8), **fields)
    together = draw(parts, requests)
    for wanted, images in zip(requests, together, strict=True):
        assert_close(images, draw(parts, [wanted])[0])
        for seed, image in zip(wanted.seeds, images, strict=True):
            assert_close([image], draw(parts, [replace(wanted, seeds=(seed,))])[0])
    different = [image for images in together for image in images]
    for i, image in enumerate(different):
        assert all(np.abs(image.astype(int) - other).mean() > 2 for other in different[:i])


def test_each_edits_its_own_image() -> None:
    parts, params = components(pipeline()), replace(PARAMS, strength=0.5)
    others = (IMAGE[::-1].copy(), MASK[:, ::-1].copy())
    requests = [edit(params, mask=MASK), request(params, image=others[0], mask=others[1])]
    together = draw(parts, requests)
    for wanted, images in zip(requests, together, strict=True):
        assert_close(images, draw(parts, [wanted])[0])
    assert np.abs(together[0][0].astype(int) - together[1][0]).mean() > 2


def test_what_a_mask_keeps_of_pixels_stays_as_it_is() -> None:
    parts = components(pipeline("sd", "flow", True))
    ((image,),) = draw(parts, [edit(replace(PARAMS, strength=0.7), mask=MASK)])
    kept = MASK < 128
    assert np.array_equal(image[kept], IMAGE[kept])
    assert np.abs(image[~kept].astype(int) - IMAGE[~kept]).mean() > 2


@pytest.mark.parametrize("name", ["dpm++", "euler", *OTHERS])
def test_rows_that_leave_change_nothing_for_those_that_stay(name: str) -> None:
    """Multistep schedulers remember the steps before; stochastic ones draw at every step."""
    sampler: Any = name if name in CLASSES else None
    parts = components(pipeline() if sampler else with_scheduler(name))
    requests = many(replace(PARAMS, num_inference_steps=8, sampler=sampler))
    rows = [(wanted, seed) for wanted in requests for seed in wanted.seeds]
    drawing = Drawing(parts, rows)
    leaving = {3: [4, 0, 2], 4: [0, 2]}  # after a step: what stays, in places of what was there
    while drawing.step < drawing.total:
        drawing.advance()
        if drawing.step in leaving:
            drawing.keep(leaving[drawing.step])
    for (wanted, seed), image in zip([rows[4], rows[2]], drawing.images([0, 1]), strict=True):
        assert_close([image], draw(parts, [replace(wanted, seeds=(seed,))])[0])


def test_rows_that_leave_take_what_their_mask_keeps() -> None:
    parts, params = components(pipeline()), replace(PARAMS, num_inference_steps=5, sampler="dpm++")
    gone = request(params, 1, image=IMAGE[::-1].copy(), mask=MASK[::-1].copy())
    stays = edit(params, 2, mask=MASK)
    drawing = Drawing(parts, [(gone, 1), (stays, 2)])
    drawing.advance()
    drawing.advance()
    drawing.keep([1])
    while drawing.step < drawing.total:
        drawing.advance()
    assert_close(drawing.images([0]), draw(parts, [stays])[0])


@pytest.mark.parametrize("sampler", ["dpm++", "euler"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_previews_are_what_the_image_is_expected_to_become(prediction: str, sampler: Any) -> None:
    drawing = Drawing(components(pipeline("sd", prediction)), [(request(replace(PARAMS, sampler=sampler)), 7)])
    drawing.advance()
    first, so_far = drawing.previews([0])[0], drawing.images([0])[0]
    while drawing.step < drawing.total:
        drawing.advance()
    ((last,), (image,)) = drawing.previews([0]), drawing.images([0])
    assert_close([last], [image])
    assert np.abs(first.astype(int) - so_far).mean() > 2 and first.shape == image.shape


def test_steps_are_told() -> None:
    told: list[tuple[int, int]] = []
    draw(components(pipeline()), [request()], lambda *step: told.append(step))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_denoiser_in_bf16_draws_nearly_the_same(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, prediction="v_prediction")
    parts = load_components(folder, torch.bfloat16)
    assert parts.dtype == torch.bfloat16 and parts.vae.dtype == parts.text_encoder.dtype == torch.float32
    drawing = run(parts, request())
    assert drawing._latents.dtype == torch.float32
    ((want,),) = draw(load_components(folder), [request()])
    difference = np.abs(drawing.images([0])[0].astype(int) - want)
    assert 0 < difference.mean() < 8


@pytest.mark.parametrize(
    ("params", "text"),
    [
        (replace(PARAMS, width=30), "width=30 must be a multiple of 4"),
        (replace(PARAMS, height=34), "height=34 must be a multiple of 4"),
        (replace(PARAMS, num_inference_steps=1000), "num_inference_steps=1000 must be below"),
    ],
)
def test_what_the_model_cannot_draw_names_the_field(params: ImageParams, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check(components(pipeline()), request(params))
    with pytest.raises(ValueError, match=text):
        draw(components(pipeline()), [request(params)])


def test_an_edit_runs_at_least_one_step() -> None:
    weak = replace(PARAMS, strength=0.2)
    with pytest.raises(ValueError, match=r"strength=0\.2 must be at least 1 / num_inference_steps = 0\.25"):
        check(components(pipeline()), edit(weak))
    check(components(pipeline()), edit(replace(weak, strength=0.25)))
    check(components(pipeline()), request(weak))


def test_requests_of_different_kinds_are_not_drawn_together() -> None:
    for other in (request(PLAIN), edit(PARAMS), edit(PARAMS, mask=MASK)):
        with pytest.raises(ValueError, match="equal params"):
            draw(components(pipeline()), [request(), other])


def test_the_components_scheduler_is_never_stepped() -> None:
    parts = components(pipeline("sd", "flow"))
    before = copy.deepcopy(vars(parts.scheduler))
    draw(parts, [request()])
    assert all(torch.equal(v, before[k]) for k, v in vars(parts.scheduler).items() if isinstance(v, torch.Tensor))
    assert parts.scheduler.model_outputs == tiny_scheduler("flow").model_outputs
