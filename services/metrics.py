"""Metrics under the names that vLLM's users know, in seconds, tokens and images, through Ray to Prometheus."""

import functools
import time
from collections.abc import Sequence
from typing import Any, TypeVar

from ray.serve.metrics import Counter, Gauge, Histogram

from serving.engine.api import Chunk, EngineStats, FinishReason
from serving.image.api import PainterStats
from serving.translation.api import Piece, Translation, TranslatorStats

_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
_TAGS = ("model_name",)
_ENDED: Any = ("model_name", "finished_reason")  # Ray's types know tuples of one alone
_OF_ERRORS: Any = ("method", "code")
_BY_MODEL = (_SECONDS, _TAGS)

_Metric = TypeVar("_Metric", Counter, Gauge, Histogram)


class _ModelMetrics:
    """What one model of one replica publishes, tagged with the model's name, whatever it does."""

    def __init__(self, model: str) -> None:
        self.running = _tagged(Gauge("num_requests_running", "Sequences that are worked on", _TAGS), model)
        self.waiting = _tagged(Gauge("num_requests_waiting", "Sequences that wait for a slot", _TAGS), model)
        self.request_time = _tagged(Histogram("e2e_request_latency_seconds", "Whole requests", *_BY_MODEL), model)
        self.success = _tagged(Counter("request_success", "Answered requests, by why they ended", _ENDED), model)

    def _show_load(self, stats: EngineStats | TranslatorStats | PainterStats) -> None:
        self.running.set(stats.num_requests_running)
        self.waiting.set(stats.num_requests_waiting)

    def ended(self, started: float, reason: FinishReason) -> None:
        """A whole request, which had passed its checks at `started` of time.perf_counter()."""
        self.request_time.observe(time.perf_counter() - started)
        self.success.inc(tags={"finished_reason": reason})


class _TextMetrics(_ModelMetrics):
    """The same of a model that makes tokens out of tokens."""

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.prompt_tokens = _tagged(Counter("prompt_tokens", "Tokens of answered prompts", _TAGS), model)
        self.generation_tokens = _tagged(Counter("generation_tokens", "Tokens made", _TAGS), model)


class ChatMetrics(_TextMetrics):
    """A chat model's; a sequence is a request's answer."""

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.first_token = _tagged(Histogram("time_to_first_token_seconds", "Until first token", *_BY_MODEL), model)
        self.queue_time = _tagged(Histogram("request_queue_time_seconds", "Until a slot is free", *_BY_MODEL), model)
        self.next_token = _tagged(Histogram("inter_token_latency_seconds", "Between outputs", *_BY_MODEL), model)
        self.cache_usage = _tagged(Gauge("kv_cache_usage_perc", "Part of the cache in use, 0 to 1", _TAGS), model)

    def show(self, stats: EngineStats) -> None:
        self._show_load(stats)
        self.cache_usage.set(stats.kv_cache_usage_perc)


class TranslationMetrics(_TextMetrics):
    """A translation model's; a sequence is a sentence."""

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.texts = _tagged(Counter("translated_texts", "Texts of answered requests", _TAGS), model)

    def show(self, stats: TranslatorStats) -> None:
        self._show_load(stats)

    def answered(self, started: float, texts: int, made: Sequence[Translation | Piece]) -> None:
        """As `ended`; a request was cut where any of its texts was."""
        self.ended(started, "length" if any(_reason(part) == "length" for part in made) else "stop")
        self.texts.inc(texts)
        if tokens := sum(part.prompt_tokens for part in made):  # Ray's counters refuse 0
            self.prompt_tokens.inc(tokens)
            self.generation_tokens.inc(sum(part.completion_tokens for part in made))


def _reason(part: Translation | Piece) -> FinishReason:
    return part.finish_reason if isinstance(part, Piece) else part.hypotheses[0].finish_reason


class ImageMetrics(_ModelMetrics):
    """An image model's; a sequence is a request."""

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.images = _tagged(Counter("generated_images", "Images of answered requests", _TAGS), model)

    def show(self, stats: PainterStats) -> None:
        self._show_load(stats)

    def answered(self, started: float, images: int) -> None:
        """As `ended`."""
        self.ended(started, "stop")
        self.images.inc(images)


class RequestTimes:
    """The clock of one request: it starts when the request has passed its checks."""

    def __init__(self, metrics: ChatMetrics, prompt_tokens: int) -> None:
        self._metrics, self._prompt_tokens = metrics, prompt_tokens
        self._started = self._last = time.perf_counter()
        self._first = True

    def saw(self, chunk: Chunk) -> None:
        now = time.perf_counter()
        if self._first:
            self._metrics.first_token.observe(now - self._last)
            self._metrics.queue_time.observe(chunk.queue_seconds)
            self._metrics.prompt_tokens.inc(self._prompt_tokens)
        else:
            self._metrics.next_token.observe(now - self._last)
        self._metrics.generation_tokens.inc(len(chunk.token_ids))
        self._last, self._first = now, False
        if chunk.finish_reason is not None:
            self._metrics.ended(self._started, chunk.finish_reason)


def count_error(method: str, code: str) -> None:
    """A call that ended with an error of ours; `method` is the RPC's name, `code` gRPC's."""
    _errors().inc(tags={"method": method, "code": code})


@functools.cache
def _errors() -> Counter:
    """Made where it is first needed, in a replica: Ray adds the tags of the process that makes it."""
    return Counter("request_errors", "Calls that ended with an error of ours", _OF_ERRORS)


def _tagged(metric: _Metric, model: str) -> _Metric:
    metric.set_default_tags({"model_name": model})
    return metric
