"""What a denoiser learns from: pictures as latents, captions as tokens or as the states of a text encoder.

The first worker makes it (`prepare_data`), all read it (`Data`). Latents, and the states of a text encoder that is not
trained along, are found again by every run beside this one; the stage's folder `encoded` says where they are:

    encoded/index.json     latents' shape, and for each side the folders of its latents and its states
    encoded/SIDE-ids.npy   int32 [captions, T], the empty caption first; SIDE-mask.npy int8, alike
"""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from serving.image.components import Components
from serving.image.encoding import encode
from training.config import ImageConfig
from training.data.pictures import Pictures
from training.device import tokenizing_on_all_cores
from training.picture_stage import as_pixels, cached, fetched
from training.run import Run, folder_atomic

SIDES = ("train", "val")


def captions_are_cached(config: ImageConfig) -> bool:
    """Whether the text encoder stays as it is, so that its states are known once and for all."""
    return bool(config.model or config.text_encoder)


def prepare_data(config: ImageConfig, run: Run, parts: Components) -> None:
    """Encodes the pictures and captions of both sides where nothing has yet, and leaves `encoded`.

    `parts` are on the device that is to do it.
    """
    vae = digest_of(parts.vae)
    text_encoder = digest_of(parts.text_encoder) if captions_are_cached(config) else None
    index: dict[str, Any] = {"latent_channels": parts.latent_channels, "scale_factor": parts.scale_factor}
    tokens: dict[str, np.ndarray] = {}
    for side in SIDES:
        pictures = Pictures(run.folder / side)
        captions = _captions(pictures)
        with tokenizing_on_all_cores():
            ids, mask = _tokens(parts, captions)
            if side == "train":
                _note_cuts(parts, captions, run)
        tokens |= {f"{side}-ids": ids, f"{side}-mask": mask}
        index[side] = {"tokens": hashlib.sha256(ids.tobytes() + mask.tobytes()).hexdigest()}
        index[side]["latents"] = _latents(run, pictures, parts, vae)
        if text_encoder:
            key = [text_encoder, str(parts.is_unet), index[side]["tokens"]]
            index[side]["states"] = _states(run, captions, parts, key)
    folder = run.folder / "encoded"
    if not folder.exists() or _index(run) != index:
        with folder_atomic(folder) as temporary:
            for name, array in tokens.items():
                np.save(temporary / f"{name}.npy", array)
            (temporary / "index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


class Data:
    """One side's pictures as latents, and their captions as the text encoder's states or as its tokens."""

    def __init__(self, run: Run, side: str) -> None:
        index = _index(run)
        self.pictures = Pictures(run.folder / side)
        self._shapes = [
            (index["latent_channels"], height // index["scale_factor"], width // index["scale_factor"])
            for width, height in self.pictures.sizes
        ]
        self._ends = np.cumsum([math.prod(shape) for shape in self._shapes])
        self._latents = np.load(fetched(run, index[side]["latents"]) / "latents.npy", mmap_mode="r")
        self._row = {caption: row for row, caption in enumerate(_captions(self.pictures))}
        self._ids, self._mask = (
            np.load(run.folder / "encoded" / f"{side}-{name}.npy", mmap_mode="r") for name in ("ids", "mask")
        )
        self._states = None
        if states := index[side].get("states"):
            self._states = np.load(fetched(run, states) / "states.npy", mmap_mode="r")

    def latents(self, indices: Sequence[int]) -> Tensor:
        """Of pictures of one shape: [B, C, h, w], scaled to unit variance."""
        rows = [
            self._latents[self._ends[i] - math.prod(self._shapes[i]) : self._ends[i]].reshape(self._shapes[i])
            for i in indices
        ]
        return torch.from_numpy(np.stack(rows).astype(np.float32))

    def captions(self, indices: Sequence[int], dropped: Sequence[bool]) -> dict[str, Tensor]:
        """What the denoiser is given: `mask` [B, T], and `states` [B, T, D] or `input_ids` [B, T].

        Those of the pictures' captions; where `dropped`, those of the empty caption (classifier-free guidance, Ho &
        Salimans 2022).
        """
        rows = [0 if drop else self._row[self.pictures.captions[i]] for i, drop in zip(indices, dropped, strict=True)]
        given = {"mask": torch.from_numpy(self._mask[rows].astype(np.int64))}
        if self._states is None:
            return given | {"input_ids": torch.from_numpy(self._ids[rows].astype(np.int64))}
        return given | {"states": torch.from_numpy(self._states[rows].astype(np.float32))}


def digest_of(module: Any) -> str:
    """SHA-256 of a model's weights and settings."""
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    settings = {name: value for name, value in config.items() if not name.startswith("_")}  # not where it was loaded
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _index(run: Run) -> dict[str, Any]:
    return json.loads((run.folder / "encoded" / "index.json").read_text("utf-8"))


def _captions(pictures: Pictures) -> list[str]:
    """The empty one, and the different ones of the pictures."""
    return ["", *dict.fromkeys(pictures.captions)]


# ---- captions


def _tokens(parts: Components, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask [captions, T], as serving.image.encoding makes them of a prompt."""
    texts = list(captions) if parts.is_unet else [caption.lower().strip() for caption in captions]
    tokens = parts.tokenizer(
        texts, padding="max_length", max_length=parts.prompt_tokens, truncation=True, return_tensors="np"
    )
    return tokens.input_ids.astype(np.int32), tokens.attention_mask.astype(np.int8)


def _note_cuts(parts: Components, captions: Sequence[str], run: Run) -> None:
    limit = parts.prompt_tokens
    if cut := sum(len(ids) > limit for ids in parts.tokenizer(list(captions)).input_ids):
        run.note(f"{cut} of {len(captions) - 1} captions are cut to {limit} tokens")


def _states(run: Run, captions: Sequence[str], parts: Components, key: list[str]) -> str:
    """The folder with the text encoder's states."""
    return cached(run, "captions", key, lambda folder: _write_states(captions, parts, folder))


@torch.inference_mode()
def _write_states(captions: Sequence[str], parts: Components, folder: Path) -> None:
    """The text encoder's states of every caption, as whoever draws will have them; 16 bits."""
    states = None
    for row, caption in enumerate(captions):
        (encoded,) = encode(parts, [caption]).states.half().cpu().numpy()
        if states is None:
            states = _array(folder / "states.npy", (len(captions), *encoded.shape))
        states[row] = encoded
    assert states is not None, "no caption at all is one"
    states.flush()


# ---- pictures


def _latents(run: Run, pictures: Pictures, parts: Components, vae: str) -> str:
    """The folder with the latents of the autoencoder that has the digest `vae`."""
    return cached(run, "latents", [vae, *pictures.hashes], lambda folder: _write_latents(pictures, parts, folder))


@torch.inference_mode()
def _write_latents(pictures: Pictures, parts: Components, folder: Path) -> None:
    """Every picture's posterior mean times the scaling factor, one after the other in 16 bits."""
    area = sum(width * height for width, height in pictures.sizes)
    flat = _array(folder / "latents.npy", (area // parts.scale_factor**2 * parts.latent_channels,))
    end = 0
    for index in range(len(pictures)):
        pixels = as_pixels(pictures.batch(np.array([index])), parts.vae.device)
        latents = parts.vae.encode(pixels).latent_dist.mode() * parts.vae.config.scaling_factor
        begin, end = end, end + latents.numel()
        flat[begin:end] = latents.flatten().half().cpu().numpy()
    assert end == len(flat)
    flat.flush()


def _array(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """A new .npy file in 16 bits, which may be larger than memory."""
    return np.lib.format.open_memmap(path, "w+", np.float16, shape)
