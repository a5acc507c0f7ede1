"""Translator: texts in, translations out, many requests at a time, by a thread of its own."""

import asyncio
import threading
import unicodedata
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from serving.api import FinishReason
from serving.batches import Batches
from serving.folder import read_json
from serving.model_folder import context_length, load_translation
from serving.news import News
from serving.translation import segments
from serving.translation.api import (
    MAX_NUM_BEAMS,
    Hypothesis,
    Piece,
    Translation,
    TranslationParams,
    TranslatorStats,
)
from serving.translation.batching import Call, Waiting, pick
from serving.translation.codec import Codec, plain
from serving.translation.ct2 import Ct2Decoder
from serving.translation.decoding import Decoder, TorchDecoder
from serving.translation.search import Output
from serving.translation.segments import Segments

_MAX_SOURCE_TOKENS = 512  # of a sentence, where the model names no limit


class Translator(Batches[Call, Waiting]):
    """Translates by any encoder-decoder folder or hub name, from one language to one other.

    Sentences of all requests wait in one queue, in order; those of equal params are decoded together. A sentence's
    translation does not depend on what else is in its batch, up to the rounding of float sums.
    """

    _name, _items = "translator", "sentences"

    def __init__(
        self,
        folder: str | Path,
        *,
        source_language: str | None = None,
        target_language: str | None = None,
        backend: Literal["torch", "ct2"] = "torch",
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        threads: int | None = None,
        max_batch_tokens: int = 4096,
        max_waiting: int = 4096,
        allow_unsafe: bool = False,
    ) -> None:
        """Languages are BCP-47 codes, by default those that the folder names.

        `threads` are those of the thread that translates, by default what torch has there. `max_batch_tokens` bounds a
        batch's padded source tokens times beams, `max_waiting` the sentences that wait (of more than one request).
        `allow_unsafe` as load_translation's. Raises ValueError where the folder cannot be served, and for sizes below
        one.
        """
        for name, value in {"max_batch_tokens": max_batch_tokens, "max_waiting": max_waiting}.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        super().__init__(max_waiting, threads)
        manifest = read_json(Path(folder) / "chatforge.json")
        model, tokenizer = load_translation(folder, dtype, allow_unsafe=allow_unsafe)
        self.source_language = _language("source", source_language, manifest, tokenizer)
        self.target_language = _language("target", target_language, manifest, tokenizer)
        self.defaults = _defaults(model.generation_config)
        limit = context_length(model.config) or _MAX_SOURCE_TOKENS
        self.max_source_tokens = min(limit, tokenizer.model_max_length)  # of one sentence; longer ones are cut
        self._script = manifest.get("source_script")
        self._codec = Codec(tokenizer, self.source_language, self.target_language)
        self._decoder = _decoder(backend, model, device, self._codec.first_token, threads)
        self._max_batch_tokens = max_batch_tokens
        self._prompt_tokens = self._generation_tokens = 0

    async def translate(self, texts: Sequence[str], params: TranslationParams) -> list[Translation]:
        """One translation per text, in order. Cancelling it drops its sentences, running ones by the next step.

        Raises QueueFull where more sentences would wait than may, EngineClosed after drain().
        """
        prepared, call = await asyncio.to_thread(self._prepare, texts, params)
        news = News()
        try:
            self._submit(call, _waiting(call), news.tell)
            while not call.done:
                await news.wait()
        finally:
            self._cancel(call)
        return await asyncio.to_thread(_translations, prepared, call)

    async def stream(self, text: str, params: TranslationParams) -> AsyncIterator[Piece]:
        """The text's pieces in order, each as soon as it and those before it are ready. Raises as `translate` does."""
        (prepared,), call = await asyncio.to_thread(self._prepare, [text], params)
        news = News()
        try:
            self._submit(call, _waiting(call), news.tell)
            for i, sentence in enumerate(prepared.sentences):
                while sentence not in call.outputs and call.error is None:
                    await news.wait()
                (translated, best), *_ = _outputs(call, sentence)
                piece = prepared.piece(i, translated)
                yield Piece(piece, best.finish_reason, len(call.sources[sentence]), len(best.tokens))
            if not prepared.sentences:
                yield Piece(text, "stop", 0, 0)
        finally:
            self._cancel(call)

    def translate_all(self, texts: Sequence[str], params: TranslationParams) -> list[Translation]:
        """As `translate`, blocking; any number of sentences may wait."""
        prepared, call = self._prepare(texts, params)
        news = threading.Event()
        try:
            self._submit(call, _waiting(call), news.set, bounded=False)
            while not call.done:
                news.wait()
                news.clear()
        finally:
            self._cancel(call)
        return _translations(prepared, call)

    def stats(self) -> TranslatorStats:
        with self._changed:
            return TranslatorStats(
                num_requests_running=len(self._running),
                num_requests_waiting=len(self._waiting),
                prompt_tokens=self._prompt_tokens,
                generation_tokens=self._generation_tokens,
            )

    def close(self) -> None:
        """Ends every request with EngineClosed, and the thread."""
        already = self._closed
        super().close()
        if not already:
            self._decoder.close()

    def _prepare(self, texts: Sequence[str], params: TranslationParams) -> tuple[list[Segments], Call]:
        """Every text's segments, and the call that has their sentences translated."""
        prepared = [segments.split(t, self.source_language, self._script).cut(self._fits) for t in texts]
        sentences = list(dict.fromkeys(sentence for each in prepared for sentence in each.sentences))
        return prepared, Call(dict(zip(sentences, self._codec.encode(sentences), strict=True)), params)

    def _fits(self, sentence: str) -> bool:
        # No tokenizer makes more tokens than bytes and a few of its own, and most sentences are short: ask it rarely.
        # The bytes are those after the codec's NFC and SentencePiece's NFKC, which make one letter many.
        forms = plain(sentence), unicodedata.normalize("NFKC", sentence)
        if max(len(form.encode("utf-8", "replace")) for form in forms) + 8 <= self.max_source_tokens:
            return True
        return len(self._codec.encode([sentence])[0]) <= self.max_source_tokens

    def _pick(self) -> list[Waiting]:
        batch = pick(self._waiting, self._max_batch_tokens)
        self._prompt_tokens += sum(len(w.source) for w in batch)
        return batch

    def _work_off(self, batch: list[Waiting]) -> None:
        def cancelled(i: int) -> bool:
            return self._closed or batch[i].call.cancelled

        for ended in self._decoder.decode([w.source for w in batch], batch[0].call.params, cancelled):
            self._deliver({batch[i]: outputs for i, outputs in ended.items()})

    def _deliver(self, ended: dict[Waiting, list[Output]]) -> None:
        texts = {w: [(self._codec.decode(o.tokens), o) for o in outputs] for w, outputs in ended.items()}
        with self._changed:
            self._running = [w for w in self._running if w not in ended and not w.call.cancelled]
            for w, outputs in texts.items():
                w.call.outputs[w.sentence] = outputs
                self._generation_tokens += len(outputs[0][1].tokens)
        self._tell(*{w.call for w in ended})


