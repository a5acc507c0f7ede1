"""Which model a request means: names, and languages that are the same, near, or neither."""

import pytest

from services.choice import choose_name, choose_translator, distance
from services.errors import StatusError

PAIRS = {"a": ("de", "en"), "b": ("de-AT", "en"), "c": ("de", "fr"), "d": ("de", "en"), "e": ("zh-Hant", "en")}


@pytest.mark.parametrize(
    ("wanted", "tag", "far"),
    [
        ("", "de", 0), ("de", "de", 0), ("DE-at", "de-AT", 0), ("de-AT", "de", 1), ("pt", "pt-BR", 1),
        ("zh-Hant-TW", "zh", 2), ("de-CH", "de-AT", None), ("deu", "de", None), ("en", "de", None),
    ],
)  # fmt: skip
def test_distance(wanted: str, tag: str, far: int | None) -> None:
    assert distance(wanted, tag) == far


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        (("", "de", "en"), "a"),  # and "d": the first by name
        (("", "de-AT", "en"), "b"),  # the exact tag before the primary subtag
        (("", "de-AT", "fr"), "c"),
        (("", "de-CH", "en-GB"), "a"),
        (("", "", "fr"), "c"),
        (("", "zh", ""), "e"),
        (("d", "", ""), "d"),
        (("d", "de-AT", "en"), "d"),
    ],
)
def test_a_model_is_chosen_by_name_or_by_its_languages(asked: tuple[str, str, str], name: str) -> None:
    assert choose_translator(*asked, PAIRS) == name


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("", "", ""), "model: is empty, and there is more than one; there are: a, b, c, d, e"),
        (("x", "de", "en"), "model: 'x' is not served here"),
        (("", "de", ""), "target_language: is empty, and there is more than one; there are: de to en, de to fr"),
        (("", "", "en"), "source_language: is empty, and there is more than one; there are: de to en, de-AT to en, zh"),
        (("", "fr", "en"), "source_language: 'fr' is not translated here; there are: de to en, de to fr, de-AT to en"),
        (("", "zh", "fr"), "target_language: nothing is translated into 'fr' here; there are: zh-Hant to en"),
        (("c", "de", "en"), "target_language: nothing is translated into 'en' by 'c'; there are: de to fr"),
    ],
)
def test_what_cannot_be_chosen_is_told_by_field(asked: tuple[str, str, str], said: str) -> None:
    with pytest.raises(StatusError) as caught:
        choose_translator(*asked, PAIRS)
    assert caught.value.text.startswith(said) and caught.value.field == said.partition(":")[0]


def test_an_empty_name_is_the_only_one() -> None:
    assert choose_name("model", "", ["a"]) == choose_translator("", "", "", {"a": ("de", "en")}) == "a"


def test_what_is_left_empty_is_open_where_all_models_have_the_same_languages() -> None:
    assert choose_translator("", "", "", {"b": ("de", "en"), "a": ("de", "en")}) == "a"
