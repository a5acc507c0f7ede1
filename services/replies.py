"""What a client sends and gets, as Python says it and as the protos do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf.message import Message

from chatforge.v1 import chat_pb2, common_pb2, image_pb2, models_pb2, translation_pb2
from services.names import FINISH_REASONS, FORMATS, KINDS, ROLES, SAMPLERS, STATES, FinishReason, by_number

Messages = str | Sequence[Mapping[str, str]]  # one user message, or [{"role": "user", "content": "..."}, ...]

_REASONS = by_number(FINISH_REASONS)
_KINDS = by_number(KINDS)
_STATES = by_number(STATES)
_Config = TypeVar("_Config", bound=Message)
_ChatRequest = TypeVar("_ChatRequest", chat_pb2.ChatRequest, chat_pb2.StreamChatRequest)
_Images = image_pb2.GenerateImageResponse | image_pb2.EditImageResponse


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model held a token that it made."""

    token_id: int
    token: bytes  # may be a part of a character; empty for a control token
    logprob: float


@dataclass(frozen=True)
class Reply:
    """A whole answer."""

    text: str
    id: str
    model: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    seed: int
    logprobs: tuple[TokenLogprob, ...] = ()  # one a token made, where `logprobs=True` asked for them


@dataclass(frozen=True)
class Hypothesis:
    """One way to translate a text."""

    text: str
    score: float
    finish_reason: FinishReason


@dataclass(frozen=True)
class TranslationReply:
    """One text, translated."""

    text: str
    id: str  # of the request, which the texts of one call share
    model: str
    source_language: str
    target_language: str
    finish_reason: FinishReason  # "length" where any sentence was cut at max_new_tokens
    prompt_tokens: int
    completion_tokens: int
    hypotheses: tuple[Hypothesis, ...] = ()  # best first, the first has `text`; a stream has none


@dataclass(frozen=True)
class LanguagePair:
    """From what into what a server translates, and by which models."""

    source_language: str
    target_language: str
    models: tuple[str, ...]


@dataclass(frozen=True)
class ModelCard:
    """What a server says of one of its models."""

    name: str  # that requests call it by
    kind: str = ""  # causal-lm, reward, translation or text-to-image; empty while it is not known
    state: str = ""  # loading, ready or failed
    revision: str = ""  # a hash of its folder's content
    limits: dict[str, int] = field(default_factory=dict)  # of a request: max_new_tokens, ...; none while it loads
    run: str = ""  # that trained it, and its stage there
    stage: str = ""
    source: str = ""  # of a model that was not trained here
    source_language: str = ""  # BCP-47, of translation models alone
    target_language: str = ""


@dataclass(frozen=True)
class ImageReply:
    """One picture."""

    data: bytes  # the file's content
    mime_type: str  # image/png, image/jpeg or image/webp
    seed: int  # that it was drawn from
    width: int  # pixels
    height: int
    id: str  # of the request, which the images of one call share
    model: str

    def save(self, path: str | Path) -> Path:
        """Writes the file; the path's ending is the caller's to choose."""
        Path(path).write_bytes(self.data)
        return Path(path)


@dataclass(frozen=True)
class StepProgress:
    """How far the images of a request are."""

    step: int  # from 1
    total: int
    previews: tuple[bytes, ...] = ()  # small JPEGs of what the images are becoming, where they were asked for


def chat_request(kind: type[_ChatRequest], messages: Messages, model: str, config: dict[str, Any]) -> _ChatRequest:
    """Raises ValueError for what the protos cannot hold; all else is the server's to judge."""
    if isinstance(config.get("stop"), str):
        config = config | {"stop": [config["stop"]]}
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    return kind(
        model=model, messages=[_message(turn) for turn in turns], config=_config(chat_pb2.GenerationConfig, config)
    )


def translate_request(
    texts: str | Sequence[str], languages: tuple[str, str], model: str, config: dict[str, Any]
) -> translation_pb2.TranslateRequest:
    """Raises ValueError as `chat_request` does."""
    source, target = languages
    return translation_pb2.TranslateRequest(
        model=model,
        texts=[texts] if isinstance(texts, str) else texts,
        source_language=source,
        target_language=target,
        config=_config(translation_pb2.TranslationConfig, config),
    )


def stream_translate_request(
    text: str, languages: tuple[str, str], model: str, config: dict[str, Any]
) -> translation_pb2.StreamTranslateRequest:
    """Raises ValueError as `chat_request` does."""
    source, target = languages
    return translation_pb2.StreamTranslateRequest(
        model=model,
        text=text,
        source_language=source,
        target_language=target,
        config=_config(translation_pb2.TranslationConfig, config),
    )


def generate_image_request(
    prompt: str, negative_prompt: str, model: str, config: dict[str, Any]
) -> image_pb2.GenerateImageRequest:
    """Raises ValueError as `chat_request` does."""
    return image_pb2.GenerateImageRequest(
        model=model, prompt=prompt, negative_prompt=negative_prompt, config=_image_config(config)
    )


def stream_generate_image_request(
    prompt: str, negative_prompt: str, model: str, preview_every: int, config: dict[str, Any]
) -> image_pb2.StreamGenerateImageRequest:
    """Raises ValueError as `chat_request` does."""
    return image_pb2.StreamGenerateImageRequest(
        model=model,
        prompt=prompt,
        negative_prompt=negative_prompt,
        preview_every=preview_every,
        config=_image_config(config),
    )


def edit_image_request(
    prompt: str, negative_prompt: str, model: str, given: dict[str, Any], config: dict[str, Any]
) -> image_pb2.EditImageRequest:
    """`given` has the image, its mask and the strength. Raises ValueError as `chat_request` does."""
    return image_pb2.EditImageRequest(
        model=model, prompt=prompt, negative_prompt=negative_prompt, config=_image_config(config), **given
    )


