"""Metrics under the names that vLLM's users know, in seconds and tokens, through Ray to Prometheus."""

import time
from typing import TypeVar

from ray.serve.metrics import Counter, Gauge, Histogram

from serving.engine.api import Chunk, EngineStats

_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
_TAGS = ("model_name",)
_BY_MODEL = (_SECONDS, _TAGS)

_Metric = TypeVar("_Metric", Counter, Gauge, Histogram)


class ChatMetrics:
    """What one model of one replica publishes, tagged with the model's name."""

    def __init__(self, model: str) -> None:
        self.first_token = _tagged(Histogram("time_to_first_token_seconds", "Until first token", *_BY_MODEL), model)
        self.queue_time = _tagged(Histogram("request_queue_time_seconds", "Until a slot is free", *_BY_MODEL), model)
        self.next_token = _tagged(Histogram("inter_token_latency_seconds", "Between outputs", *_BY_MODEL), model)
        self.prompt_tokens = _tagged(Counter("prompt_tokens", "Tokens of answered prompts", _TAGS), model)
        self.generation_tokens = _tagged(Counter("generation_tokens", "Tokens made", _TAGS), model)
        self.running = _tagged(Gauge("num_requests_running", "Requests that hold an engine's slot", _TAGS), model)
        self.waiting = _tagged(Gauge("num_requests_waiting", "Requests that wait for a slot", _TAGS), model)
        self.cache_usage = _tagged(Gauge("kv_cache_usage_perc", "Part of the cache in use, 0 to 1", _TAGS), model)

    def show(self, stats: EngineStats) -> None:
        self.running.set(stats.num_requests_running)
        self.waiting.set(stats.num_requests_waiting)
        self.cache_usage.set(stats.kv_cache_usage_perc)


class RequestTimes:
    """The clock of one request: it starts when the request has passed its checks."""

    def __init__(self, metrics: ChatMetrics, prompt_tokens: int) -> None:
        self._metrics, self._prompt_tokens = metrics, prompt_tokens
        self._last = time.perf_counter()
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


def _tagged(metric: _Metric, model: str) -> _Metric:
    metric.set_default_tags({"model_name": model})
    return metric
