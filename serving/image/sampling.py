"""A batch's way from noise to images, bit for bit that of diffusers' own pipelines for one request in float32.

Those are StableDiffusionPipeline and its Img2Img and Inpaint for unets of as many channels as latents, and
PixArtAlphaPipeline without resolution bins and cleaning of captions. What differs on purpose: every image has a
generator of its own, in inpainting too, so that it is the same whatever else is drawn beside it (up to the rounding of
float sums, which depends on a batch's size). PixArt, and models of pixels, can edit as Stable Diffusion does.
"""

import inspect
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from serving.image.api import ImageRequest
from serving.image.batching import kind_of
from serving.image.components import Components
from serving.image.editing import start
from serving.image.encoding import Encoded, encode
from serving.image.schedulers import edit_steps, estimate, keep_rows, scheduler_for, set_timesteps

__all__ = ["Drawing", "check", "draw", "guide", "scheduler_for"]


def guide(output: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022), of predictions [2 · rows, ...] without and with the prompt."""
    uncond, cond = output.chunk(2)
    return uncond + scale * (cond - uncond)


def micro_conditions(components: Components, latents: Tensor) -> dict[str, Tensor | None]:
    """The picture's size, which PixArt's models of 1024 pixels were told (Chen et al. 2023, section 2.4)."""
    if components.denoiser.config.sample_size != 128:
        return {"resolution": None, "aspect_ratio": None}
    height, width = (side * components.scale_factor for side in latents.shape[2:])
    return {
        "resolution": torch.tensor([height, width]).repeat(len(latents), 1).to(latents),
        "aspect_ratio": torch.tensor([float(height / width)]).repeat(len(latents), 1).to(latents),
    }


def check(components: Components, request: ImageRequest) -> None:
    """Raises ValueError naming the field of a request that these components cannot draw."""
    params, multiple = request.params, components.multiple
    for name, size in (("width", params.width), ("height", params.height)):
        if size % multiple:
            raise ValueError(f"{name}={size} must be a multiple of {multiple}")
    steps, trained = params.num_inference_steps, components.scheduler.config.num_train_timesteps
    if steps >= trained:
        raise ValueError(f"num_inference_steps={steps} must be below the {trained} steps that the model was trained by")
    if request.image is not None and not edit_steps(params):
        raise ValueError(f"strength={params.strength!r} must be at least 1 / num_inference_steps = {1 / steps:.3g}")


def draw(
    components: Components,
    requests: Sequence[ImageRequest],
    on_step: Callable[[int, int], None] | None = None,
) -> list[list[np.ndarray]]:
    """Each request's images, [height, width, 3] uint8, all in one batch; `on_step` is told (step, total).

    Raises ValueError for what `check` refuses, and where requests differ in params or in what they edit.
    """
    for request in requests:
        check(components, request)
    if len({kind_of(request) for request in requests}) > 1:
        raise ValueError("requests that are drawn together must have equal params, and all or none an image and a mask")
    drawing = Drawing(components, [(request, seed) for request in requests for seed in request.seeds])
    while drawing.step < drawing.total:
        drawing.advance()
        if on_step is not None:
            on_step(drawing.step, drawing.total)
    images, row = [], 0
    for request in requests:
        images.append(drawing.images(range(row, row + len(request.seeds))))
        row += len(request.seeds)
    return images


class Drawing:
    """A batch of images, [height, width, 3] uint8, that goes on by one step at a time; rows may leave between steps."""

    @torch.inference_mode()
    def __init__(self, components: Components, rows: Sequence[tuple[ImageRequest, int]]) -> None:
        """`rows` are an image's request and seed each; the requests are of one kind and `check` has passed them."""
        requests = [request for request, _ in rows]
        params = requests[0].params
        self._components = components
        self._guidance = params.guidance_scale if params.guidance_scale > 1.0 else None
        self._encoded = self._encode(requests)
        self._generators = [torch.Generator("cpu").manual_seed(seed) for _, seed in rows]
        self._scheduler = scheduler_for(components, params.sampler)
        self._timesteps = set_timesteps(components, self._scheduler, params, requests[0].image is not None)
        self._latents, self._kept = start(components, self._scheduler, self._timesteps, requests, self._generators)
        self._expected = self._latents
        self._draws = "generator" in inspect.signature(self._scheduler.step).parameters
        self._one_step = params.num_inference_steps == 1
        self.step, self.total = 0, len(self._timesteps)

    @torch.inference_mode()
    def advance(self) -> None:
        """One step of all rows."""
        timestep = self._timesteps[self.step]
        output = self._predict(timestep)
        drawn = {"generator": self._generators} if self._draws else {}
        stepped = self._scheduler.step(output, timestep, self._latents, **drawn, return_dict=False)
        # A PixArt that was distilled into one step tells its picture there, not what comes before it.
        final = self._one_step and not self._components.is_unet
        self._latents, self._expected = stepped[-1 if final else 0], estimate(self._scheduler, stepped)
        self.step += 1
        if self._kept is not None:
            after = self._timesteps[self.step] if self.step < self.total else None
            self._latents = self._kept.put_back(self._scheduler, self._latents, after)

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with these rows alone; they become what they would have become."""
        index = torch.tensor(rows, dtype=torch.long, device=self._latents.device)
        keep_rows(self._scheduler, self._latents.shape, index)
        both = index if self._guidance is None else torch.cat([index, index + len(self._latents)])
        self._encoded = self._encoded.keep(both)
        self._generators = [self._generators[row] for row in rows]
        self._latents, self._expected = self._latents[index], self._expected[index]
        if self._kept is not None:
            self._kept.keep(index)

    def images(self, rows: Sequence[int]) -> list[np.ndarray]:
        """What the rows are now."""
        return self._decode(self._latents[list(rows)])

    def previews(self, rows: Sequence[int]) -> list[np.ndarray]:
        """What the model expects the rows to become."""
        return self._decode(self._expected[list(rows)])

    def _encode(self, requests: Sequence[ImageRequest]) -> Encoded:
        """Of each row's prompt; with guidance after those of the negative prompts."""
        negative = [] if self._guidance is None else [request.negative_prompt for request in requests]
        encoded = encode(self._components, [*negative, *(request.prompt for request in requests)])
        return Encoded(encoded.states.to(self._components.dtype), encoded.mask)

    def _predict(self, timestep: Tensor) -> Tensor:
        """The denoiser's output for all rows, guided, in the latents' dtype."""
        latents = self._latents if self._guidance is None else torch.cat([self._latents] * 2)
        scaled = self._scheduler.scale_model_input(latents, timestep).to(self._components.dtype)
        run = self._run_unet if self._components.is_unet else self._run_transformer
        output = run(scaled, timestep).to(latents.dtype)
        if self._guidance is not None:
            output = guide(output, self._guidance)
        learned_variance = output.shape[1] // 2 == latents.shape[1]
        return output.chunk(2, dim=1)[0] if learned_variance else output

    def _run_unet(self, latents: Tensor, timestep: Tensor) -> Tensor:
        states = self._encoded.states
        return self._components.denoiser(latents, timestep, encoder_hidden_states=states, return_dict=False)[0]

    def _run_transformer(self, latents: Tensor, timestep: Tensor) -> Tensor:
        return self._components.denoiser(
            latents,
            encoder_hidden_states=self._encoded.states,
            encoder_attention_mask=self._encoded.mask,
            timestep=timestep[None].expand(len(latents)),
            added_cond_kwargs=micro_conditions(self._components, latents),
            return_dict=False,
        )[0]

    @torch.inference_mode()
    def _decode(self, latents: Tensor) -> list[np.ndarray]:
        vae = self._components.vae
        pixels = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        unit = (pixels * 0.5 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).float().numpy()
        return list((unit * 255).round().astype(np.uint8))
