"""What a record is before it is validated, how files hold it, and what is raised where it is not valid."""

import gzip
import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from training.run import StageError

Fields = dict[str, Any]


class DataError(StageError):
    """Data that cannot be used; the message points to the source, and to the first bad record in it."""


@dataclass(frozen=True)
class Line:
    """A record as a line of JSON, still to be read, and fields that stand elsewhere."""

    content: bytes
    others: Fields = field(default_factory=dict)

    def fields(self) -> Fields:
        """Raises ValueError where the line is no JSON object."""
        try:
            found = json.loads(self.content.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8: byte {error.start + 1} of the line") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(found, dict):
            raise ValueError(f"a record is a JSON object, not {type(found).__name__}")
        return found | self.others


def open_file(path: Path) -> IO[bytes]:
    """To read; a `.gz` as what is packed in it."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines without their ends; a byte order mark at the start is dropped."""
    with open_file(path) as file:
        try:
            for number, line in enumerate(file, 1):
                yield number, (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).rstrip(b"\r\n")
        except (EOFError, gzip.BadGzipFile) as error:
            raise DataError(f"{path}: not a whole gzip file: {error}") from None


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """`lines` as text. Raises DataError where one is not UTF-8."""
    for number, line in lines(path):
        try:
            yield number, line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: not UTF-8: byte {error.start + 1} of the line") from None


def json_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """FILE:LINE and the line, of those that are not blank."""
    yield from ((f"{path}:{number}", line) for number, line in lines(path) if line.strip())


def plain(text: str) -> str:
    """Unicode NFC, white space as single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).split())
