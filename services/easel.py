"""Drawing in the terminal: a prompt's images into files or onto one sheet, shown where the terminal can."""

import io
import math
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from services import terminal
from services.client import Client, ImageReply, StepProgress

PROMPT_LANGUAGE = "en"  # what a prompt in another language is translated into
_FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


class Easel:
    """A client, and where the images go."""

    def __init__(self, client: Client, output: Path, grid: bool = False) -> None:
        """Raises ValueError where nothing could be written there."""
        self._client, self._output, self._grid = client, output, grid
        self._format = format_of(output)
        if not output.parent.is_dir():
            raise ValueError(f"{output}: there is no folder {output.parent}")
        if grid and find_spec("PIL") is None:
            raise ValueError("--grid: needs Pillow: pip install chatforge[draw]")

    def draw(self, prompt: str, **options: Any) -> None:
        """Draws, saves and shows; `options` are those of Client.generate_image. Raises CallError."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = TextColumn("drawing"), BarColumn(), MofNCompleteColumn()
        bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        with bar, self._client.stream_generate_image(prompt, **self._wanted(options)) as stream:
            task = bar.add_task("", total=None)
            for event in stream:
                if isinstance(event, StepProgress):
                    bar.update(task, completed=event.step, total=event.total)
        self._finish(stream.reply)

    def edit(self, prompt: str, image: Path, mask: Path | None, strength: float | None, **options: Any) -> None:
        """As `draw`, from the picture in a file."""
        given = read_file(image)
        white = read_file(mask) if mask else None
        wanted = self._wanted(options)
        self._finish(self._client.edit_image(prompt, given, mask=white, strength=strength, **wanted))

    def _wanted(self, options: dict[str, Any]) -> dict[str, Any]:
        return options | {"format": "png" if self._grid else self._format}

    def _finish(self, images: Sequence[ImageReply]) -> None:
        files = self._files(images)
        for file, (picture, said) in files.items():
            try:
                file.write_bytes(picture)
            except OSError as error:
                raise ValueError(f"{file}: {error.strerror}") from None
            print(f"{file}  {said}")
        protocol = terminal.protocol_of(os.environ)
        if protocol and sys.stdout.isatty():
            print("".join(terminal.drawn(picture, protocol) for picture, _ in files.values()), end="")

    def _files(self, images: Sequence[ImageReply]) -> dict[Path, tuple[bytes, str]]:
        """What each file is to hold, and what to say of it."""
        first = images[0]
        if self._grid:
            seeds = ", ".join(str(image.seed) for image in images)
            sheet = on_one_sheet([image.data for image in images], self._format)
            return {self._output: (sheet, f"{first.width} × {first.height} each, seed {seeds}")}
        said = f"{first.width} × {first.height}, seed"
        if len(images) == 1:
            return {self._output: (first.data, f"{said} {first.seed}")}
        return {
            self._output.with_stem(f"{self._output.stem}-{number}"): (image.data, f"{said} {image.seed}")
            for number, image in enumerate(images, start=1)
        }


def format_of(file: Path) -> str:
    """The format that a file's ending names, as the client says it. Raises ValueError for another."""
    if file.suffix.lower() not in _FORMATS:
        raise ValueError(f"{file}: ends in none of {', '.join(_FORMATS)}")
    return _FORMATS[file.suffix.lower()]


def in_english(client: Client, prompts: Sequence[str], source: str) -> list[str]:
    """Prompts translated by the same server; empty ones stay so. Raises CallError."""
    said = [prompt for prompt in prompts if prompt.strip()]
    replies = client.translate(said, source=source, target=PROMPT_LANGUAGE) if said else []
    translated = iter(replies)
    return [next(translated).text if prompt.strip() else prompt for prompt in prompts]


def read_file(file: Path) -> bytes:
    """Raises ValueError that names the file."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None


def on_one_sheet(pictures: Sequence[bytes], format: str) -> bytes:
    """A file with pictures of one size in rows, about as many rows as columns."""
    from PIL import Image

    opened = [Image.open(io.BytesIO(picture)).convert("RGB") for picture in pictures]
    columns = math.ceil(math.sqrt(len(opened)))
    width, height = opened[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(opened) / columns) * height), "white")
    for i, picture in enumerate(opened):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    file = io.BytesIO()
    sheet.save(file, format)
    return file.getvalue()
