"""Steps of a batch to logits: what the search needs of a model, and transformers' own forward for any of them."""

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput


class Forward(Protocol):
    """The decoder over one batch, whose source sentences are encoded already. Rows as in `search`."""

    def logits(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        """Logits [rows, vocab] behind one more token [sentences, beams] of every row.

        `parents` [sentences, beams] are the beams that each one continues; None: each its own.
        """
        ...

    def keep(self, sentences: Tensor) -> None:
        """Goes on with these sentences [kept], in this order, alone."""
        ...


class TransformersForward:
    """Any encoder-decoder, through its own forward and cache."""

    def __init__(self, model: Any, sources: Tensor, mask: Tensor, beams: int) -> None:
        """Encodes `sources` [sentences, tokens], of which `mask` marks the tokens that are no padding."""
        self._model, self._beams = model, beams
        encoded = model.get_encoder()(input_ids=sources, attention_mask=mask).last_hidden_state
        self._encoded, self._mask = (x.repeat_interleave(beams, 0) for x in (encoded, mask))
        self._cache: Any = EncoderDecoderCache(DynamicCache(), DynamicCache())

    def logits(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        if parents is not None:
            first = torch.arange(len(parents), device=parents.device)[:, None] * self._beams
            # The other half, of the source, is the same for all beams of a sentence.
            self._cache.self_attention_cache.reorder_cache((first + parents).flatten())
        return self._model(
            encoder_outputs=BaseModelOutput(self._encoded),
            attention_mask=self._mask,
            decoder_input_ids=tokens.reshape(-1, 1),
            past_key_values=self._cache,
            use_cache=True,
        ).logits[:, -1]

    def keep(self, sentences: Tensor) -> None:
        rows = (sentences[:, None] * self._beams + torch.arange(self._beams, device=sentences.device)).flatten()
        self._encoded, self._mask = self._encoded[rows], self._mask[rows]
        self._cache.reorder_cache(rows)
