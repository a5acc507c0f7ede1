"""The exponential moving average (EMA) of a model's weights: what a diffusion model draws with, and is exported as."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.diffusion_math import ema_decay_at


class Ema:
    """The averages of the trained parameters; a rank averages what it holds: its shards under ZeRO-3, else all.

    mean ← d · mean + (1 - d) · weights, with d = ema_decay_at(step, decay).
    """

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        """`module`: DeepSpeed's, once it has sharded the parameters; its weights are the first averages."""
        self._decay = decay
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._live = {name: _held(p) for name, p in trained.items()}
        self._sharded: list[Any] = [p for p in trained.values() if hasattr(p, "ds_id")]
        self._mean = {name: tensor.detach().clone() for name, tensor in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes the weights after optimiser step `step`, counted from 0, into the averages."""
        decay = ema_decay_at(step, self._decay)
        for name, tensor in self._live.items():
            self._mean[name].lerp_(tensor.to(self._mean[name].dtype), 1.0 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the model has the averages for weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def save(self, folder: Path, rank: int) -> None:
        """Leaves `ema-RANK.pt` in `folder`."""
        torch.save(self._mean, folder / f"ema-{rank}.pt")

    def load(self, folder: Path, rank: int) -> None:
        """Takes the averages that `save` left for that rank. Raises FileNotFoundError where there are none."""
        saved = torch.load(folder / f"ema-{rank}.pt", weights_only=True)
        for name, tensor in self._mean.items():
            tensor.copy_(saved[name])

    @torch.no_grad()
    def _swap(self) -> None:
        for name, tensor in self._live.items():
            weights = tensor.detach().clone()
            tensor.copy_(self._mean[name])
            self._mean[name].copy_(weights)
        if self._sharded:  # ZeRO-3 keeps small ones whole beside their shards: they are to be gathered anew
            self._sharded[0].partition(self._sharded)


def _held(parameter: Any) -> Tensor:
    """What this rank has of a parameter."""
    return getattr(parameter, "ds_tensor", parameter)
