"""What the two stages that learn from captioned pictures share: their pictures, their rate, their checkpoints."""

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training import mirror, zero
from training.config import PicturesConfig
from training.copies import locked
from training.data.captions import Captioned, read_captioned
from training.data.pictures import Pictures, write_pictures
from training.data.records import DataError
from training.data.split import held_out, normalised, split
from training.ema import Ema
from training.run import Run, StageError, folder_atomic

FEW = 10  # held-out captions; with fewer, pictures are held out


def prepare_pictures(config: PicturesConfig, run: Run, multiple: int) -> None:
    """Leaves the training and the held-out pictures, decoded and fitted, in train/ and val/ of the stage's folder.

    `multiple` is what sides must be divisible by. No held-out picture is one that the training side has too. Raises
    DataError where nothing is left to learn from, or to measure on.
    """
    train, val = run.folder / "train", run.folder / "val"
    training, validating = captioned_sides(config, run)
    name = f"{run.stage}.images"
    bad: list[str] = []
    if not train.exists():
        bad += write_pictures(training, config.resolution, multiple, train, f"{name}, to learn from")
    if not val.exists():
        seen = frozenset(Pictures(train).hashes)
        bad += write_pictures(validating, config.resolution, multiple, val, f"{name}, held out", seen)
    if bad:
        run.note(f"{len(bad)} pictures cannot be decoded and were skipped, the first: {bad[0]}")
    run.note(f"{len(Pictures(train))} pictures to learn from, {len(Pictures(val))} held out")


def captioned_sides(config: PicturesConfig, run: Run) -> tuple[list[Captioned], list[Captioned]]:
    """(training side, held-out side), the same for both stages.

    Splits by caption. With few distinct captions (class labels), splitting by caption would remove whole classes from
    training, so it splits by picture. Raises DataError where a record is wrong, or a side is left empty.
    """
    records = read_captioned(config.images)
    captions = len({normalised(record.caption) for record in records})
    if captions * run.val_fraction < FEW and len(records) >= 2 * captions:
        training, validating = _split_pictures(records, run)
    else:
        training, validating = split(records, run.seed, run.val_fraction)
    if not training or not validating:
        raise DataError(
            f"{run.stage}.images: {len(training)} pictures to learn from and {len(validating)} held out are too few; "
            f"give more, or another val_fraction than {run.val_fraction}"
        )
    return training, validating


def _split_pictures(records: Sequence[Captioned], run: Run) -> tuple[list[Captioned], list[Captioned]]:
    """Those with an `id` by that, others by where they stand."""
    sides: tuple[list[Captioned], list[Captioned]] = ([], [])
    for number, record in enumerate(records):
        own = record.key if record.key != normalised(record.caption) else f"{record.key}\0{number}"
        sides[held_out(own, run.seed, run.val_fraction)].append(record)
    return sides


def norm_groups(channels: Sequence[int]) -> int:
    """Groups of every group norm: at least four channels each where that divides, as Stable Diffusion has it.

    With one channel a group, a norm takes each channel's mean over the picture away: which colour a field has, most of
    all. An autoencoder of 32 channels in 32 groups gave brown for red, blue and green.
    """
    return max(1, min(32, math.gcd(*channels) // 4))


def cached(run: Run, kind: str, parts: list[str], write: Callable[[Path], None]) -> str:
    """A folder that every run beside this one finds again: what `write` made of `parts`, which identify its content.

    Returns its name, for `fetched`.
    """
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    name = f".cache/{kind}/{digest}"
    folder = run.root.parent / name
    with locked(folder.with_name(f"{digest}.making")):  # by one of the runs that want it
        if not mirror.pull_shared(run, folder):
            with folder_atomic(folder) as temporary:
                write(temporary)
        mirror.push_shared(run, folder)  # also what another run has left here that could not be sent
    return name


def fetched(run: Run, name: str) -> Path:
    """Where a folder that is `cached` lies on this worker's disk."""
    folder = run.root.parent / name
    if not mirror.pull_shared(run, folder):
        raise StageError(
            f"{run.stage}: {name} is gone from {run.store or run.root.parent}; give the same command again"
        )
    return folder


def as_pixels(pictures: np.ndarray, device: torch.device) -> Tensor:
    """[B, H, W, 3] uint8 to [B, 3, H, W] in -1..1."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def as_pictures(pixels: Tensor) -> np.ndarray:
    """The way back: [B, 3, H, W], what is beyond -1..1 cut off, to [B, H, W, 3] uint8."""
    return ((pixels.float() + 1.0) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


# ---- checkpoints with an average


def save(engine: Any, ema: Ema, run: Run, step: int) -> None:
    """All ranks call it."""
    zero.save(engine, run, step, lambda folder: ema.save(folder, run.rank))


def resume(engine: Any, ema: Ema, run: Run) -> int:
    """Loads the newest checkpoint, averages included; returns the optimiser step to go on from, 0 where there is none.

    All ranks call it.
    """
    start = zero.resume(engine, run)
    if latest := run.latest_checkpoint():
        ema.load(latest[1], 0 if zero.is_resized(run) else run.rank)  # up to ZeRO-2 every rank has all averages
    return start
