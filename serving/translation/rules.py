"""What a model's generation_config forbids and forces, applied to the scores of the next token.

Honoured: decoder_start_token_id, eos_token_id, bad_words_ids, suppress_tokens, forced_bos_token_id,
forced_eos_token_id, min_length, min_new_tokens, repetition_penalty, no_repeat_ngram_size, renormalize_logits,
early_stopping. What concerns sampling is not, nor are the penalties that compare with the source.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)


@dataclass(frozen=True)
class Rules:
    """Rules of one model. The n-th token made is that of `length` n, from 1 to `limit`."""

    start: int  # what the decoder reads first
    ends: Tensor  # [eos tokens], what ends a sentence
    banned: Tensor  # [tokens] that are never made
    first: int | None  # the one token of length 1, such as NLLB's target language
    last: int | None  # the one token of length `limit`
    by_history: Any  # a LogitsProcessorList: what depends on the tokens before; mostly empty
    renormalize: bool
    early_stopping: bool | Literal["never"]

    def apply(self, scores: Tensor, history: Tensor, limit: int) -> Tensor:
        """float32 scores [rows, vocab] after tokens `history` [rows, length], the start token among them."""
        length = history.shape[1]
        scores = self.by_history(history, scores) if self.by_history else scores
        if len(self.banned):
            scores = scores.index_fill(1, self.banned, -torch.inf)
        forced = self.first if length == 1 else None
        if length == limit and self.last is not None:
            forced = self.last
        if forced is not None:
            scores = torch.full_like(scores, -torch.inf)
            scores[:, forced] = 0.0
        return scores.log_softmax(1) if self.renormalize else scores


def rules_of(model: Any, first: int | None = None) -> Rules:
    """The rules of an encoder-decoder of transformers; `first` overrides its forced_bos_token_id.

    Raises ValueError where it names no token to start from.
    """
    config, device = model.generation_config, model.device
    start = config.bos_token_id if config.decoder_start_token_id is None else config.decoder_start_token_id
    if start is None:
        raise ValueError("decoder_start_token_id is missing in generation_config.json; decoding needs it")
    ends = _ids(config.eos_token_id)
    # As transformers does: an end token cannot be a bad word.
    words = [word for word in config.bad_words_ids or [] if word not in [[end] for end in ends]]
    banned = sorted({word[0] for word in words if len(word) == 1} | set(config.suppress_tokens or []))
    return Rules(
        start=start,
        ends=torch.tensor(ends, dtype=torch.long, device=device),
        banned=torch.tensor(banned, dtype=torch.long, device=device),
        first=config.forced_bos_token_id if first is None else first,
        last=next(iter(_ids(config.forced_eos_token_id)), None),
        by_history=_by_history(config, [word for word in words if len(word) > 1], ends, device),
        renormalize=bool(config.renormalize_logits),
        early_stopping=config.early_stopping or False,
    )


def _by_history(config: Any, words: list[list[int]], ends: list[int], device: torch.device) -> LogitsProcessorList:
    """transformers' own, in its order."""
    processors = LogitsProcessorList()
    if config.repetition_penalty not in (None, 1.0):
        processors.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if words:
        processors.append(NoBadWordsLogitsProcessor(words, ends or None))
    # min_length counts the start token, which is one.
    shortest = 1 + config.min_new_tokens if config.min_new_tokens else config.min_length
    if shortest and ends:
        processors.append(MinLengthLogitsProcessor(shortest, ends, device=str(device)))
    return processors


def _ids(named: int | list[int] | None) -> list[int]:
    if named is None:
        return []
    return [named] if isinstance(named, int) else list(named)
