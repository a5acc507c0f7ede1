"""The bytes of tokens joined are the text, whatever the tokenizer does with spaces and with parts of characters."""

import pytest
from conftest import TinyWorld
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from services.token_bytes import TokenBytes

TEXT = "The list's items: naïve “quotes”, 日本 and 🤗.\n\n    Indented.\x00\x7f\xad"


def test_byte_level_bpe(tiny_world: TinyWorld) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_world.tokenizer)
    bytes_of = TokenBytes(tokenizer)
    tokens = tokenizer(TEXT, add_special_tokens=False).input_ids
    assert b"".join(map(bytes_of, tokens)) == TEXT.encode()
    assert any(b"\xf0\x9f\xa4\x97".startswith(bytes_of(token)) for token in tokens)  # a part of a character
    assert bytes_of(tokenizer.eos_token_id) == b""
    assert bytes_of(len(tokenizer) + 5) == b""  # a model's vocabulary may be padded


@pytest.fixture
def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space is a letter, and a character without a token is its bytes."""
    vocabulary = {"<unk>": 0, "</s>": 1, "▁the": 2, "▁": 3, "list": 4} | {f"<0x{b:02X}>": 5 + b for b in range(256)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def test_sentencepiece(sentencepiece: PreTrainedTokenizerFast) -> None:
    bytes_of = TokenBytes(sentencepiece)
    emoji = [5 + byte for byte in "🤗".encode()]
    said = [bytes_of(token) for token in (2, 3, 4, *emoji, 1)]
    assert said == [b" the", b" ", b"list", b"\xf0", b"\x9f", b"\xa4", b"\x97", b""]


def test_a_token_that_was_added_is_text_unless_it_is_special(sentencepiece: PreTrainedTokenizerFast) -> None:
    sentencepiece.add_tokens(["<think>"])
    assert TokenBytes(sentencepiece)(len(sentencepiece) - 1) == b"<think>"
