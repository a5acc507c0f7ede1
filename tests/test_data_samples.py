"""The demo's data, as the installed package has it."""

import importlib.util

import pytest

from training.data import chitchat
from training.data.chats import read_chats
from training.data.prompts import read_prompts
from training.data.records import DataError
from training.data.sources import resolve
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
