"""Metrics under the names that vLLM's users know, in seconds and tokens, through Ray to Prometheus."""

import time

from ray.serve.metrics import Counter, Gauge, Histogram

from serving.engine.api import Chunk, EngineStats

_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]


class ChatMetrics:
    """What one model of one replica publishes, tagged with the model's name."""

    def __init__(self, model: str) -> None:
        def tagged(kind: type, name: str, text: str, **more: list[float]) -> Counter | Gauge | Histogram:
            metric = kind(name, description=text, tag_keys=("model_name",), **more)
            metric.set_default_tags({"model_name": model})
            return metric

        buckets = {"boundaries": _SECONDS}
        self.first_token = tagged(Histogram, "time_to_first_token_seconds", "Request to first token", **buckets)
        self.next_token = tagged(Histogram, "inter_token_latency_seconds", "Between successive outputs", **buckets)
        self.prompt_tokens = tagged(Counter, "prompt_tokens", "Tokens of prompts that were answered")
        self.generation_tokens = tagged(Counter, "generation_tokens", "Tokens made")
        self.running = tagged(Gauge, "num_requests_running", "Requests that hold a slot of the engine")
        self.waiting = tagged(Gauge, "num_requests_waiting", "Requests that wait for a slot")
        self.cache_usage = tagged(Gauge, "kv_cache_usage_perc", "Part of the engine's cache in use, 0 to 1")

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
            self._metrics.prompt_tokens.inc(self._prompt_tokens)
        else:
            self._metrics.next_token.observe(now - self._last)
        self._metrics.generation_tokens.inc(len(chunk.token_ids))
        self._last, self._first = now, False
