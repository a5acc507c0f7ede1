"""Greedy and beam search over the scores of the next token, for all sentences of a batch at once; knows no model.

Tokens, ranking and scores are those of `transformers.generate`. A row is one beam of one sentence: rows
i · beams .. (i + 1) · beams are sentence i's. `length` counts the tokens made, the end included, the start not.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from serving.api import FinishReason
from serving.translation.api import TranslationParams
from serving.translation.rules import Rules

_NEVER = -1.0e9  # added to the score of what must not be picked


@dataclass(frozen=True)
class Output:
    """One hypothesis of one sentence."""

    tokens: tuple[int, ...]  # the end included
    score: float
    finish_reason: FinishReason


@dataclass(frozen=True)
class Step:
    """What the search decided on one step."""

    tokens: Tensor  # [sentences, beams], to be read next
    parents: Tensor | None  # [sentences, beams], the beam that each one continues; None: each its own
    ended: dict[int, list[Output]]  # by sentence, best first


class Search(Protocol):
    def advance(self, logits: Tensor) -> Step:
        """Takes logits [rows, vocab] of the next tokens."""
        ...

    def keep(self, sentences: Tensor) -> None:
        """Goes on with these sentences [kept], in this order, alone."""
        ...


def make_search(rules: Rules, params: TranslationParams, sentences: int, limit: int) -> Search:
    """A search that makes at most `limit` tokens a sentence."""
    if params.num_beams == 1:
        return GreedySearch(rules, params, sentences, limit)
    return BeamSearch(rules, params, sentences, limit)


class GreedySearch:
    """The best token at every step."""

    def __init__(self, rules: Rules, params: TranslationParams, sentences: int, limit: int) -> None:
        self._rules, self._params, self._limit = rules, params, limit
        self._history = torch.full((sentences, 1), rules.start, device=rules.ends.device)
        self._sums = torch.zeros(sentences, device=rules.ends.device)

    def advance(self, logits: Tensor) -> Step:
        logits, rules = logits.float(), self._rules
        scores = rules.apply(logits.log_softmax(1), self._history, self._limit)
        # As transformers: greedy search picks by logits, which a repetition penalty treats otherwise than logprobs.
        picked_by = rules.apply(logits, self._history, self._limit) if rules.by_history else scores
        tokens = picked_by.argmax(1, keepdim=True)
        self._sums += scores.gather(1, tokens)[:, 0]
        self._history = torch.cat((self._history, tokens), dim=1)
        length = self._history.shape[1] - 1
        ends = torch.isin(tokens[:, 0], rules.ends)
        ended = range(len(ends)) if length == self._limit else ends.nonzero()[:, 0].tolist()
        return Step(tokens, None, {i: [self._output(i, length, bool(ends[i]))] for i in ended})

    def _output(self, sentence: int, length: int, by_end: bool) -> Output:
        score = self._sums[sentence].item() / length**self._params.length_penalty
        tokens = tuple(self._history[sentence, 1:].tolist())
        return Output(tokens, score, _reason(self._rules, length, self._limit, by_end))

    def keep(self, sentences: Tensor) -> None:
        self._history, self._sums = self._history[sentences], self._sums[sentences]


class BeamSearch:
    """The best `num_beams` sentences at every step, those that ended kept apart.

    A sentence is done when as many have ended as there are beams, and the best open one cannot beat the worst of them
    at its present length (early_stopping False; "never" reckons with the longest possible where that is better, True
    does not wait for it).
    """

    def __init__(self, rules: Rules, params: TranslationParams, sentences: int, limit: int) -> None:
        self._rules, self._params, self._limit = rules, params, limit
        self._beams, device = params.num_beams, rules.ends.device
        self._history = torch.full((sentences, self._beams, 1), rules.start, device=device)
        # All beams are the same at first: only the first one counts.
        self._sums = torch.full((sentences, self._beams), _NEVER, device=device)
        self._sums[:, 0] = 0.0
        self._ended: list[list[Output]] = [[] for _ in range(sentences)]  # best first

    def advance(self, logits: Tensor) -> Step:
        length, beams = self._history.shape[2], self._beams
        scores = self._rules.apply(logits.float().log_softmax(1), self._history.flatten(0, 1), self._limit)
        sums, parents, tokens = best_continuations(self._sums, scores, self._candidates)
        by_end = torch.isin(tokens, self._rules.ends)
        ends = by_end if length < self._limit else torch.ones_like(by_end)
        # Only the best `num_beams` may end; the others are there so that as many can go on.
        self._collect(length, sums, parents, tokens, ends[:, :beams], by_end)
        self._sums, chosen = (sums + ends * _NEVER).topk(beams, dim=1)
        parents, tokens = parents.gather(1, chosen), tokens.gather(1, chosen)
        self._history = torch.cat((_beams_of(self._history, parents), tokens[:, :, None]), dim=2)
        return Step(tokens, parents, self._done(length))

    @property
    def _candidates(self) -> int:
        return max(2, 1 + len(self._rules.ends)) * self._beams

    def _collect(
        self, length: int, sums: Tensor, parents: Tensor, tokens: Tensor, ends: Tensor, by_end: Tensor
    ) -> None:
        """Puts the candidates that `ends` [sentences, beams] marks among the ended, of which the best stay."""
        scores = sums / length**self._params.length_penalty
        for i, j in ends.nonzero().tolist():
            before = self._history[i, parents[i, j], 1:].tolist()
            reason = _reason(self._rules, length, self._limit, bool(by_end[i, j]))
            self._ended[i].append(Output((*before, int(tokens[i, j])), scores[i, j].item(), reason))
        for i in {i for i, _ in ends.nonzero().tolist()}:
            self._ended[i] = sorted(self._ended[i], key=lambda output: -output.score)[: self._beams]

    def _done(self, length: int) -> dict[int, list[Output]]:
        early, penalty = self._rules.early_stopping, self._params.length_penalty
        reckoned = self._limit if early == "never" and penalty > 0 else length
        possible = (self._sums[:, 0] / reckoned**penalty).tolist()
        return {
            i: ended[: self._params.num_hypotheses]
            for i, ended in enumerate(self._ended)
            if len(ended) == self._beams and (early is True or not possible[i] > ended[-1].score)
        }

    def keep(self, sentences: Tensor) -> None:
        self._history, self._sums = self._history[sentences], self._sums[sentences]
        self._ended = [self._ended[i] for i in sentences.tolist()]


def best_continuations(sums: Tensor, scores: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` best of all beams' continuations by the sum of their scores, best first.

    `sums` [sentences, beams] before, `scores` [sentences · beams, vocab] of the next token; returns sums, beams
    continued and tokens, each [sentences, count].
    """
    vocab = scores.shape[1]
    totals = scores.view(*sums.shape, vocab) + sums[:, :, None]
    best, index = totals.flatten(1).topk(count, dim=1)
    return best, index // vocab, index % vocab


def _beams_of(x: Tensor, beams: Tensor) -> Tensor:
    """x [sentences, beams, ...] with each sentence's beams [sentences, beams] picked."""
    return x[torch.arange(len(x), device=x.device)[:, None], beams]


def _reason(rules: Rules, length: int, limit: int, by_end: bool) -> FinishReason:
    """An end that was forced on the last place is no end of the model's own."""
    return "stop" if by_end and not (length == limit and rules.last is not None) else "length"
