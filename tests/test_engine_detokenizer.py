"""Pieces of text against the whole: whatever the cuts, nothing is lost, halved or shown too early."""

import pytest
from conftest import TinyWorld
from transformers import AutoTokenizer

from serving.engine.detokenizer import Detokenizer


def decode_bytes(tokens: list[int]) -> str:
    """A tokenizer of single bytes, the hardest case."""
    return bytes(tokens).decode("utf-8", errors="replace")


def pieces(text: str | bytes, stop: tuple[str, ...] = ()) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(decode_bytes, stop)
    out = []
    for byte in text.encode() if isinstance(text, str) else text:
        out.append(detokenizer.push(byte))
        if detokenizer.stopped:
            break
    return [*out, detokenizer.flush()], detokenizer


def test_characters_come_whole() -> None:
    text = "Grüße, 日本 🤗!"
    got, _ = pieces(text)
    assert "".join(got) == text
    assert all(piece in ("", *text) for piece in got)


def test_a_character_cut_off_at_the_end_is_dropped() -> None:
    assert "".join(pieces("ab🤗".encode()[:-1])[0]) == "ab"


def test_bytes_that_are_no_text_do_not_block_what_follows() -> None:
    assert "".join(pieces(b"a\x80\x80b\xffc")[0]) == "a\ufffd\ufffdb\ufffdc"


@pytest.mark.parametrize(
    ("text", "stop", "want", "stopped"),
    [
        ("one END two", ("END",), "one ", True),
        ("one EN", ("END",), "one EN", False),
        ("one ENEND", ("END",), "one EN", True),
        ("aaab", ("aab",), "a", True),
        ("x\n\ny", ("y", "\n\n"), "x", True),
        ("naïve", ("ï",), "na", True),
    ],
)
def test_stop_strings(text: str, stop: tuple[str, ...], want: str, stopped: bool) -> None:
    got, detokenizer = pieces(text, stop)
    assert "".join(got) == want
    assert detokenizer.stopped == stopped


def test_no_piece_shows_what_becomes_a_stop_string() -> None:
    got, _ = pieces("abcabd", ("abd",))
    shown = ""
    for piece in got:
        shown += piece
        assert "abcabd".startswith(shown) and not shown.endswith(("a", "ab"))
    assert shown == "abc"


def test_a_real_tokenizer_gives_its_own_text_back(tiny_world: TinyWorld) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_world.tokenizer)
    text = "The list's items: naïve “quotes”, 日本 and 🤗.\n\n    Indented."
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    detokenizer = Detokenizer(lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
    assert "".join([*map(detokenizer.push, tokens), detokenizer.flush()]) == tokenizer.decode(tokens)
