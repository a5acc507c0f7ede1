"""Translating in the terminal: a text, a document, or line after line as it is typed."""

import re
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from services.client import CallError, Client

PART_CHARACTERS = 16_000  # of a document, in one call; less where the server allows less
CUT = "(cut: a sentence has all of max_new_tokens)"
HELP = "Every line is translated; Ctrl-D leaves, Ctrl-C stops a translation."


class Interpreter:
    """A client, and how it should translate."""

    def __init__(self, client: Client, **options: Any) -> None:
        """`options` are those of Client.stream_translate."""
        self._client, self._options = client, options

    def translate(self, text: str, end: str = "") -> None:
        """Prints the translation of a text of any length while it comes, then `end`, and nothing else.

        That a sentence was cut is said on stderr. Raises CallError.
        """
        cut = False
        for part in parts(text, self._part_characters if "\n" in text else PART_CHARACTERS):
            with self._client.stream_translate(part, **self._options) as stream:
                for piece in stream:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
                cut |= stream.reply.finish_reason == "length"
        print(end=end, flush=True)
        if cut:
            print(CUT, file=sys.stderr)

    @cached_property
    def _part_characters(self) -> int:
        """What one call may hold, by every model that could be the one: the languages choose it on the server."""
        name = self._options.get("model")
        allowed = [
            model.limits.get("max_characters", PART_CHARACTERS)  # a model that is still loading tells no limit
            for model in self._client.list_models()
            if model.kind == "translation" and name in (None, "", model.name)
        ]
        return min([PART_CHARACTERS, *allowed])

    def show_hypotheses(self, text: str) -> None:
        """Prints every translation of a text, best first, with its score. Raises CallError."""
        reply = self._client.translate(text, **self._options)
        for hypothesis in reply.hypotheses:
            print(f"{hypothesis.score:.3f}\t{hypothesis.text}", flush=True)
        if any(hypothesis.finish_reason == "length" for hypothesis in reply.hypotheses):
            print(CUT, file=sys.stderr)

    def converse(self) -> None:
        """Translates what is typed until the end of the input."""
        import readline  # noqa: F401 - gives input() its line editing and history

        print(HELP)
        while True:
            try:
                line = input("\n> ")
            except EOFError:
                print()
                return
            if line.strip():
                self._answer(line)

    def _answer(self, line: str) -> None:
        try:
            self.translate(line, end="\n")
        except CallError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("(stopped)")


def read_document(file: Path | None) -> str:
    """A file's text, or stdin's. Raises ValueError that names the file, and the byte that is not UTF-8."""
    try:
        name, read = (str(file), file.read_bytes()) if file else ("stdin", sys.stdin.buffer.read())
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    try:
        return read.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8: byte {error.start} is 0x{read[error.start]:02x}") from None


def parts(text: str, characters: int) -> Iterator[str]:
    """Whole lines, as many as have that many characters together, or one that alone has more; joined they are `text`.

    Sentences do not go over the end of a line, so the parts' translations joined are that of the whole.
    """
    part: list[str] = []
    size = 0
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        if part and size + len(line) > characters:
            yield "".join(part)
            part, size = [], 0
        part.append(line)
        size += len(line)
    if part:
        yield "".join(part)
