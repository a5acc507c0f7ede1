"""Text from tokens, one token at a time: never half a character, never a piece of a stop string."""

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]

_INCOMPLETE = "\ufffd"  # what decoders put in place of bytes that are no character yet


class Detokenizer:
    """The text of one completion.

    A token's text depends on the one before it (spaces, bytes of one character), so each piece is the difference
    between two decodings of a short window: the tokens of the last piece, then the pending ones.
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = stop
        self._last: list[int] = []  # tokens of the last piece
        self._last_text = ""
        self._pending: list[int] = []  # tokens that end inside a character
        self._held = ""  # text that may become a stop string
        self.stopped = False  # a stop string was found

    def push(self, token: int) -> str:
        """The text that is certain now; sets `stopped` where a stop string is complete."""
        self._pending.append(token)
        text = self._decode(self._last + self._pending)
        if text.endswith(_INCOMPLETE):
            return ""
        piece = text[len(self._last_text) :]
        self._last, self._pending = self._pending, []
        self._last_text = self._decode(self._last)
        return self._release(self._held + piece)

    def flush(self) -> str:
        """At the end: the text that was held back. Bytes that never became a character are dropped."""
        held, self._held = self._held, ""
        return held

    def _release(self, text: str) -> str:
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
