"""Which steps go from noise to picture: diffusers' schedulers, set up as its pipelines do it."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

from serving.image.api import ImageParams, Sampler
from serving.image.components import Components

_CLASSES = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler, "euler": EulerDiscreteScheduler}


def scheduler_for(components: Components, sampler: Sampler | None) -> Any:
    """A scheduler of its own for one batch: the folder's, or the sampler's by the folder's config.

    For rectified flow DDIM and Euler's method are the same, and are the first order of DPM-Solver++.
    """
    own = copy.deepcopy(components.scheduler)
    if components.is_unet:
        _as_stable_diffusion(own)
    if sampler is None:
        return own
    if own.config.get("prediction_type") == "flow_prediction":
        order = {} if sampler == "dpm++" else {"solver_order": 1, "algorithm_type": "dpmsolver++"}
        return DPMSolverMultistepScheduler.from_config(own.config, **order)
    return _CLASSES[sampler].from_config(own.config)


def _as_stable_diffusion(scheduler: Any) -> None:
    """Sets what StableDiffusionPipeline sets, whatever a folder's config says."""
    if "steps_offset" in scheduler.config:
        scheduler.register_to_config(steps_offset=1)
    if scheduler.config.get("clip_sample"):
        scheduler.register_to_config(clip_sample=False)


def set_timesteps(components: Components, scheduler: Any, params: ImageParams, editing: bool) -> Tensor:
    """The timesteps to run, noisiest first; an edit begins at its strength's share of them from the end."""
    scheduler.set_timesteps(params.num_inference_steps, device=components.device)
    skipped = params.num_inference_steps - edit_steps(params) if editing else 0
    begin = skipped * scheduler.order
    # StableDiffusionPipeline lets a scheduler find the beginning by its timestep, and fails where that comes twice.
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    return scheduler.timesteps[begin:]


def edit_steps(params: ImageParams) -> int:
    """How many of the steps an edit runs; 0 where its strength is too small for one."""
    return int(params.num_inference_steps * params.strength)


def estimate(scheduler: Any, stepped: Sequence[Tensor]) -> Tensor:
    """The latents that the model expects at the end, from what a step returned; where it tells none, those so far."""
    if len(stepped) > 1:
        return stepped[1]
    predicts = str(scheduler.config.get("algorithm_type")).endswith("++")
    return scheduler.model_outputs[-1] if predicts else stepped[0]


def keep_rows(scheduler: Any, shape: torch.Size, rows: Tensor) -> None:
    """Takes all other rows out of what a scheduler remembers of steps before: all that has the latents' shape."""

    def kept(value: Any) -> Any:
        if isinstance(value, list):
            return [kept(each) for each in value]
        return value[rows] if isinstance(value, Tensor) and value.shape == shape else value

    for name, value in list(vars(scheduler).items()):
        setattr(scheduler, name, kept(value))
