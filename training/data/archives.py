"""Records that carry pictures: tars of a WebDataset, arrays, tables with a column of pictures, hub data sets.

A record's `image` is what gives the picture when it is called (bytes, or what else stands for it there), so that
captions are read and split without a hundred gigabytes of pictures in memory.
"""

import gzip
import json
import tarfile
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from training.data.records import DataError, Fields, Line, json_lines, open_file

_PICTURES = (".jpg", ".jpeg", ".png", ".webp")
_TEXTS = (".txt", ".json")
IMAGE = "image"  # the column of a table that holds pictures


# ---- tar: the members 0001.jpg, 0001.txt and 0001.json are one record


class _Bytes:
    """Stretches of a file; kept open, since a packed one is read from its start when it goes back."""

    def __init__(self, path: Path) -> None:
        self._file = open_file(path)

    def read(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(size)


def tar_rows(path: Path) -> Iterator[tuple[str, Fields]]:
    """A row for every picture, in the tar's order; the caption is its .txt, or a field of its .json."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                stem, kind = _stem_and_kind(member.name)
                if member.isreg() and kind in _PICTURES + _TEXTS:
                    samples.setdefault(stem, {})[kind] = member
    except (tarfile.TarError, EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: not a whole tar file: {error}") from None
    contents = _Bytes(path)
    for parts in samples.values():
        if kind := next((kind for kind in _PICTURES if kind in parts), ""):
            image = partial(contents.read, parts[kind].offset_data, parts[kind].size)
            yield f"{path}:{parts[kind].name}", {**_tar_fields(path, contents, parts), IMAGE: image}


def _stem_and_kind(name: str) -> tuple[str, str]:
    """`a/0001` and `.jpg`, of `a/0001.jpg`: a stem has no dot after its last slash, as WebDataset has it."""
    folder, slash, file = name.rpartition("/")
    stem, _, kind = file.partition(".")
    return folder + slash + stem, f".{kind.lower()}"


def _tar_fields(path: Path, contents: _Bytes, parts: dict[str, tarfile.TarInfo]) -> Fields:
    fields: Fields = {}
    for kind in reversed(_TEXTS):  # what both have is the .txt's
        if member := parts.get(kind):
            try:
                text = contents.read(member.offset_data, member.size).decode("utf-8-sig")
                found = {"caption": text} if kind == ".txt" else json.loads(text)
            except ValueError as error:
                raise DataError(f"{path}:{member.name}: not valid {kind[1:]}: {error}") from None
            if not isinstance(found, dict):
                raise DataError(f"{path}:{member.name}: must hold a JSON object, not {type(found).__name__}")
            fields |= found
    return fields


# ---- npz: `images` uint8 [N, height, width, 3], and a .jsonl of the same stem with N lines


def npz_rows(path: Path) -> Iterator[tuple[str, Line]]:
    """A row for every picture; the array is in memory as a whole."""
    import numpy as np

    lines = beside(path)
    if not lines.is_file():
        raise DataError(f"{path}: there is no {lines.name} beside it, with a line of JSON for every picture")
    try:
        with np.load(path) as arrays:
            images = arrays["images"]
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: has no array `images` that can be read: {error}") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise DataError(f"{path}: images: must be uint8 [N, height, width, 3], not {images.dtype} {images.shape}")
    described = list(json_lines(lines))
    if len(described) != len(images):
        raise DataError(f"{path}: has {len(images)} images, and {lines.name} has {len(described)} lines")
    for index, (where, line) in enumerate(described):
        yield where, Line(line, {IMAGE: partial(images.__getitem__, index)})


def beside(path: Path) -> Path:
    """Where the captions of an .npz are."""
    return path.with_suffix(".jsonl")


# ---- parquet


class _Column:
    """The pictures of a parquet file; those of one row group are in memory, the one that was last asked for."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self._file = pq.ParquetFile(open_file(path))
        self._group: tuple[int, Any] = (-1, None)

    def read(self, group: int, row: int) -> Any:
        if self._group[0] != group:
            self._group = group, self._file.read_row_group(group, columns=[IMAGE]).column(IMAGE)
        return self._group[1][row].as_py()


def parquet_rows(path: Path) -> Iterator[tuple[str, Fields]]:
    """A row for every row of a table; its pictures, where it has some, are left where they are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with open_file(path) as file:
            table = pq.ParquetFile(file)
            others = [name for name in table.schema_arrow.names if name != IMAGE]
            pictures = _Column(path) if IMAGE in table.schema_arrow.names else None
            for group in range(table.num_row_groups):
                row = 0
                for batch in table.iter_batches(row_groups=[group], columns=others):
                    for fields in batch.to_pylist():
                        number += 1
                        image = {IMAGE: partial(pictures.read, group, row)} if pictures else {}
                        yield f"{path}:{number}", {**fields, **image}
                        row += 1
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a parquet file: {error}") from None


# ---- hub


def hub_rows(rows: Any, name: str) -> Iterator[tuple[str, Fields]]:
    """A row for every one of `datasets`' rows; its pictures, where it has some, are not decoded there."""
    import datasets

    images = None
    if isinstance(rows.features.get(IMAGE), datasets.Image):
        images = rows.cast_column(IMAGE, datasets.Image(decode=False))
        rows = rows.remove_columns(IMAGE)
    for index, row in enumerate(rows):
        image = {IMAGE: partial(_hub_image, images, index)} if images is not None else {}
        yield f"{name}:{index + 1}", {**row, **image}


def _hub_image(images: Any, index: int) -> Any:
    return images[index][IMAGE]
