"""Named judges: how good a completion is, by a rule instead of a person.

They rank completions (rank.py) and, since they are not what the reward model says, tell whether PPO made the policy
better or only its reward (evaluate).
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence

from training.data.chats import Message
from training.run import StageError

Judge = Callable[[Sequence[Message], str], float]  # (prompt, completion) -> score, higher is better


def judge(name: str) -> Judge:
    """The judge of that name, which a recipe's `judge` may be. Raises StageError where its package is missing."""
    if importlib.util.find_spec("vaderSentiment") is None:
        raise StageError("judge='vader': needs the package vaderSentiment; install it: pip install chatforge[demo]")
    return JUDGES[name]


def _vader(prompt: Sequence[Message], completion: str) -> float:
    """Friendlier is better: VADER's compound sentiment in [-1, 1] (Hutto and Gilbert 2014), whatever was asked.

    Saying nothing scores -1, below every word: VADER itself calls an empty text neutral, as good as most answers.
    """
    return _vader_analyzer().polarity_scores(completion)["compound"] if completion.strip() else -1.0


@functools.cache
def _vader_analyzer():  # type: ignore[no-untyped-def]
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


JUDGES: dict[str, Judge] = {"vader": _vader}