def _waiting(call: Call) -> list[Waiting]:
    return [Waiting(sentence, call) for sentence in call.sources]


def _outputs(call: Call, sentence: str) -> list[tuple[str, Output]]:
    """A sentence's hypotheses; raises what the call failed with."""
    if call.error is not None and sentence not in call.outputs:
        raise call.error
    return call.outputs[sentence]


def _translations(prepared: Sequence[Segments], call: Call) -> list[Translation]:
    return [_translation(each, call) for each in prepared]


def _translation(prepared: Segments, call: Call) -> Translation:
    outputs = [_outputs(call, sentence) for sentence in prepared.sentences]
    return Translation(
        hypotheses=tuple(_hypothesis(prepared, [o[n] for o in outputs]) for n in range(call.params.num_hypotheses)),
        prompt_tokens=sum(len(call.sources[sentence]) for sentence in prepared.sentences),
        completion_tokens=sum(len(best.tokens) for (_, best), *_ in outputs),
    )


def _hypothesis(prepared: Segments, chosen: Sequence[tuple[str, Output]]) -> Hypothesis:
    cut = any(output.finish_reason == "length" for _, output in chosen)
    reason: FinishReason = "length" if cut else "stop"
    return Hypothesis(prepared.join([text for text, _ in chosen]), sum((o.score for _, o in chosen), 0.0), reason)


def _decoder(backend: str, model: Any, device: str, first: int | None, threads: int | None) -> Decoder:
    if backend == "torch":
        return TorchDecoder(model.to(device), first)
    if backend == "ct2":
        return Ct2Decoder(model, first, threads=threads)
    raise ValueError(f"backend={backend!r} must be torch or ct2")


def _language(side: str, wanted: str | None, manifest: dict[str, Any], tokenizer: Any) -> str:
    named = getattr(tokenizer, f"{side}_lang", None) or tokenizer.init_kwargs.get(f"{side}_lang")
    language = wanted or manifest.get(f"{side}_language") or named
    if not language:
        raise ValueError(f"the model folder names no {side} language; set {side}_language to its BCP-47 code")
    return str(language)


def _defaults(config: Any) -> TranslationParams:
    """What the folder's generation_config asks for, of beams not more than are allowed."""
    beams, penalty = config.num_beams, config.length_penalty
    known = TranslationParams()
    return TranslationParams(
        num_beams=known.num_beams if beams is None else min(beams, MAX_NUM_BEAMS),
        length_penalty=known.length_penalty if penalty is None else penalty,
    )
