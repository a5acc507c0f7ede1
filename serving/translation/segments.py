"""A text's sentences, and what stands around them: only sentences are translated, all else stays as it is.

White space of any kind, line breaks, emoji and whatever has no letter to translate is never shown to the model. A line
is never joined to another, so that a document of 200 lines has 200 lines in the other language.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import sentencex

from serving.translation.scripts import script_of

_SPACE = re.compile(r"\s+")
# Where a line or a column ends, whatever is beside it: tab and all that str.splitlines breaks at.
_BREAKS = frozenset("\t\n\v\f\r\x1c\x1d\x1e\x85\u2028\u2029")

_PICTURE = "[\u231a\u231b\u23e9-\u23fa\u2600-\u27bf\u2b05-\u2b55\U0001f000-\U0001faff]"
_MODIFIER = "[\ufe0f\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]"  # look, skin, the tags of flags
_EMOJI = f"(?:{_PICTURE}{_MODIFIER}*|[0-9#*]\ufe0f?\u20e3|(?:[^\\w\\s]|\u2139)\ufe0f)"
_EMOJI_RUN = re.compile(f"{_EMOJI}(?:[\\s\u200d]*{_EMOJI})*")


@dataclass(frozen=True)
class Segments:
    """A text is around[0] + sentences[0] + around[1] + ... + around[n]."""

    sentences: tuple[str, ...]
    around: tuple[str, ...]  # one more than there are sentences

    def join(self, translations: Sequence[str]) -> str:
        """The text with these in place of its sentences."""
        if not self.sentences:
            return self.around[0]
        return "".join(self.piece(i, translation) for i, translation in enumerate(translations))

    def piece(self, i: int, translation: str) -> str:
        """Sentence i's part of the text, by its translation; the last one's goes to the text's end."""
        last = self.around[-1] if i + 1 == len(self.sentences) else ""
        return self.around[i] + one_line(translation) + last

    def cut(self, fits: Callable[[str], bool]) -> "Segments":
        """With every sentence that does not fit cut into parts that do: at white space, or in the middle of a word."""
        parts = [self.around[0]]
        for sentence, behind in zip(self.sentences, self.around[1:], strict=True):
            parts += [*_halved(sentence, fits), behind]
        return _merged(parts)


def split(text: str, language: str, script: str | None = None) -> Segments:
    """The sentences of `text` in `language` (BCP-47; one that the splitter does not know splits like English).

    `script` is what the language is written in (see scripts.py), such as LATIN; a sentence without any such letter is
    left as it is.
    """
    language = re.split("[-_]", language)[0].lower()
    parts = [""]  # what is left as it is, and sentences, in turn
    for chunk, gap in _chunks(text):
        for sentence in _sentences(chunk, language):
            for words, emoji in _around(_EMOJI_RUN, sentence):
                core = words.strip()
                if any(_translatable(letter, script) for letter in core):
                    start = words.index(core)
                    parts[-1] += words[:start]
                    parts += [core, words[start + len(core) :] + emoji]
                else:
                    parts[-1] += words + emoji
        parts[-1] += gap
    return _merged(parts)


def one_line(translation: str) -> str:
    """A model's output as part of a line: without line breaks and outer white space."""
    return " ".join(translation.splitlines()).strip()


def _translatable(letter: str, script: str | None) -> bool:
    own = script_of(letter)
    return bool(own) and script in (None, own)


def _sentences(chunk: str, language: str) -> list[str]:
    sentences = list(sentencex.segment(language, chunk))
    # The splitter promises to lose nothing; a line is rather translated as one sentence than with a gap.
    return sentences if "".join(sentences) == chunk else [chunk]


def _chunks(text: str) -> Iterator[tuple[str, str]]:
    """(text, what divides it from the next): breaks, and white space that is more than one character."""
    start = 0
    for space in _SPACE.finditer(text):
        if space.end() - space.start() > 1 or space.group() in _BREAKS:
            yield text[start : space.start()], space.group()
            start = space.end()
    yield text[start:], ""


def _around(pattern: re.Pattern[str], text: str) -> Iterator[tuple[str, str]]:
    """(text before a match, the match), and at last (the rest, "")."""
    start = 0
    for match in pattern.finditer(text):
        yield text[start : match.start()], match.group()
        start = match.end()
    yield text[start:], ""


def _halved(sentence: str, fits: Callable[[str], bool]) -> list[str]:
    """Parts that fit and the white space between them, in turn."""
    if len(sentence) < 2 or fits(sentence):
        return [sentence]
    middle = len(sentence) // 2
    spaces = [(space.start(), space.end()) for space in _SPACE.finditer(sentence)]
    start, end = min(spaces, key=lambda space: abs(space[0] - middle), default=(middle, middle))
    return [*_halved(sentence[:start], fits), sentence[start:end], *_halved(sentence[end:], fits)]


def _merged(parts: Sequence[str]) -> Segments:
    """From around, sentence, around, ... in turn."""
    return Segments(tuple(parts[1::2]), tuple(parts[::2]))
