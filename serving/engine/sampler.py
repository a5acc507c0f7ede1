"""Draws: logits [rows, vocab] to one token per row, as pure functions of tensors.

Every function works row by row: what a row draws does not depend on the rows beside it. A token is drawn by inverting
the cumulative distribution at one uniform number per row, which is a hash of (seed, number of the token): no generator
state, nothing to carry or to restore.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from serving.engine.api import SamplingParams


def next_tokens(
    logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float], histories: Sequence[list[int]]
) -> Tensor:
    """Token ids [rows] from float32 `logits` [rows, vocab].

    Row i is drawn by `params[i]` at `uniforms[i]`; `histories[i]` are the tokens before it, for the penalty.
    """
    logits = _penalised(logits, params, histories)
    tokens = logits.argmax(1)
    rows = [i for i, p in enumerate(params) if p.temperature > 0]
    if not rows:
        return tokens
    params, device = [params[i] for i in rows], logits.device
    drawn = logits[rows]
    drawn = drawn - drawn.amax(1, keepdim=True)  # so that a temperature near 0 makes no infinity but of minus
    drawn = drawn / torch.tensor([p.temperature for p in params], device=device)[:, None]
    drawn = _where(lambda p: p.top_k > 0, params, drawn, lambda x, ps: top_k(x, _column(ps, "top_k", x)))
    probs = drawn.softmax(1)
    probs = _where(lambda p: p.top_p < 1, params, probs, lambda x, ps: top_p(x, _column(ps, "top_p", x)))
    tokens[rows] = draw(probs, torch.tensor([uniforms[i] for i in rows], device=device, dtype=torch.float64))
    return tokens


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities [rows] of `tokens` [rows] under the model's own distribution `logits` [rows, vocab]."""
    return logits.log_softmax(1).gather(1, tokens[:, None])[:, 0]


def _penalised(logits: Tensor, params: Sequence[SamplingParams], histories: Sequence[list[int]]) -> Tensor:
    rows = [i for i, p in enumerate(params) if p.repetition_penalty != 1.0]
    if not rows:
        return logits
    seen = torch.zeros(len(rows), logits.shape[1], dtype=torch.bool, device=logits.device)
    for row, i in enumerate(rows):
        seen[row, histories[i]] = True
    logits = logits.clone()
    penalty = _column([params[i] for i in rows], "repetition_penalty", logits)
    logits[rows] = repetition_penalty(logits[rows], seen, penalty)
    return logits


def _column(params: Sequence[SamplingParams], field: str, like: Tensor) -> Tensor:
    return torch.tensor([getattr(p, field) for p in params], device=like.device)


def _where(
    wanted: Callable[[SamplingParams], bool],
    params: Sequence[SamplingParams],
    x: Tensor,
    change: Callable[[Tensor, list[SamplingParams]], Tensor],
) -> Tensor:
    """`x` [rows, vocab] with the rows whose params are `wanted` changed."""
    rows = [i for i, p in enumerate(params) if wanted(p)]
    if rows:
        x[rows] = change(x[rows], [params[i] for i in rows])
    return x


def uniform(seed: int, index: int) -> float:
    """The number in [0, 1) that decides token `index` of the completion with this seed."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + index.to_bytes(8, "little"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def repetition_penalty(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """CTRL's penalty (Keskar et al. 2019, 4.1) as transformers applies it.

    `logits` [rows, vocab] of tokens in `seen` [rows, vocab] are divided by `penalty` [rows] when above zero,
    multiplied when below.
    """
    penalty = penalty[:, None]
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def top_k(logits: Tensor, k: Tensor) -> Tensor:
    """Keeps the `k` [rows] largest logits of each row, and what ties with the last of them; 0 keeps all."""
    largest = logits.topk(min(int(k.max()), logits.shape[1]), dim=1).values
    last = largest.gather(1, (k.clamp(1, largest.shape[1]) - 1)[:, None])
    return logits.masked_fill((logits < last) & (k > 0)[:, None], -torch.inf)


def top_p(probs: Tensor, p: Tensor) -> Tensor:
    """Nucleus (Holtzman et al. 2020): keeps each token whose strictly more probable ones have a mass below `p` [rows].

    The others get 0; rows are not renormalised. Sorting the whole vocabulary is slow, and the nucleus is mostly small:
    a few candidates come first, more of them only where their mass falls short.
    """
    candidates = 128
    while True:
        candidates = min(candidates, probs.shape[1])
        largest = probs.topk(candidates, dim=1).values
        before = largest.cumsum(1) - largest
        if candidates == probs.shape[1] or bool((before[:, -1] >= p).all()):
            break
        candidates *= 16
    inside = (before < p[:, None]).sum(1, keepdim=True).clamp(min=1)
    smallest = largest.gather(1, inside - 1)
    return probs.masked_fill(probs < smallest, 0.0)


def draw(probs: Tensor, u: Tensor) -> Tensor:
    """Token ids [rows] at which the cumulative sum of `probs` [rows, vocab] passes `u` [rows] of the row's whole."""
    cumulative = probs.cumsum(1, dtype=torch.float64)
    target = u.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=probs.shape[1] - 1)
