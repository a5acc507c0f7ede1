"""Small talk between students (chitchat-dataset, MIT licence): documents, chats and prompts for the demo.

The conversations are tidied, since a model of a few million parameters has better uses for its capacity than five
spellings of "don't": spaces, capitals, the commonest contractions and laughter. The `id` of every record is its
conversation's, so a held-out conversation is held out of all three.
"""

import functools
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.data.records import Fields

MAX_PROMPT = 50  # characters
MAX_USER = 100  # characters of a user's turn in a chat
MAX_ASSISTANT = 120
MAX_TURNS = 4  # of a chat: two exchanges
MAX_DOCUMENT_TURN = 400  # longer turns are pasted texts


def documents() -> Iterator[Fields]:
    for key, turns in _conversations():
        lines = [text for text in turns if text and len(text) <= MAX_DOCUMENT_TURN]
        if len(lines) >= 2:
            yield {"id": key, "text": "\n".join(lines)}


def chats() -> Iterator[Fields]:
    """Exchanges that begin with a greeting or a question, so that they make sense without what came before.

    Each goes on while turns stay short. The next one may begin with this one's last turn: both speakers are users in
    some chats and assistants in others.
    """
    for key, turns in _conversations():
        start = 0
        while start < len(turns) - 1:
            opener = _opener(turns[start])
            window = _window([opener, *turns[start + 1 : start + MAX_TURNS]]) if opener else []
            if window:
                roles = itertools.cycle(("user", "assistant"))
                messages = [{"role": role, "content": text} for role, text in zip(roles, window, strict=False)]
                yield {"id": key, "messages": messages}
            start += max(1, len(window) - 1)


def prompts() -> Iterator[Fields]:
    for key, turns in _conversations():
        openers = (_opener(turn) for turn in turns)
        yield from ({"id": key, "prompt": text} for text in openers if _short(text, MAX_PROMPT))


def _opener(turn: str) -> str:
    """What of a turn can be answered by someone who has read no other: a greeting, or the question it ends with."""
    if _GREETING.match(turn):
        return turn
    question = re.split(r"(?<=[.!?)]) ", turn)[-1]
    return question if question.endswith("?") and len(question.split()) >= 3 else ""


def _window(turns: list[str]) -> list[str]:
    """The whole exchanges that `turns` starts with and that are short enough; each is a user's and a reply."""
    kept: list[str] = []
    for user, assistant in zip(turns[::2], turns[1::2], strict=False):
        if not (_short(user, MAX_USER) and _short(assistant, MAX_ASSISTANT)):
            break
        kept += [user, assistant]
    return kept


def _short(text: str, limit: int) -> bool:
    return 2 <= len(text) <= limit


@functools.cache
def _conversations() -> list[tuple[str, list[str]]]:
    """(id, tidied turns) of every conversation between two people; consecutive messages of one make one turn.

    A turn that tidying left nothing of is an empty text, so that the speakers still alternate.
    """
    import chitchat_dataset

    path = Path(chitchat_dataset.__file__).with_name("dataset.json")
    conversations = json.loads(path.read_text("utf-8"))
    return [(key, _turns(value["messages"])) for key, value in conversations.items() if _is_dialogue(value)]


def _is_dialogue(conversation: dict[str, Any]) -> bool:
    return len({message["sender"] for turn in conversation["messages"] for message in turn}) == 2


def _turns(messages: list[list[dict[str, str]]]) -> list[str]:
    flat = itertools.chain.from_iterable(messages)
    by_speaker = itertools.groupby(flat, key=lambda message: message["sender"])
    return [" ".join(filter(None, (tidy(message["text"]) for message in group))) for _, group in by_speaker]


_APOSTROPHES = """
    i'm don't doesn't didn't can't couldn't wouldn't shouldn't isn't aren't wasn't weren't haven't hasn't hadn't ain't
    that's what's he's she's there's here's where's who's how's you're they're i've you've we've they've you'll they'll
    you'd they'd y'all
"""  # not it's, we're, won't, let's, I'll, I'd: without the apostrophe these are other words
_SPELLINGS = {word.replace("'", ""): word for word in _APOSTROPHES.split()}
_SPELLINGS |= {"i": "I", "im": "I'm", "ive": "I've", "u": "you", "ur": "your"}
_GREETING = re.compile(r"(?:hi|hello|hey|howdy|good (?:morning|afternoon|evening))\b", re.IGNORECASE)
_MISSPELT = re.compile(rf"\b(?:{'|'.join(_SPELLINGS)})\b", re.IGNORECASE)
_LAUGHTER = re.compile(r"\b(?:b?a?(?:ha){2,}h?|hah+a*|(?:he){2,}|lo+l+)\b", re.IGNORECASE)


def tidy(text: str) -> str:
    """One message as a sentence: its spelling mended a little, a capital first, a stop last; "" for what is no prose.

    Links and corrections such as "*there" are no prose.
    """
    text = " ".join(text.split())
    if not text or text.startswith("*") or "http" in text or "www." in text or not text.isascii():
        return ""
    text = _LAUGHTER.sub("haha", text)
    text = _MISSPELT.sub(lambda match: _SPELLINGS[match[0].lower()], text)
    text = re.sub(r"([!?.])\1{2,}", r"\1", text)
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".!?)(:;,\"'" or not text[-1].isalnum() else text + "."
