"""Which script a letter belongs to, by the names that Unicode gives its characters."""

import unicodedata
from functools import cache

_ONE = {"HIRAGANA": "CJK", "KATAKANA": "CJK"}  # that Japanese is written in, all in one sentence
_WIDTHS = frozenset({"FULLWIDTH", "HALFWIDTH"})
_SIGNS = frozenset({"MICRO", "FEMININE", "MASCULINE", "OHM", "KELVIN", "ANGSTROM"})  # letters by category alone


@cache
def script_of(character: str) -> str:
    """LATIN, CYRILLIC, CJK, ...; empty for what is no letter of any language."""
    words = unicodedata.name(character, "").split(" ") if character.isalpha() else [""]
    script = words[1] if words[0] in _WIDTHS else words[0]
    return "" if script in _SIGNS else _ONE.get(script, script)
