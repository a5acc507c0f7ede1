"""Pictures in a terminal: by kitty's or iTerm2's protocol where the environment names a terminal that has it, else by
characters that are two pixels each, for which Pillow is needed."""

import base64
import io
import shutil
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any, Literal

Protocol = Literal["kitty", "iterm2", "blocks"]

_KITTY_CHUNK = 4096  # characters of base64 in one escape sequence, at most
_KITTY_PROGRAMS = ("ghostty",)
_ITERM2_PROGRAMS = ("iTerm.app", "WezTerm", "mintty")
_MARGIN = 2  # lines of the terminal that a picture of blocks leaves free
_HALF_BLOCK = "▀"  # its upper half in the foreground's colour, its lower in the background's


def protocol_of(environment: Mapping[str, str]) -> Protocol | None:
    """How the terminal that the environment describes can show a picture; None for one that cannot."""
    terminal, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if terminal in ("", "dumb"):
        return None
    if "TMUX" not in environment and not terminal.startswith(("screen", "tmux")):  # these keep the protocols to them
        if "kitty" in terminal or "KITTY_WINDOW_ID" in environment or program in _KITTY_PROGRAMS:
            return "kitty"
        if program in _ITERM2_PROGRAMS:
            return "iterm2"
    return "blocks"


def drawn(picture: bytes, protocol: Protocol) -> str:
    """What to print; empty where it would need Pillow, which is not installed."""
    if protocol == "iterm2":
        return _iterm2(picture)
    if protocol == "kitty" and picture.startswith(b"\x89PNG"):
        return _kitty(picture)
    if find_spec("PIL") is None:
        return ""
    if protocol == "kitty":
        return _kitty(_as_png(picture))
    return _blocks(picture, *shutil.get_terminal_size())


def _kitty(png: bytes) -> str:
    encoded = base64.b64encode(png).decode()
    chunks = [encoded[at : at + _KITTY_CHUNK] for at in range(0, len(encoded), _KITTY_CHUNK)]
    more = [*(["1"] * (len(chunks) - 1)), "0"]
    first = ["a=T,f=100,", *([""] * (len(chunks) - 1))]  # transmit and show a PNG
    return "".join(f"\x1b_G{f}m={m};{c}\x1b\\" for f, m, c in zip(first, more, chunks, strict=True)) + "\n"


def _iterm2(picture: bytes) -> str:
    return f"\x1b]1337;File=inline=1;size={len(picture)}:{base64.b64encode(picture).decode()}\a\n"


def _as_png(picture: bytes) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.open(io.BytesIO(picture)).save(file, "PNG")
    return file.getvalue()


def _blocks(picture: bytes, columns: int, lines: int) -> str:
    from PIL import Image

    shown = Image.open(io.BytesIO(picture)).convert("RGB")
    shown.thumbnail((columns, max(2, 2 * (lines - _MARGIN))))
    return "".join(_line(shown, y) for y in range(0, shown.height, 2))


def _line(picture: Any, y: int) -> str:
    """Two rows of pixels as one of characters."""
    return "".join(_cells(picture, y)) + "\x1b[0m\n"


def _cells(picture: Any, y: int) -> Iterator[str]:
    for x in range(picture.width):
        red, green, blue = picture.getpixel((x, y))
        yield f"\x1b[38;2;{red};{green};{blue}m"
        if y + 1 < picture.height:
            red, green, blue = picture.getpixel((x, y + 1))
            yield f"\x1b[48;2;{red};{green};{blue}m"
        yield _HALF_BLOCK
