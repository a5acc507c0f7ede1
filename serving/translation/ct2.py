"""Marian models in 8-bit integers by CTranslate2 (extra `[ct2]`), behind the same `decode` as the torch decoder.

The weights are converted when the translator starts, into a temporary folder that is gone once CTranslate2 has read
them: a second or two for models of this kind, no state to keep in step with the model folder, nothing written into it.
CTranslate2's own converter drops the last token (opus-mt's pad) and needs the tokenizer's class; ours keeps every token
under its number as its name, so that any tokenizer fits.

Greedy tokens are those of the torch decoder as far as the rounding goes. Beam search is CTranslate2's own, which stops
at another moment than transformers': scores are of the same kind, rankings may differ.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import MarianMTModel

from serving.model_folder import context_length
from serving.translation.api import TranslationParams
from serving.translation.rules import Rules, rules_of
from serving.translation.search import Output

_TOGETHER = 16  # sentences per call, which is how long a cancelled one still runs


class Ct2Decoder:
    """CTranslate2 on the CPU."""

    def __init__(
        self, model: Any, first: int | None = None, compute_type: str = "int8", threads: int | None = None
    ) -> None:
        """`first` as TorchDecoder's; `threads` by default as many as torch has.

        Raises ValueError where the package is missing or cannot take this model.
        """
        ctranslate2 = _package()
        self._rules = rules_of(model, first)
        self._limit = context_length(model.config)
        _check(model, self._rules)
        with tempfile.TemporaryDirectory() as folder:
            _convert(model, self._rules, Path(folder), compute_type)
            self._translator = ctranslate2.Translator(
                folder, device="cpu", compute_type=compute_type, intra_threads=threads or torch.get_num_threads()
            )

    def decode(
        self, sources: Sequence[Sequence[int]], params: TranslationParams, cancelled: Callable[[int], bool]
    ) -> Iterator[dict[int, list[Output]]]:
        """As `Decoder.decode`; a step is the whole of some sentences."""
        limit = min(params.max_new_tokens, self._limit or params.max_new_tokens)
        waiting = list(range(len(sources)))
        while waiting := [i for i in waiting if not cancelled(i)]:
            now, waiting = waiting[:_TOGETHER], waiting[_TOGETHER:]
            results = self._translate([sources[i] for i in now], params, limit)
            yield {
                i: [
                    self._output(tokens, score, limit, params)
                    for tokens, score in zip(result.hypotheses, result.scores, strict=True)
                ]
                for i, result in zip(now, results, strict=True)
            }

    def close(self) -> None:
        self._translator.unload_model()

    def _translate(self, sources: Sequence[Sequence[int]], params: TranslationParams, limit: int) -> list[Any]:
        prefix = [] if self._rules.first is None else [str(self._rules.first)]
        # What is forced on the last place is put there by `_output`.
        limit = limit if self._rules.last is None else max(1, limit - 1)
        return self._translator.translate_batch(
            [[str(token) for token in source] for source in sources],
            target_prefix=[prefix] * len(sources) if prefix else None,
            beam_size=params.num_beams,
            num_hypotheses=params.num_hypotheses,
            length_penalty=params.length_penalty,
            max_input_length=0,
            max_decoding_length=limit,
            min_decoding_length=0,
            return_scores=True,
            return_end_token=True,
            end_token=[str(token) for token in self._rules.ends.tolist()],
            suppress_sequences=[[str(token)] for token in self._rules.banned.tolist()] or None,
        )

    def _output(self, tokens: list[str], score: float, limit: int, params: TranslationParams) -> Output:
        numbers = tuple(int(token) for token in tokens)
        if numbers and numbers[-1] in self._rules.ends.tolist():
            return Output(numbers, score, "stop")
        if self._rules.last is not None and len(numbers) < limit:
            score *= (len(numbers) / limit) ** params.length_penalty
            numbers = (*numbers, self._rules.last)
        return Output(numbers, score, "length")


def _package() -> Any:
    try:
        import ctranslate2
    except ImportError:
        raise ValueError("backend='ct2' needs the package ctranslate2: pip install chatforge[ct2]") from None
    return ctranslate2


def _check(model: Any, rules: Rules) -> None:
    """Raises ValueError for what this backend leaves out."""
    if type(model) is not MarianMTModel:
        raise ValueError(f"backend='ct2' takes Marian models; this is a {type(model).__name__}: use backend='torch'")
    if rules.by_history:
        names = ", ".join(type(processor).__name__ for processor in rules.by_history)
        raise ValueError(f"backend='ct2' does not apply generation_config.json's {names}: use backend='torch'")


def _convert(model: Any, rules: Rules, folder: Path, compute_type: str) -> None:
    from ctranslate2.converters.transformers import BartLoader

    model = copy.deepcopy(model)  # whose weights are converted in place
    config = model.config
    # What the loader wants to be told: Marian has its norms behind, and none on the embeddings.
    config.normalize_before = config.normalize_embedding = False
    spec = BartLoader().get_model_spec(model)
    spec.register_source_vocabulary([str(token) for token in range(config.vocab_size)])
    spec.register_target_vocabulary([str(token) for token in range(model.lm_head.out_features)])
    end = str(int(rules.ends[0]))
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = end
    spec.config.decoder_start_token = str(rules.start)
    spec.validate()
    spec.optimize(quantization=compute_type)
    spec.save(str(folder))
