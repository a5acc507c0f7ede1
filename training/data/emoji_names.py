"""German and English names of pictograms (package emoji, BSD licence): the translation demo's sentence pairs.

A narrow domain that repeats itself (four hundred people, each in five shades of skin), so that a small model learns in
minutes how German and English say the same thing. Each name is one record, and the split is by name: some held-out
names recombine words that training names have, others are of words that were never seen.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from training.data.records import Fields

_FULLY_QUALIFIED = 2  # other states are other spellings of the same pictogram


def pairs() -> Iterator[Fields]:
    """`{"translation": {"de": …, "en": …}}` of every pictogram."""
    import emoji

    folder = Path(emoji.__file__).with_name("unicode_codes")
    english = json.loads((folder / "emoji.json").read_text("utf-8"))
    german = json.loads((folder / "emoji_de.json").read_text("utf-8"))
    for pictogram, entry in english.items():
        if entry["status"] == _FULLY_QUALIFIED and pictogram in german:
            yield {"translation": {"de": name(german[pictogram]), "en": name(entry["en"])}}


def name(code: str) -> str:
    """`:grinsendes_gesicht:` as people write it."""
    words = code.strip(":").replace("_", " ").replace(",", ", ")
    return " ".join(words.split())
