"""`chatforge draw` without a server: what goes into which file, onto one sheet, and into the terminal."""

import base64
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from services import terminal
from services.easel import Easel, in_english, on_one_sheet
from services.replies import ImageReply, StepProgress
from services.terminal import drawn, protocol_of

COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]


def png(colour: tuple[int, int, int], size: tuple[int, int] = (4, 2), format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, format)
    return file.getvalue()


class Painting:
    """Stands in for a client: it draws one colour after another."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    @contextmanager
    def stream_generate_image(self, prompt: str, **options: Any) -> Iterator[Any]:
        self.asked.append(options | {"prompt": prompt})
        yield _Stream(self._images(options))

    def edit_image(self, prompt: str, image: bytes, **options: Any) -> list[ImageReply]:
        self.asked.append(options | {"prompt": prompt, "image": image})
        return self._images(options)

    def translate(self, texts: list[str], **options: Any) -> list[Any]:
        self.asked.append(options | {"texts": texts})
        return [SimpleNamespace(text=text.upper()) for text in texts]

    def _images(self, options: dict[str, Any]) -> list[ImageReply]:
        colours = COLOURS[: options["num_images"]]
        return [ImageReply(png(c), "image/png", 7 + i, 4, 2, "r", "m") for i, c in enumerate(colours)]


class _Stream:
    def __init__(self, images: list[ImageReply]) -> None:
        self.reply = images

    def __iter__(self) -> Iterator[Any]:
        return iter([StepProgress(1, 1), *self.reply])


def easel(client: Painting, *arguments: Any) -> Easel:
    return Easel(client, *arguments)  # type: ignore[arg-type]


def test_one_image_is_the_file_and_several_are_numbered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client, file = Painting(), tmp_path / "apple.png"
    easel(client, file).draw("an apple", num_images=1, width=4)
    assert file.read_bytes() == png(COLOURS[0])
    assert client.asked == [{"prompt": "an apple", "num_images": 1, "width": 4, "format": "png"}]
    easel(client, file).draw("an apple", num_images=3)
    assert [(tmp_path / f"apple-{i + 1}.png").read_bytes() for i in range(3)] == [png(c) for c in COLOURS]
    told = capsys.readouterr()
    assert told.out.splitlines() == [
        f"{file}  4 × 2, seed 7",
        *(f"{tmp_path}/apple-{i + 1}.png  4 × 2, seed {7 + i}" for i in range(3)),
    ]
    assert told.err == ""


@pytest.mark.parametrize(("name", "format"), [("a.JPG", "jpeg"), ("a.jpeg", "jpeg"), ("a.webp", "webp")])
def test_a_files_ending_is_its_format(tmp_path: Path, name: str, format: str) -> None:
    client = Painting()
    easel(client, tmp_path / name).draw("an apple", num_images=1)
    assert client.asked[0]["format"] == format


def test_a_grid_is_one_sheet_in_the_files_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client, file = Painting(), tmp_path / "sheet.webp"
    easel(client, file, True).draw("an apple", num_images=3)
    sheet = Image.open(file)
    assert (sheet.format, sheet.size, client.asked[0]["format"]) == ("WEBP", (8, 4), "png")
    assert capsys.readouterr().out == f"{file}  4 × 2 each, seed 7, 8, 9\n"
    sheet = Image.open(io.BytesIO(on_one_sheet([png(c) for c in COLOURS], "png")))
    assert [sheet.getpixel(at) for at in ((0, 0), (4, 0), (0, 2), (4, 2))] == [*COLOURS, (255, 255, 255)]


@pytest.mark.parametrize(("count", "size"), [(1, (4, 2)), (2, (8, 2)), (4, (8, 4)), (5, (12, 4)), (64, (32, 16))])
def test_a_sheet_has_about_as_many_rows_as_columns(count: int, size: tuple[int, int]) -> None:
    assert Image.open(io.BytesIO(on_one_sheet([png(COLOURS[0])] * count, "png"))).size == size


def test_an_edit_sends_what_the_files_hold(tmp_path: Path) -> None:
    client = Painting()
    (tmp_path / "old.png").write_bytes(b"old")
    (tmp_path / "mask.png").write_bytes(b"white")
    easel(client, tmp_path / "new.png").edit("a pear", tmp_path / "old.png", None, 0.5, num_images=1)
    easel(client, tmp_path / "new.png").edit("a pear", tmp_path / "old.png", tmp_path / "mask.png", None, num_images=1)
    assert [(a["image"], a["mask"], a["strength"]) for a in client.asked] == [
        (b"old", None, 0.5),
        (b"old", b"white", None),
    ]
    assert (tmp_path / "new.png").read_bytes() == png(COLOURS[0])


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(ValueError, match=r"a\.png: Is a directory"):
        easel(Painting(), tmp_path / "a.png").draw("an apple", num_images=1)


def test_prompts_are_translated_together_and_empty_ones_stay() -> None:
    client: Any = Painting()
    assert in_english(client, ["ein apfel", ""], "de") == ["EIN APFEL", ""]
    assert in_english(client, ["ein apfel", "blau"], "de") == ["EIN APFEL", "BLAU"]
    assert in_english(client, [" ", ""], "de") == [" ", ""]
    assert client.asked == [
        {"texts": ["ein apfel"], "source": "de", "target": "en"},
        {"texts": ["ein apfel", "blau"], "source": "de", "target": "en"},
    ]


# ---- in the terminal


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({}, None),
        ({"TERM": "dumb", "TERM_PROGRAM": "iTerm.app"}, None),
        ({"TERM": "xterm-256color"}, "blocks"),
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}, "blocks"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app", "TMUX": "/tmp/tmux"}, "blocks"),
    ],
)
def test_the_environment_says_how_a_terminal_shows_pictures(environment: dict[str, str], protocol: str | None) -> None:
    assert protocol_of(environment) == protocol


def test_kitty_gets_png_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Image.effect_noise((90, 90), 99).convert("RGB")
    file = io.BytesIO()
    noise.save(file, "PNG")
    commands = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", drawn(file.getvalue(), "kitty"))
    assert [keys for keys, _ in commands] == ["a=T,f=100,m=1", *["m=1"] * (len(commands) - 2), "m=0"]
    assert all(len(chunk) <= 4096 for _, chunk in commands) and len(commands) > 2
    assert base64.b64decode("".join(chunk for _, chunk in commands)) == file.getvalue()
    ((_, chunk),) = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", drawn(png((9, 9, 9), format="WEBP"), "kitty"))
    assert base64.b64decode(chunk).startswith(b"\x89PNG")


def test_iterm2_gets_the_file_as_it_is() -> None:
    picture = png(COLOURS[0], format="WEBP")
    encoded = base64.b64encode(picture).decode()
    assert drawn(picture, "iterm2") == f"\x1b]1337;File=inline=1;size={len(picture)}:{encoded}\a\n"


def test_other_terminals_get_two_pixels_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    red, reset = "\x1b[38;2;250;0;0m", "\x1b[0m\n"
    both = f"{red}\x1b[48;2;250;0;0m▀"
    assert drawn(png(COLOURS[0], (2, 3)), "blocks") == f"{both * 2}{reset}{red}▀{red}▀{reset}"
    monkeypatch.setattr(terminal.shutil, "get_terminal_size", lambda: (40, 12))
    lines = drawn(png(COLOURS[0], (200, 100)), "blocks").splitlines()
    assert len(lines) == 10 and all(line.count("▀") == 40 for line in lines)


def test_without_pillow_only_what_needs_none_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in ("services.terminal", "services.easel"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: None)
    assert drawn(png(COLOURS[0]), "blocks") == "" and drawn(png(COLOURS[0], format="WEBP"), "kitty") == ""
    assert drawn(png(COLOURS[0]), "kitty") and drawn(png(COLOURS[0]), "iterm2")
    with pytest.raises(ValueError, match=r"--grid: needs Pillow: pip install chatforge\[draw\]"):
        easel(Painting(), tmp_path / "a.png", True)


def test_a_picture_is_shown_in_a_terminal_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    easel(Painting(), tmp_path / "a.png").draw("an apple", num_images=1)
    assert "▀" not in capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    easel(Painting(), tmp_path / "a.png").draw("an apple", num_images=1)
    assert capsys.readouterr().out.count("▀") == 4
