"""Documents in the terminal: read as UTF-8 or refused, and cut between lines alone."""

import io
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from services.client import CallError, ModelCard
from services.interpreter import CUT, PART_CHARACTERS, Interpreter, parts, read_document


class Translated(nullcontext[Iterator[str]]):
    """Stands in for a stream; what ends in a dash was cut."""

    def __init__(self, text: str) -> None:
        super().__init__(self)
        self._pieces = iter(text.upper())
        self.reply = SimpleNamespace(finish_reason="length" if text.rstrip().endswith("-") else "stop")

    def __iter__(self) -> Iterator[str]:
        return self._pieces


class Shouting:
    """Stands in for a client: a text's translation is itself in capitals, and "?" is refused."""

    def __init__(self, **limits: int) -> None:
        """`limits` are the characters that each model allows."""
        self.limits, self.texts = limits, list[str]()
        self.asked = 0

    def list_models(self) -> list[ModelCard]:
        self.asked += 1
        chat = ModelCard("chat", "causal-lm", limits={"max_characters": 1})
        told = {name: {"max_characters": limit} if limit else {} for name, limit in self.limits.items()}
        return [chat, *(ModelCard(name, "translation", limits=limits) for name, limits in told.items())]

    def stream_translate(self, text: str, **options: Any) -> Any:
        assert options["target"] == "en"
        self.texts.append(text)
        if text == "?":
            raise CallError(grpc.StatusCode.INVALID_ARGUMENT, "text: is no text", {})
        return Translated(text)


@pytest.mark.parametrize("text", ["", "\n", "a", "a\n", "a\r\nb\u2028c\n\n\n", "\n\n" * 30 + "x" * 50 + "\ny"])
@pytest.mark.parametrize("characters", [1, 7, 1000])
def test_parts_are_whole_lines_and_joined_the_text(text: str, characters: int) -> None:
    cut = list(parts(text, characters))
    assert "".join(cut) == text
    assert all(part.endswith("\n") for part in cut[:-1])
    assert all(0 < len(part) <= characters or part.count("\n") <= 1 for part in cut)


def test_as_few_parts_as_have_the_lines() -> None:
    assert list(parts("ab\ncd\nefghijk\nl", 6)) == ["ab\ncd\n", "efghijk\n", "l"]


@pytest.mark.parametrize(("read", "text"), [(b"", ""), ("ü\r\n\n".encode(), "ü\r\n\n"), (b"\xef\xbb\xbfa", "a")])
def test_a_document_is_read_as_it_is(tmp_path: Path, read: bytes, text: str) -> None:
    (tmp_path / "d.txt").write_bytes(read)
    assert read_document(tmp_path / "d.txt") == text


def test_what_is_not_utf8_is_named_with_its_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbfab\xe9")
    with pytest.raises(ValueError, match=r"d\.txt: not UTF-8: byte 5 is 0xe9"):
        read_document(tmp_path / "d.txt")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xc3")))
    with pytest.raises(ValueError, match="stdin: not UTF-8: byte 1 is 0xc3"):
        read_document(None)


def test_a_document_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x: No such file or directory"):
        read_document(tmp_path / "x")
    with pytest.raises(ValueError, match="Is a directory"):
        read_document(tmp_path)


def test_what_is_typed_is_translated_line_by_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["eins", " ", "?", "zwei"])

    def type_line(prompt: str) -> str:
        for line in typed:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", type_line)
    Interpreter(Shouting(), target="en").converse()  # type: ignore[arg-type]
    said = capsys.readouterr()
    assert said.out.splitlines()[1:] == ["EINS", "ZWEI", ""]
    assert said.err == "error: INVALID_ARGUMENT: text: is no text\n"


def test_a_document_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    Interpreter(Shouting(), target="en").translate("ä\n\n b")  # type: ignore[arg-type]
    said = capsys.readouterr()
    assert (said.out, said.err) == ("Ä\n\n B", "")


def test_a_cut_translation_is_told_once_and_not_among_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    Interpreter(Shouting(a=3), target="en").translate("a-\nb-\nc", end="\n")  # type: ignore[arg-type]
    assert capsys.readouterr() == ("A-\nB-\nC\n", f"{CUT}\n")


LINES = "".join(f"line {i:3}\n" for i in range(100))  # of 9 characters each


@pytest.mark.parametrize(
    ("limits", "model", "longest"),
    [
        ({"a": 20}, "", 18),
        ({"a": 20, "b": 100}, "", 18),  # the languages may choose either
        ({"a": 20, "b": 100}, "b", 99),
        ({"a": 0, "b": 100}, "", 99),  # a model that is still loading tells nothing
        ({"a": 10 * PART_CHARACTERS}, "", 900),
        ({}, "", 900),
    ],
)
def test_a_document_is_cut_as_the_server_allows(limits: dict[str, int], model: str, longest: int) -> None:
    client = Shouting(**limits)
    interpreter = Interpreter(client, target="en", model=model)  # type: ignore[arg-type]
    interpreter.translate(LINES)
    assert max(map(len, client.texts)) == longest and "".join(client.texts) == LINES
    interpreter.translate(LINES)
    assert client.asked == 1


def test_the_server_is_not_asked_what_one_line_may_hold() -> None:
    """It cannot be cut, whatever the answer."""
    client = Shouting(a=3)
    Interpreter(client, target="en").translate("a long line")  # type: ignore[arg-type]
    assert (client.asked, client.texts) == (0, ["a long line"])
