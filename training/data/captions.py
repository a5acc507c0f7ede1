"""Captioned pictures: what a picture shows in words, and the picture, read when it is needed.

    pictures/metadata.jsonl, or pictures/     {"file_name": "0001.png", "text": "a red apple"} (HF imagefolder)
    *.parquet                                 image: {"bytes": …, "path": …} or bytes, and the caption
    *.tar                                     WebDataset: 0001.jpg with 0001.txt, or 0001.json that has the caption
    *.npz                                     `images` uint8 [N, height, width, 3]; N lines in a .jsonl of the same stem
    hub:owner/name[/subset][:split]           a column `image`, and the caption
    sample:openmoji                           pictograms out of an installed package (samples.py)

The caption is the field `caption`, `text` or `caption_en`, the first of them that there is. `id` works as in chats:
records with the same id fall on the same side of the split; without one, those with the same caption do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from training.data.records import Fields, plain
from training.data.sources import read_placed, record_key
from training.data.split import normalised

CAPTIONS = ("caption", "text", "caption_en")

Picture: TypeAlias = "bytes | np.ndarray"  # a file's content, or pixels uint8 [height, width, 3]


@dataclass(frozen=True)
class Captioned:
    """A picture and what it shows: Unicode NFC, white space as single spaces."""

    caption: str
    key: str
    where: str  # for messages: the picture's file, or FILE:LINE, TAR:MEMBER, sample:NAME:NUMBER
    read: Callable[[], Picture] = field(repr=False)  # raises ValueError or OSError that say why there is none

    @property
    def identity(self) -> str:
        return self.caption


def read_captioned(sources: Sequence[str]) -> list[Captioned]:
    """Every record, its picture not yet looked at. Raises DataError pointing to the first that is wrong."""
    return list(read_placed(sources, lambda where, fields: [_parse(where, fields)]))


def _parse(where: str, fields: Fields) -> Captioned:
    caption = _caption(fields)
    key = record_key(fields, normalised(caption))
    if (name := fields.get("file_name")) is None:
        return Captioned(caption, key, where, partial(_picture, _image(fields)))
    if not isinstance(name, str) or not name:
        raise ValueError(f"file_name: must be a file's path from where the record stands, not {name!r}")
    path = Path(where.rpartition(":")[0]).parent / name
    return Captioned(caption, key, str(path), partial(_file, path))


def _caption(fields: Fields) -> str:
    name = next((name for name in CAPTIONS if fields.get(name) is not None), None)
    if name is None:
        raise ValueError(f"caption: is missing; there are {', '.join(fields) or 'no fields'}")
    if not isinstance(fields[name], str):
        raise ValueError(f"{name}: must be a text, not {fields[name]!r}")
    caption = plain(fields[name])
    if not caption:
        raise ValueError(f"{name}: is empty")
    return caption


def _image(fields: Fields) -> Any:
    """The record's `image`: a picture, {"bytes", "path"}, or what gives one of them when called."""
    image = fields.get("image")
    if image is None:
        raise ValueError("image: is missing; a picture's file is named by file_name")
    if not (callable(image) or isinstance(image, bytes | dict | np.ndarray)):
        raise ValueError(f"image: must be a picture's bytes, not {image!r}; a picture's file is named by file_name")
    return image


def _picture(image: Any) -> Picture:
    """What a record's `image` stands for."""
    found = image() if callable(image) else image
    if isinstance(found, dict):
        if found.get("bytes") is None and found.get("path"):
            return _file(Path(found["path"]))
        found = found.get("bytes")
    if not isinstance(found, bytes | np.ndarray):
        raise ValueError(f"image: must be a picture's bytes, not {type(found).__name__}")
    return found


def _file(path: Path) -> bytes:
    return path.read_bytes()
