"""What a request leaves in the metrics: how long it took, why it ended."""

import time
from typing import Any

import pytest
from ray.serve.metrics import Counter, Histogram

from services.metrics import ChatMetrics, ImageMetrics, RequestTimes, TranslationMetrics
from serving.engine.api import Chunk
from serving.translation.api import Hypothesis, Piece, Translation


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The last value or tag of each metric."""
    told: dict[str, Any] = {}

    def inc(self: Any, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        told[self.info["name"]] = (tags or {}).get("finished_reason", value)

    def observe(self: Any, value: float, tags: dict[str, str] | None = None) -> None:
        told[self.info["name"]] = value

    monkeypatch.setattr(Counter, "inc", inc)
    monkeypatch.setattr(Histogram, "observe", observe)
    return told


def test_an_answer_is_timed_from_its_checks_to_its_end(told: dict[str, Any]) -> None:
    times = RequestTimes(ChatMetrics("tiny"), 5)
    time.sleep(0.02)
    times.saw(Chunk("a", (1,), 0))
    assert "request_success" not in told and "e2e_request_latency_seconds" not in told
    time.sleep(0.02)
    times.saw(Chunk("b", (2,), 0, finish_reason="length"))
    assert told["request_success"] == "length"
    assert told["e2e_request_latency_seconds"] >= 0.04 > told["inter_token_latency_seconds"]


def test_a_request_is_cut_where_any_of_its_texts_is(told: dict[str, Any]) -> None:
    metrics = TranslationMetrics("de-en")
    whole, cut = (Translation((Hypothesis("a", 0.0, reason),), 1, 1) for reason in ("stop", "length"))
    metrics.answered(time.perf_counter(), 2, [cut, whole])
    assert told["request_success"] == "length" and told["translated_texts"] == 2
    metrics.answered(time.perf_counter(), 1, [Piece("a", "stop", 1, 1)])
    assert told["request_success"] == "stop"


def test_images_end_by_themselves(told: dict[str, Any]) -> None:
    ImageMetrics("painter").answered(time.perf_counter() - 1, 3)
    assert (told["request_success"], told["generated_images"]) == ("stop", 3)
    assert told["e2e_request_latency_seconds"] >= 1