def _image_config(config: dict[str, Any]) -> image_pb2.ImageConfig:
    """Sampler and format are said by name: "ddim", "png"."""
    names: dict[str, dict[str, Any]] = {"sampler": SAMPLERS, "format": FORMATS}
    for knob, known in names.items():
        if (name := config.get(knob)) is not None and name not in known:
            raise ValueError(f"{knob}: {name!r} is none of {', '.join(known)}")
    said = {knob: names[knob][value] for knob, value in config.items() if knob in names and value is not None}
    return _config(image_pb2.ImageConfig, config | said)


def _config(kind: type[_Config], config: dict[str, Any]) -> _Config:
    known = [knob.name for knob in kind.DESCRIPTOR.fields]
    if unknown := [name for name in config if name not in known]:
        raise ValueError(f"{unknown[0]}: no such field of {kind.DESCRIPTOR.name}; there are: {', '.join(known)}")
    return kind(**{name: value for name, value in config.items() if value is not None})


def _message(turn: Mapping[str, str]) -> chat_pb2.Message:
    if turn.get("role") not in ROLES or "content" not in turn:
        raise ValueError(f"messages: {dict(turn)!r} must have a content, and a role out of {', '.join(ROLES)}")
    return chat_pb2.Message(role=ROLES[turn["role"]], content=turn["content"])


def chat_reply(response: chat_pb2.ChatResponse) -> Reply:
    return _reply(response, response.message.content, response.logprobs)


def streamed_chat_reply(messages: Sequence[chat_pb2.StreamChatResponse]) -> Reply:
    """The whole answer that a stream's messages are."""
    text = "".join(message.delta for message in messages)
    return _reply(messages[-1], text, [entry for message in messages for entry in message.logprobs])


def _reply(last: Any, text: str, logprobs: Sequence[common_pb2.TokenLogprob]) -> Reply:
    """`last` is the message that says how the answer ended."""
    return Reply(
        text=text,
        id=last.id,
        model=last.model,
        finish_reason=_REASONS[last.finish_reason],
        prompt_tokens=last.usage.prompt_tokens,
        completion_tokens=last.usage.completion_tokens,
        seed=last.seed,
        logprobs=tuple(TokenLogprob(entry.token_id, entry.token, entry.logprob) for entry in logprobs),
    )


def translation_replies(
    response: translation_pb2.TranslateResponse, texts: str | Sequence[str]
) -> TranslationReply | list[TranslationReply]:
    """One for a text, a list for a sequence of texts."""
    made = [_translation_reply(response, translation) for translation in response.translations]
    return made[0] if isinstance(texts, str) else made


def _translation_reply(
    response: translation_pb2.TranslateResponse, translation: translation_pb2.Translation
) -> TranslationReply:
    hypotheses = tuple(Hypothesis(h.text, h.score, _REASONS[h.finish_reason]) for h in translation.hypotheses)
    return TranslationReply(
        text=hypotheses[0].text,
        id=response.id,
        model=response.model,
        source_language=response.source_language,
        target_language=response.target_language,
        finish_reason=hypotheses[0].finish_reason,
        prompt_tokens=translation.usage.prompt_tokens,
        completion_tokens=translation.usage.completion_tokens,
        hypotheses=hypotheses,
    )


def streamed_translation_reply(messages: Sequence[translation_pb2.StreamTranslateResponse]) -> TranslationReply:
    """The whole translation that a stream's messages are."""
    last = messages[-1]
    return TranslationReply(
        text="".join(message.delta for message in messages),
        id=last.id,
        model=last.model,
        source_language=last.source_language,
        target_language=last.target_language,
        finish_reason=_REASONS[last.finish_reason],
        prompt_tokens=last.usage.prompt_tokens,
        completion_tokens=last.usage.completion_tokens,
    )


def language_pairs(response: translation_pb2.ListLanguagesResponse) -> list[LanguagePair]:
    return [LanguagePair(pair.source_language, pair.target_language, tuple(pair.models)) for pair in response.pairs]


def model_card(model: models_pb2.Model) -> ModelCard:
    return ModelCard(
        name=model.name,
        kind=_KINDS.get(model.kind, ""),
        state=_STATES.get(model.state, ""),
        revision=model.revision,
        limits={limit.name: value for limit, value in model.limits.ListFields()},
        run=model.lineage.run,
        stage=model.lineage.stage,
        source=model.lineage.source,
        source_language=model.source_language,
        target_language=model.target_language,
    )


def delta(message: Any) -> str | None:
    """The piece of text that a stream's message brings."""
    return message.delta or None


def finished(message: Any) -> bool:
    """Whether it is the last of a text's stream."""
    return bool(message.finish_reason)


def image_replies(response: _Images) -> list[ImageReply]:
    return [_image_reply(response, image) for image in response.images]


def image_event(message: image_pb2.StreamGenerateImageResponse) -> "StepProgress | ImageReply":
    """What a stream's message brings."""
    if message.HasField("image"):
        return _image_reply(message, message.image)
    progress = message.progress
    return StepProgress(progress.step, progress.total, tuple(preview.data for preview in progress.previews))


def is_last_image(message: image_pb2.StreamGenerateImageResponse) -> bool:
    return message.last


def streamed_image_replies(messages: Sequence[image_pb2.StreamGenerateImageResponse]) -> list[ImageReply]:
    """The images that a stream's messages brought."""
    return [_image_reply(message, message.image) for message in messages if message.HasField("image")]


def _image_reply(response: Any, image: image_pb2.Image) -> ImageReply:
    return ImageReply(
        data=image.data,
        mime_type=image.mime_type,
        seed=image.seed,
        width=image.width,
        height=image.height,
        id=response.id,
        model=response.model,
    )
