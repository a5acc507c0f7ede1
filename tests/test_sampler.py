"""Each draw against a slow oracle that works on one row and one token at a time."""

import math
import random

import pytest
import torch
from torch import Tensor

from serving.engine import sampler
from serving.engine.api import SamplingParams

VOCAB = 300


def slow_distribution(logits: list[float], params: SamplingParams, seen: set[int]) -> list[float]:
    """The distribution one row is drawn from, by the definitions, in plain Python."""
    scores = list(logits)
    for token in seen:
        score = scores[token]
        scores[token] = score / params.repetition_penalty if score > 0 else score * params.repetition_penalty
    scores = [score / params.temperature for score in scores]
    if params.top_k:
        last = sorted(scores, reverse=True)[min(params.top_k, len(scores)) - 1]
        scores = [score if score >= last else -math.inf for score in scores]
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    probs = [weight / sum(weights) for weight in weights]
    if params.top_p < 1:
        probs = [p if sum(q for q in probs if q > p) < params.top_p else 0.0 for p in probs]
    return probs


def slow_draw(probs: list[float], u: float) -> int:
    target, total = u * sum(probs), 0.0
    for token, p in enumerate(probs):
        total += p
        if total > target:
            return token
    raise AssertionError("unreachable: u is below 1")


def rows(count: int, seed: int, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(seed))


MIXED = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.3, top_p=0.9),
    SamplingParams(temperature=2.0, top_k=5),
    SamplingParams(temperature=1.3, top_k=40, top_p=0.5),
    SamplingParams(temperature=0.8, repetition_penalty=1.7),
    SamplingParams(temperature=0.0, repetition_penalty=5.0),
    SamplingParams(temperature=5.0, top_p=0.999, top_k=1000),
]


def test_a_mixed_batch_draws_what_the_oracle_draws() -> None:
    random.seed(3)
    for seed in range(20):
        logits = rows(len(MIXED), seed)
        uniforms = [random.random() for _ in MIXED]
        histories = [random.sample(range(VOCAB), 30) for _ in MIXED]
        drawn = sampler.next_tokens(logits, MIXED, uniforms, histories).tolist()
        for row, params in enumerate(MIXED):
            scores, seen = logits[row].tolist(), set(histories[row])
            if params.temperature == 0:
                greedy = SamplingParams(repetition_penalty=params.repetition_penalty, top_k=1)
                assert drawn[row] == slow_draw(slow_distribution(scores, greedy, seen), 0.0)
            else:
                assert drawn[row] == slow_draw(slow_distribution(scores, params, seen), uniforms[row]), params


@pytest.mark.parametrize("temperature", [1e-38, 1e-10])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    """Logits over it were infinite, and every token the vocabulary's last."""
    logits = rows(6, seed=5, spread=30.0)
    params = [SamplingParams(temperature=temperature, top_k=k, top_p=p) for k in (0, 7) for p in (1.0, 0.5, 0.9)]
    drawn = sampler.next_tokens(logits, params, [0.01, 0.2, 0.4, 0.6, 0.8, 0.99], [[]] * 6)
    assert drawn.tolist() == logits.argmax(1).tolist()


def test_a_row_draws_the_same_alone_and_among_others() -> None:
    logits, histories = rows(len(MIXED), 7), [[1, 2, 3]] * len(MIXED)
    uniforms = [sampler.uniform(5, i) for i in range(len(MIXED))]
    together = sampler.next_tokens(logits, MIXED, uniforms, histories).tolist()
    alone = [
        int(sampler.next_tokens(logits[i : i + 1], [params], uniforms[i : i + 1], histories[:1]))
        for i, params in enumerate(MIXED)
    ]
    assert together == alone


def test_the_logits_handed_in_are_left_as_they_are() -> None:
    logits = rows(len(MIXED), 1)
    before = logits.clone()
    sampler.next_tokens(logits, MIXED, [0.5] * len(MIXED), [[1, 2]] * len(MIXED))
    assert torch.equal(logits, before)


def test_top_k_keeps_ties_with_the_last_and_zero_keeps_all() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]] * 3)
    kept = sampler.top_k(logits, torch.tensor([2, 0, 1])).isfinite()
    assert kept.tolist() == [[False, True, True, True, False], [True] * 5, [False, True, False, False, False]]


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.99999])
def test_top_p_finds_the_nucleus_beyond_its_first_candidates(p: float) -> None:
    flat = torch.linspace(0, 1, 5000)[None].softmax(1)  # 128 candidates hold a fraction of this mass
    kept = sampler.top_p(flat, torch.tensor([p]))[0] > 0
    ordered = flat[0].double().sort(descending=True).values
    assert int(kept.sum()) == pytest.approx(int((ordered.cumsum(0) - ordered < p).sum()), abs=2)
    assert flat[0][kept].min() >= flat[0][~kept].max() if p < 0.9999 else True


def test_draws_follow_the_distribution() -> None:
    probs = torch.tensor([0.1, 0.0, 0.6, 0.3])
    uniforms = torch.tensor([sampler.uniform(1, i) for i in range(4000)], dtype=torch.float64)
    counts = sampler.draw(probs.expand(4000, 4), uniforms).bincount(minlength=4) / 4000
    assert counts.tolist() == pytest.approx(probs.tolist(), abs=0.03)
    assert counts[1] == 0


def test_uniforms_are_reproducible_and_differ_by_seed_and_index() -> None:
    assert sampler.uniform(1, 2) == sampler.uniform(1, 2)
    values = {sampler.uniform(seed, index) for seed in (0, 1, 2**63 - 1) for index in range(100)}
    assert len(values) == 300
    assert all(0 <= value < 1 for value in values)


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = rows(4, 2)
    tokens = torch.tensor([0, 5, 299, 7])
    want = [
        math.log(slow_distribution(logits[i].tolist(), SamplingParams(), set())[int(t)]) for i, t in enumerate(tokens)
    ]
    assert sampler.token_logprobs(logits, tokens).tolist() == pytest.approx(want, abs=1e-4)
