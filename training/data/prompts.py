"""Prompts to answer: `{"prompt": "Hello!"}`, a list of messages that ends with the user's turn, or whole chats.

A chat (`messages`) gives one prompt for each of its user turns, with the history before it. `id` works as in chats.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from training.data.chats import Message, check_messages, first_user_message, spoken
from training.data.records import Fields
from training.data.sources import read, record_key


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for the assistant's turn."""

    messages: list[Message]
    key: str

    @property
    def identity(self) -> str:
        return spoken(self.messages)


def read_prompts(sources: Sequence[str]) -> list[Prompt]:
    """Every prompt of the sources; raises DataError pointing to the first record that is wrong."""
    return list(read(sources, _parse))


def as_messages(prompt: Any) -> list[Message]:
    """A prompt as files have it (a text, or messages that end with the user's) as messages; raises ValueError."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return check_messages(prompt, last="user", field="prompt")


def _parse(fields: Fields) -> list[Prompt]:
    if "prompt" in fields:
        messages = as_messages(fields["prompt"])
        return [Prompt(messages, record_key(fields, first_user_message(messages)))]
    if "messages" not in fields:
        raise ValueError("prompt: is missing (or messages, to take a chat's user turns)")
    chat = fields["messages"]
    ends_with_user = isinstance(chat, list) and chat and isinstance(chat[-1], dict) and chat[-1].get("role") == "user"
    messages = check_messages(chat, last="user" if ends_with_user else "assistant")
    key = record_key(fields, first_user_message(messages))
    turns = [index for index, message in enumerate(messages) if message["role"] == "user"]
    return [Prompt(messages[: index + 1], key) for index in turns]
