"""What a translator speaks: TranslationParams in; whole Translations, or a text's Pieces as they come, out."""

from dataclasses import dataclass

from serving.api import FinishReason

MAX_NUM_BEAMS = 32


@dataclass(frozen=True)
class TranslationParams:
    """How every sentence of a text is decoded.

    A hypothesis's score is the sum of its tokens' logprobs / length ** length_penalty (as transformers has it, after
    Wu et al. 2016): above 0 favours long sentences, below 0 short ones. One beam is greedy.
    """

    num_beams: int = 4
    length_penalty: float = 1.0
    num_hypotheses: int = 1
    max_new_tokens: int = 256  # of one sentence

    def __post_init__(self) -> None:
        """Raises ValueError naming the field and its range."""
        checks = (
            ("num_beams", 1 <= self.num_beams <= MAX_NUM_BEAMS, f"between 1 and {MAX_NUM_BEAMS}"),
            ("length_penalty", -10.0 <= self.length_penalty <= 10.0, "between -10 and 10"),
            ("num_hypotheses", 1 <= self.num_hypotheses <= self.num_beams, f"between 1 and num_beams={self.num_beams}"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
        )
        for name, valid, wanted in checks:
            if not valid:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {wanted}")


@dataclass(frozen=True)
class Hypothesis:
    """One way to say the whole text."""

    text: str
    score: float  # summed over the text's sentences; 0.0 where there is nothing to translate
    finish_reason: FinishReason  # "length" where any sentence was cut at max_new_tokens


@dataclass(frozen=True)
class Translation:
    """One text."""

    hypotheses: tuple[Hypothesis, ...]  # best first; the n-th joins the n-th of each sentence
    prompt_tokens: int  # source tokens over all sentences
    completion_tokens: int  # tokens made for the best hypotheses, ends included


@dataclass(frozen=True)
class Piece:
    """A part of a streamed text: the pieces' texts joined are the best hypothesis of `translate`."""

    text: str  # one sentence with the white space and line breaks around it
    finish_reason: FinishReason  # of this sentence
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class TranslatorStats:
    """A moment's counts, in sentences; names as vLLM's metrics have them."""

    num_requests_running: int
    num_requests_waiting: int
    prompt_tokens: int  # since the start
    generation_tokens: int
