"""One translation model inside a replica: limits before the translator."""

import dataclasses
from collections.abc import Sequence

from chatforge.v1 import models_pb2, translation_pb2
from services import convert
from services.choice import Pair
from services.config import TranslationModelConfig
from services.errors import invalid
from services.servicer import DTYPES, ServedModel
from serving.translation.api import TranslationParams
from serving.translation.translator import Translator


class TranslationModel(ServedModel):
    """A translator with its limits."""

    def __init__(
        self, name: str, config: TranslationModelConfig, device: str = "cpu", threads: int | None = None
    ) -> None:
        """Loads the folder's weights; `threads` are the translator's. Raises ValueError where it cannot be served."""
        super().__init__(name, folder := config.folder, config.allow_unsafe)
        self.config = config
        self.translator = Translator(
            folder,
            source_language=config.source_language,
            target_language=config.target_language,
            backend=config.backend,
            dtype=DTYPES[config.dtype],
            device=device,
            threads=threads,
            max_batch_tokens=config.max_batch_tokens,
            max_waiting=config.max_waiting,
            allow_unsafe=config.allow_unsafe,
        )
        known = self.translator.defaults
        self._defaults = dataclasses.replace(  # cut where nothing is asked for; what is asked for is refused instead
            known,
            num_beams=min(known.num_beams, config.max_num_beams),
            max_new_tokens=min(known.max_new_tokens, config.max_new_tokens),
        )

    @property
    def languages(self) -> Pair:
        return self.translator.source_language, self.translator.target_language

    @property
    def worker(self) -> Translator:
        return self.translator

    @property
    def limits(self) -> dict[str, int]:
        return {
            "max_texts": self.config.max_texts,
            "max_characters": self.config.max_characters,
            "max_num_beams": self.config.max_num_beams,
            "max_new_tokens": self.config.max_new_tokens,
        }

    def proto(self) -> models_pb2.Model:
        model = super().proto()
        model.source_language, model.target_language = self.languages
        return model

    def prepare_texts(self, texts: Sequence[str], config: translation_pb2.TranslationConfig) -> TranslationParams:
        """How to translate them. Raises StatusError where the request is outside of the limits."""
        if not texts:
            raise invalid("texts", "is empty; send at least one text")
        if len(texts) > self.config.max_texts:
            raise invalid("texts", f"has {len(texts)} texts, above the limit of {self.config.max_texts}")
        for i, text in enumerate(texts):
            self._check_size(f"texts[{i}]", len(text))
        self._check_size("texts", sum(map(len, texts)))
        return self._params(config)

    def prepare_text(self, text: str, config: translation_pb2.TranslationConfig) -> TranslationParams:
        """As `prepare_texts`, for a stream."""
        self._check_size("text", len(text))
        params = self._params(config)
        if params.num_hypotheses > 1:
            raise invalid("config.num_hypotheses", f"{params.num_hypotheses} is above 1, which a stream has")
        return params

    def _check_size(self, field: str, characters: int) -> None:
        if characters > self.config.max_characters:
            raise invalid(field, f"has {characters} characters, above the limit of {self.config.max_characters}")

    def _params(self, config: translation_pb2.TranslationConfig) -> TranslationParams:
        limits = {"num_beams": self.config.max_num_beams, "max_new_tokens": self.config.max_new_tokens}
        for knob, limit in limits.items():
            if getattr(config, knob) > limit:
                raise invalid(f"config.{knob}", f"{getattr(config, knob)} is above the limit of {limit}")
        return convert.translation_params(config, self._defaults)
