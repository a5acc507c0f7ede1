"""The bytes of single tokens, for clients without the tokenizer.

A decoder does not give them: a token may be a part of a character, and its space may depend on the one before.
"""

import re
from typing import Any

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
# GPT-2's alphabet: a character for each byte, those that print as themselves.
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}
_ONE_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's, where a character has no token
_SPACE = "\u2581"  # SentencePiece's


class TokenBytes:
    """What each token of a tokenizer stands for: byte-level BPE's, or SentencePiece's."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._added = tokenizer, tokenizer.added_tokens_decoder  # which is made anew at every look
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        self._byte_level = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()

    def __call__(self, token: int) -> bytes:
        """Empty for a control token, which is no text."""
        if added := self._added.get(token):
            return b"" if added.special else added.content.encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # a vocabulary that is padded
            return b""
        if isinstance(piece, bytes):
            return piece
        if self._byte_level and all(character in _BYTES for character in piece):
            return bytes(_BYTES[character] for character in piece)
        if byte := _ONE_BYTE.fullmatch(piece):
            return bytes.fromhex(byte[1])
        return piece.replace(_SPACE, " ").encode()
