"""The servicer of TranslationService: one Serve deployment, whose replicas each hold every translation model.

A stream sends a message a sentence, far fewer than Serve's proxy forwards: nothing is coalesced as chat's tokens are.
"""

import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from chatforge.v1.translation_pb2 import (
    LanguagePair,
    ListLanguagesRequest,
    ListLanguagesResponse,
    StreamTranslateRequest,
    StreamTranslateResponse,
    TranslateRequest,
    TranslateResponse,
)
from services import convert
from services.choice import choose_translator
from services.config import TranslationModelConfig
from services.errors import answers
from services.metrics import TranslationMetrics
from services.servicer import Servicer
from services.translation_model import TranslationModel
from serving.translation.api import Piece


class TranslationService(Servicer[TranslationModel, TranslationMetrics]):
    """Translates; its methods are the RPCs of chatforge.v1.TranslationService."""

    def __init__(self, models: dict[str, TranslationModelConfig], device: str = "cpu") -> None:
        """Loads every model. Raises ValueError where a folder cannot be served."""
        super().__init__(models, device, TranslationModel, TranslationMetrics)
        self._pairs = {name: model.languages for name, model in self._models.items()}

    @answers(TranslateResponse)
    async def Translate(self, request: TranslateRequest, grpc_context: Any, request_id: str) -> TranslateResponse:
        model = self._model(request)
        params = model.prepare_texts(request.texts, request.config)
        started = time.perf_counter()
        translations = await model.translator.translate(list(request.texts), params)
        self._metrics[model.name].answered(started, len(translations), translations)
        return convert.translate_response(request_id, model.name, model.languages, translations)

    @answers(StreamTranslateResponse)
    async def StreamTranslate(
        self, request: StreamTranslateRequest, grpc_context: Any, request_id: str
    ) -> AsyncIterator[StreamTranslateResponse]:
        model = self._model(request)
        params = model.prepare_text(request.text, request.config)
        started = time.perf_counter()
        pieces: list[Piece] = []
        async with aclosing(model.translator.stream(request.text, params)) as answer:  # type: ignore[type-var]
            async for piece in answer:
                pieces.append(piece)
                yield convert.stream_translate_response(request_id, model.name, model.languages, piece.text)
        self._metrics[model.name].answered(started, 1, pieces)
        yield convert.last_stream_translate_response(request_id, model.name, model.languages, pieces)

    @answers(ListLanguagesResponse)
    async def ListLanguages(
        self, request: ListLanguagesRequest, grpc_context: Any, request_id: str
    ) -> ListLanguagesResponse:
        models = defaultdict(list)
        for name, pair in sorted(self._pairs.items()):
            models[pair].append(name)
        pairs = [
            LanguagePair(source_language=source, target_language=target, models=models[source, target])
            for source, target in sorted(models)
        ]
        return ListLanguagesResponse(pairs=pairs)

    def _model(self, request: TranslateRequest | StreamTranslateRequest) -> TranslationModel:
        name = choose_translator(request.model, request.source_language, request.target_language, self._pairs)
        return self._models[name]
