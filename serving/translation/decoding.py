"""Source tokens to target tokens, for a batch of sentences with equal params, step by step."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import MarianMTModel

from serving.model_folder import context_length
from serving.translation.api import TranslationParams
from serving.translation.forward import Forward, TransformersForward
from serving.translation.marian import MarianWeights
from serving.translation.rules import rules_of
from serving.translation.search import Output, make_search

logger = logging.getLogger(__name__)


class Decoder(Protocol):
    """What turns source tokens into target tokens."""

    def decode(
        self, sources: Sequence[Sequence[int]], params: TranslationParams, cancelled: Callable[[int], bool]
    ) -> Iterator[dict[int, list[Output]]]:
        """Yields after each step the hypotheses, best first, of the sentences that it ended, by index in `sources`.

        `cancelled` is asked between steps which sentences nobody waits for any more; these never end.
        """
        ...

    def close(self) -> None: ...


class TorchDecoder:
    """Any encoder-decoder of transformers, on the device that it is on. Rows that ended leave the batch."""

    def __init__(self, model: Any, first: int | None = None) -> None:
        """`first` is the token that every translation begins with, by default generation_config's forced one."""
        self._model, self._rules = model, rules_of(model, first)
        self._longest = context_length(model.config)
        self._forward: Callable[[Tensor, Tensor, int], Forward] = make_forward(model)

    @torch.inference_mode()
    def decode(
        self, sources: Sequence[Sequence[int]], params: TranslationParams, cancelled: Callable[[int], bool]
    ) -> Iterator[dict[int, list[Output]]]:
        limit = min(params.max_new_tokens, self._longest or params.max_new_tokens)
        forward = self._forward(*_padded(sources, self._model.device), params.num_beams)
        search = make_search(self._rules, params, len(sources), limit)
        shape = (len(sources), params.num_beams)
        tokens, parents = torch.full(shape, self._rules.start, device=self._model.device), None
        running = list(range(len(sources)))  # the sentence of each row
        while running:
            step = search.advance(forward.logits(tokens, parents))
            yield {running[i]: outputs for i, outputs in step.ended.items()}
            tokens, parents = step.tokens, step.parents
            kept = [i for i, sentence in enumerate(running) if i not in step.ended and not cancelled(sentence)]
            if len(kept) < len(running):
                running = [running[i] for i in kept]
                rows = torch.tensor(kept, dtype=torch.long, device=tokens.device)
                search.keep(rows)
                forward.keep(rows)
                tokens, parents = tokens[rows], None if parents is None else parents[rows]

    def close(self) -> None:
        """Nothing to give back."""


def _padded(sources: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [sentences, longest] and their mask, 1 where no padding is."""
    ids = [torch.tensor(source, dtype=torch.long) for source in sources]
    masks = [torch.ones(len(source), dtype=torch.long) for source in sources]
    # What stands in the padding does not matter: nothing looks at it.
    tokens, mask = (torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (ids, masks))
    return tokens.to(device), mask.to(device)


def make_forward(model: Any) -> Callable[[Tensor, Tensor, int], Forward]:
    """What starts a batch from (sources, mask, beams): the fast path where the architecture has one."""
    if type(model) is MarianMTModel:
        return MarianWeights(model).forward
    logger.warning("%s has no fast path (Marian has): translating through transformers' own", type(model).__name__)
    return lambda sources, mask, beams: TransformersForward(model, sources, mask, beams)
