"""Chats to learn from: `{"messages": [{"role": "user", "content": "…"}, …], "label": "good"}`, one JSON object a line.

`label` is optional: chats labelled bad teach nothing, and are counted. `id` is optional too: records with the same id
fall on the same side of the split.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from training.data.records import Fields
from training.data.sources import read, record_key
from training.data.split import normalised

Message = dict[str, str]  # role: system, user or assistant; content

LABELS = ("good", "bad")


@dataclass(frozen=True)
class Chat:
    """A conversation that ends with the assistant's turn."""

    messages: list[Message]
    key: str
    label: Literal["good", "bad"] | None = None

    @property
    def identity(self) -> str:
        return spoken(self.messages)


def read_chats(sources: Sequence[str]) -> tuple[list[Chat], dict[str, int]]:
    """The chats that teach (good or unlabelled), and how many records were `good`, `bad` and `unlabelled`.

    Raises DataError pointing to the first record that is wrong, or when no chat is left to teach.
    """
    counts: Counter[str] = Counter({"good": 0, "bad": 0, "unlabelled": 0})
    teaching = []
    for chat in read(sources, lambda fields: [_parse(fields)]):
        counts[chat.label or "unlabelled"] += 1
        if chat.label != "bad":
            teaching.append(chat)
    return teaching, dict(counts)


def check_messages(messages: Any, last: Literal["user", "assistant"], field: str = "messages") -> list[Message]:
    """`messages` as roles and contents alone: an optional system message, then user and assistant in turn.

    Raises ValueError naming the first element that breaks this, or when the last one is not of role `last`.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{field}: must be a non-empty list of messages")
    checked = [_check_message(message, f"{field}[{index}]") for index, message in enumerate(messages)]
    turns = checked[1:] if checked[0]["role"] == "system" else checked
    offset = len(checked) - len(turns)
    for index, message in enumerate(turns):
        wanted = ("user", "assistant")[index % 2]
        if message["role"] != wanted:
            where = f"{field}[{index + offset}].role"
            raise ValueError(f"{where}: is {message['role']!r} where {wanted!r} is next (user and assistant in turn)")
    if not turns or turns[-1]["role"] != last:
        raise ValueError(f"{field}: the last message must be of role {last!r}, not {checked[-1]['role']!r}")
    return checked


def first_user_message(messages: Sequence[Message]) -> str:
    """What a conversation without an id is known by, in the words that `split.normalised` leaves."""
    return normalised(next(message["content"] for message in messages if message["role"] == "user"))


def spoken(messages: Sequence[Message]) -> str:
    """Every content of a conversation, one a line."""
    return "\n".join(message["content"] for message in messages)


def _check_message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"{where}: must be an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"{where}.role: {role!r} is none of system (first only), user, assistant")
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"{where}.content: must be a text that is not empty")
    return {"role": role, "content": content}


def _parse(fields: Fields) -> Chat:
    if "messages" not in fields:
        raise ValueError("messages: is missing")
    messages = check_messages(fields["messages"], last="assistant")
    label = fields.get("label")
    if label not in (*LABELS, None):
        raise ValueError(f"label: {label!r} is neither good nor bad (leave it out where there is none)")
    return Chat(messages, record_key(fields, first_user_message(messages)), label)
