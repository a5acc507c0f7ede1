"""Ranked completions of a prompt, for the reward model.

    {"prompt": "Hello!", "completions": ["Go away.", "Hi!", "Hello there!"], "ranking": [2, 1, 1]}
    {"prompt": "Hello!", "chosen": "Hi!", "rejected": "Go away."}

`ranking` has one rank for each completion in the completions' order: 1 is the best, equal ranks are a tie. Gaps do not
matter. `prompt` is a text or a list of messages that ends with the user's turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from training.data.chats import Message, first_user_message, spoken
from training.data.prompts import as_messages
from training.data.records import Fields
from training.data.sources import read, record_key


@dataclass(frozen=True)
class Ranking:
    """K completions of one prompt, and the rank of each."""

    prompt: list[Message]
    completions: list[str]
    ranks: list[int]  # 1 is the best; as many as completions
    key: str

    @property
    def identity(self) -> str:
        return spoken(self.prompt) + "\n" + "\n".join(self.completions)


def read_rankings(sources: Sequence[str]) -> list[Ranking]:
    """Every ranking of the sources, also those whose completions all tie (they have no pairs).

    Raises DataError pointing to the first record that is wrong.
    """
    return list(read(sources, lambda fields: [_parse(fields)]))


def _parse(fields: Fields) -> Ranking:
    if "prompt" not in fields:
        raise ValueError("prompt: is missing")
    prompt = as_messages(fields["prompt"])
    if "chosen" in fields or "rejected" in fields:
        completions = [_text(fields.get(name), name) for name in ("chosen", "rejected")]
        ranks = [1, 2]
    else:
        completions = _completions(fields.get("completions"))
        ranks = _ranks(fields.get("ranking"), len(completions))
    return Ranking(prompt, completions, ranks, record_key(fields, first_user_message(prompt)))


def _completions(value: Any) -> list[str]:
    if not isinstance(value, list) or len(value) < 2:
        raise ValueError("completions: must be a list of at least two texts (or give chosen and rejected)")
    return [_text(text, f"completions[{index}]") for index, text in enumerate(value)]


def _text(value: Any, where: str) -> str:
    """A completion may be empty: a model can say nothing, and be ranked last for it."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: must be a text, not {value!r}")
    return value


def _ranks(value: Any, completions: int) -> list[int]:
    numbers = isinstance(value, list) and all(isinstance(r, int) and not isinstance(r, bool) and r >= 1 for r in value)
    if not numbers:
        raise ValueError(
            f"ranking: must be a list of ranks, whole numbers from 1 (best), equal for ties; not {value!r}"
        )
    if len(value) != completions:
        raise ValueError(f"ranking: has {len(value)} ranks for {completions} completions; it needs one for each")
    return value
