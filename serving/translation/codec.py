"""Sentences to source tokens, and target tokens to text, between two languages."""

import threading
import unicodedata
from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import MBartTokenizer


def plain(text: str) -> str:
    """Unicode NFC with single spaces: the form of text that models are taught."""
    return " ".join(unicodedata.normalize("NFC", text).split())


class Codec:
    """A folder's tokenizer, set to a pair of languages where it knows several. Any thread may call it."""

    # Control tokens in a text are text: "</s>" in it must not end its sentence.
    _AS_TEXT: ClassVar[dict[str, bool]] = {"split_special_tokens": True, "verbose": False}

    def __init__(self, tokenizer: Any, source_language: str, target_language: str) -> None:
        """Raises ValueError where the tokenizer has tokens for languages, and none for one of these."""
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # tokenizers are set up anew by every call
        self.first_token: int | None = None  # what every translation has to begin with, where the target is a token
        self._prefix = ""
        if hasattr(tokenizer, "src_lang"):  # mBART, M2M100, NLLB
            tokenizer.src_lang, tokenizer.tgt_lang = self._code(source_language), self._code(target_language)
            target = self._token(tokenizer.tgt_lang)
            # The first mBART's target is its decoder_start_token_id instead, which the folder names.
            self.first_token = None if isinstance(tokenizer, MBartTokenizer) else target
        elif codes := getattr(tokenizer, "supported_language_codes", None):  # an opus-mt of several targets
            self._prefix = f">>{target_language}<< "
            if self._prefix.strip() not in codes:
                raise ValueError(f"target_language={target_language!r} is none of {', '.join(c[2:-2] for c in codes)}")

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        """Source tokens of each, the end included."""
        if not sentences:
            return []
        with self._lock:
            encoded = self._tokenizer([self._prefix + plain(s) for s in sentences], **self._AS_TEXT)
        return [list(ids) for ids in encoded["input_ids"]]

    def encode_targets(self, sentences: Sequence[str]) -> list[list[int]]:
        """Target tokens of each, the end included, as a model learns to make them."""
        with self._lock:
            encoded = self._tokenizer(text_target=[plain(s) for s in sentences], **self._AS_TEXT)
        return [list(ids) for ids in encoded["input_ids"]]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without special tokens."""
        with self._lock:
            return self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _code(self, language: str) -> str:
        """The tokenizer's own name: BCP-47's de is de_DE for mBART, deu-Latn is deu_Latn for NLLB."""
        wanted = language.replace("-", "_")
        known = [code for code in self._known_codes() if code == wanted or code.split("_")[0] == wanted]
        if not known:
            raise ValueError(f"language {language!r} is none of {', '.join(self._known_codes())}")
        return known[0]

    def _known_codes(self) -> list[str]:
        codes = getattr(self._tokenizer, "lang_code_to_id", None) or self._tokenizer.extra_special_tokens
        return sorted(codes)

    def _token(self, code: str) -> int:
        named = getattr(self._tokenizer, "get_lang_token", lambda code: code)
        return int(self._tokenizer.convert_tokens_to_ids(named(code)))
