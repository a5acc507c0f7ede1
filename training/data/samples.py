"""The demo's data, read out of packages that pip installs: nobody's data is copied into this project.

sample:chitchat-text      documents: whole two-person conversations, one turn a line
sample:chitchat           chats: short exchanges cut from the same conversations
sample:chitchat-prompts   prompts: openers and questions from them
sample:emoji-names        sentence pairs: German and English names of pictograms
"""

import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from training.data import chitchat, emoji_names
from training.data.records import DataError, Fields


@dataclass(frozen=True)
class Sample:
    """A reader, and the package that it reads."""

    package: str
    module: str
    read: Callable[[], Iterator[Fields]]


SAMPLES = {
    "chitchat-text": Sample("chitchat-dataset", "chitchat_dataset", chitchat.documents),
    "chitchat": Sample("chitchat-dataset", "chitchat_dataset", chitchat.chats),
    "chitchat-prompts": Sample("chitchat-dataset", "chitchat_dataset", chitchat.prompts),
    "emoji-names": Sample("emoji", "emoji", emoji_names.pairs),
}


def check(name: str) -> Sample:
    """The sample of that name; raises DataError where there is none, or its package is not installed."""
    if name not in SAMPLES:
        raise DataError(f"sample:{name}: there is no such sample; there are {', '.join(SAMPLES)}")
    sample = SAMPLES[name]
    if importlib.util.find_spec(sample.module) is None:
        raise DataError(f"sample:{name}: needs the package {sample.package}; install it: pip install chatforge[demo]")
    return sample


def version(name: str) -> str:
    """What the sample's content follows from: the package's version and the code that tidies it."""
    sample = check(name)
    code = hashlib.sha256(Path(sample.read.__code__.co_filename).read_bytes()).hexdigest()[:16]
    return f"{sample.package} {importlib.metadata.version(sample.package)}, tidied by {code}"


def read(name: str) -> Iterator[Fields]:
    """The sample's records, with the fields that a jsonl file of its kind would have."""
    return check(name).read()
