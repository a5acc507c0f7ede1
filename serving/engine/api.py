"""What every engine speaks: SamplingParams in, Chunks out."""

from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from serving.api import FinishReason

MIN_CONTEXT_TOKENS = 2  # one of the prompt and one of the answer


@dataclass(frozen=True)
class SamplingParams:
    """How one completion is drawn.

    temperature 0 is greedy. top_k 0 and top_p 1.0 are off. The seed fixes the draws whatever else is in the batch;
    None draws a fresh one, which the first Chunk's `seed` names. `stop` strings are cut from the text.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError naming the field and its range."""
        checks = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0.0 <= self.temperature <= 100.0, "between 0 and 100"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("repetition_penalty", 0.0 < self.repetition_penalty <= 100.0, "above 0 and at most 100"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "between 0 and 2^63 - 1"),
            ("stop", all(self.stop), "non-empty strings"),
        )
        for name, valid, wanted in checks:
            if not valid:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {wanted}")


@dataclass(frozen=True)
class Chunk:
    """What came since the last one. `text` never ends inside a UTF-8 character or what may become a stop string."""

    text: str
    token_ids: tuple[int, ...]
    seed: int
    logprobs: tuple[float, ...] = ()  # of token_ids under the model's own distribution, temperature 1, no filters
    finish_reason: FinishReason | None = None  # set on the last chunk alone
    queue_seconds: float = 0.0  # that the request waited for its slot


def joined(chunks: Iterable[Chunk]) -> Chunk:
    """Successive chunks of one answer as one. At least one is needed."""
    parts = list(chunks)
    return Chunk(
        text="".join(c.text for c in parts),
        token_ids=tuple(t for c in parts for t in c.token_ids),
        seed=parts[0].seed,
        logprobs=tuple(p for c in parts for p in c.logprobs),
        finish_reason=parts[-1].finish_reason,
        queue_seconds=parts[0].queue_seconds,
    )


@dataclass(frozen=True)
class Completion:
    """One whole answer, as `generate_all` gives it.

    `token_ids` holds every token drawn, the ending eos token included (PPO rewards it); `text` holds neither special
    tokens, nor a stop string or what follows it, nor a character that was cut off inside its UTF-8 bytes.
    """

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]  # as in Chunk; empty unless asked for
    finish_reason: FinishReason
    seed: int


@dataclass(frozen=True)
class EngineStats:
    """A moment's counts; names as vLLM's metrics have them."""

    num_requests_running: int
    num_requests_waiting: int
    kv_cache_usage_perc: float  # 0 to 1
    prompt_tokens: int  # since the start
    generation_tokens: int


class Engine(Protocol):
    """Answers prompts, many at a time."""

    context_tokens: int  # of prompt and answer together, at the most
    device_is_lost: bool  # every later step would fail: nothing but another process helps

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams, request_id: str) -> AsyncIterator[Chunk]:
        """Streams one completion; closing the iterator frees its slot by the next step.

        Raises ValueError where the prompt does not fit, QueueFull where too many wait, EngineClosed after drain().
        """
        ...

    def stats(self) -> EngineStats: ...

    async def drain(self) -> None:
        """Takes no new requests and returns when those that are open have ended."""
        ...

    def close(self) -> None:
        """Ends every request with EngineClosed."""
        ...
