"""Which records are held out: one rule for every stage, by document, chat or prompt and never by line.

The side of a record is a hash of the run's seed and the record's key, so it depends on nothing else that is in the
data: a held-out conversation is held out of SFT, ranking and PPO alike, and stays so when data is added.
"""

import hashlib
import operator
import re
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

_NOT_WORD = re.compile(r"[^\w\s]+")
_ARTICLES = frozenset({"a", "an", "the"})


class Record(Protocol):
    """What can be split."""

    @property
    def key(self) -> str:
        """Hashed for the side: records that belong together share it."""
        ...

    @property
    def identity(self) -> str:
        """The text by which two records are the same one."""
        ...


R = TypeVar("R", bound=Record)


def held_out(key: str, seed: int, val_fraction: float) -> bool:
    """Whether the record with this key is on the held-out side; a pure function, the same on every machine."""
    digest = hashlib.sha256(f"{seed}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < val_fraction * 2**64


def split(records: Iterable[R], seed: int, val_fraction: float) -> tuple[list[R], list[R]]:
    """(training side, held-out side), each in the given order.

    The held-out side loses what the training side also has (case, punctuation and articles apart), and its own
    repeats, so a held-out score is of texts that were never trained on.
    """
    sides: tuple[list[R], list[R]] = ([], [])
    for record in records:
        sides[held_out(record.key, seed, val_fraction)].append(record)
    return sides[0], unseen(sides[1], sides[0])


def unseen(
    records: Iterable[R], others: Iterable[R] = (), by: Callable[[R], str] = operator.attrgetter("identity")
) -> list[R]:
    """The records whose text, given by `by`, neither `others` nor an earlier one of `records` has in the same words."""
    seen = {digest(by(other)) for other in others}
    kept = []
    for record in records:
        mark = digest(by(record))
        if mark not in seen:
            seen.add(mark)
            kept.append(record)
    return kept


def digest(text: str) -> bytes:
    """16 bytes that texts share when they differ in nothing but case, punctuation, articles and spaces."""
    return hashlib.blake2b(normalised(text).encode(), digest_size=16).digest()


def normalised(text: str) -> str:
    """`text` without case, punctuation, articles and surplus spaces; text of nothing else stays as it is."""
    words = _NOT_WORD.sub("", text.casefold()).split()
    return " ".join(word for word in words if word not in _ARTICLES) or text.strip()
