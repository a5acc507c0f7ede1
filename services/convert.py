"""Wire types to those of serving and back: the only place where protos meet SamplingParams, Chunk and their like."""

import dataclasses
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from chatforge.v1 import chat_pb2, common_pb2, image_pb2, models_pb2, translation_pb2
from services.errors import StatusError, invalid
from services.names import FINISH_REASONS, FORMATS, KINDS, ROLES, SAMPLERS, by_number
from services.pictures import Encoding, Format, preview
from serving.engine.api import Chunk, SamplingParams, joined
from serving.image.api import ImageParams, Progress
from serving.translation.api import Hypothesis, Piece, Translation, TranslationParams

if TYPE_CHECKING:
    from serving.model_folder import ModelInfo

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256

_ROLES = by_number(ROLES)
_SAMPLERS = by_number(SAMPLERS)
_FORMATS = {number: cast(Format, name.upper()) for number, name in by_number(FORMATS).items()}  # as Pillow calls them
_CHAT_KNOBS = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "logprobs")
_TRANSLATION_KNOBS = ("num_beams", "length_penalty", "num_hypotheses", "max_new_tokens")
_IMAGE_KNOBS = ("num_inference_steps", "width", "height")

_Name = TypeVar("_Name", bound=str)
_Params = TypeVar("_Params", SamplingParams, TranslationParams, ImageParams)

BytesOf = Callable[[int], bytes]  # a token's, by its id
ChatMessage = dict[str, str]  # {"role": ..., "content": ...}, as chat templates take them


def chat_messages(messages: Sequence[chat_pb2.Message]) -> list[ChatMessage]:
    """Raises StatusError where the order of roles makes no conversation that a model can answer."""
    for i, message in enumerate(messages):
        _known(f"messages[{i}].role", message.role, _ROLES, chat_pb2.Role)
        if message.role == chat_pb2.ROLE_SYSTEM and i > 0:
            raise invalid(f"messages[{i}].role", "ROLE_SYSTEM can only be the first message")
        if message.role != chat_pb2.ROLE_ASSISTANT and not message.content.strip():
            raise invalid(f"messages[{i}].content", "is empty")
    if not messages or messages[-1].role != chat_pb2.ROLE_USER:
        raise invalid("messages", "the last message must be the user's (ROLE_USER)")
    return [{"role": _ROLES[m.role], "content": m.content} for m in messages]


def sampling_params(config: chat_pb2.GenerationConfig, defaults: SamplingParams) -> SamplingParams:
    """`defaults` with what the request sets put over them. Raises StatusError naming the field and its range."""
    changes: dict[str, Any] = {knob: getattr(config, knob) for knob in _CHAT_KNOBS if config.HasField(knob)}
    if config.stop:
        changes["stop"] = _stop_strings(config.stop)
    return _changed(defaults, changes)


def translation_params(config: translation_pb2.TranslationConfig, defaults: TranslationParams) -> TranslationParams:
    """As `sampling_params`."""
    return _changed(defaults, {knob: getattr(config, knob) for knob in _TRANSLATION_KNOBS if config.HasField(knob)})


def _changed(defaults: _Params, changes: dict[str, Any]) -> _Params:
    try:
        return dataclasses.replace(defaults, **changes)
    except ValueError as error:
        raise invalid_knob(error) from None


def invalid_knob(error: ValueError) -> StatusError:
    """INVALID_ARGUMENT out of serving's "temperature=-1.0 must be between 0 and 100"."""
    name, _, rest = str(error).partition("=")
    return invalid(name if name == "strength" else f"config.{name}", rest)


def image_params(config: image_pb2.ImageConfig, defaults: ImageParams, **changes: Any) -> ImageParams:
    """As `sampling_params`; `changes` are those that the request says outside of its config."""
    changes |= {knob: getattr(config, knob) for knob in _IMAGE_KNOBS if config.HasField(knob)}
    if config.HasField("guidance_scale"):
        changes["guidance_scale"] = decimal(config.guidance_scale)
    if config.sampler != image_pb2.SAMPLER_UNSPECIFIED:
        changes["sampler"] = _known("config.sampler", config.sampler, _SAMPLERS, image_pb2.Sampler)
    return _changed(defaults, changes)


def decimal(value: float) -> float:
    """What a `float` of the wire was before it was one: 0.7, and not 0.699999988, of which 10 steps would be 6."""
    return float(str(np.float32(value)))


def image_encoding(config: image_pb2.ImageConfig) -> Encoding:
    """Raises StatusError naming the field."""
    wanted = config.format or image_pb2.IMAGE_FORMAT_PNG
    format = _known("config.format", wanted, _FORMATS, image_pb2.ImageFormat)
    if not config.HasField("quality"):
        return Encoding(format)
    if format == "PNG":
        raise invalid("config.quality", "is of JPEG and WebP alone; set config.format to one of them")
    if not 1 <= config.quality <= 100:
        raise invalid("config.quality", f"{config.quality} must be between 1 and 100")
    return Encoding(format, config.quality)


def image_seeds(config: image_pb2.ImageConfig) -> tuple[int, ...]:
    """A seed for each image of a request. Raises StatusError naming the field and its range."""
    count = config.num_images if config.HasField("num_images") else 1
    if count < 1:
        raise invalid("config.num_images", f"{count} must be at least 1")
    first = config.seed if config.HasField("seed") else secrets.randbelow(2**32)  # that a person can type again
    if not 0 <= first <= 2**63 - count:
        raise invalid("config.seed", f"{first} must be between 0 and 2^63 - {count}")
    return tuple(range(first, first + count))


def _known(field: str, number: int, names: Mapping[int, _Name], enum: Any) -> _Name:
    """An enum's number as serving says it; a newer client may send one that is none of ours."""
    if number not in names:
        said = f"{number} is not known here" if number else "is not set"
        raise invalid(field, f"{said}; there are: {', '.join(map(enum.Name, names))}")
    return names[number]


def _stop_strings(stop: Sequence[str]) -> tuple[str, ...]:
    if len(stop) > MAX_STOP_STRINGS:
        raise invalid("config.stop", f"has {len(stop)} strings, above the limit of {MAX_STOP_STRINGS}")
    for i, text in enumerate(stop):
        if not 0 < len(text) <= MAX_STOP_CHARACTERS:
            raise invalid(f"config.stop[{i}]", f"must have 1 to {MAX_STOP_CHARACTERS} characters, not {len(text)}")
    return tuple(stop)


def chat_response(
    request_id: str, model: str, chunks: Iterable[Chunk], prompt_tokens: int, bytes_of: BytesOf
) -> chat_pb2.ChatResponse:
    """A whole answer out of all of its chunks."""
    whole = joined(chunks)
    assert whole.finish_reason is not None
    return chat_pb2.ChatResponse(
        id=request_id,
        model=model,
        message=chat_pb2.Message(role=chat_pb2.ROLE_ASSISTANT, content=whole.text),
        finish_reason=FINISH_REASONS[whole.finish_reason],
        usage=common_pb2.Usage(prompt_tokens=prompt_tokens, completion_tokens=len(whole.token_ids)),
        seed=whole.seed,
        logprobs=_token_logprobs(whole, bytes_of),
    )


def stream_chat_response(
    request_id: str, model: str, chunk: Chunk, usage: tuple[int, int], bytes_of: BytesOf
) -> chat_pb2.StreamChatResponse:
    """One message of a stream; `usage` is (prompt, completion) tokens so far, told on the last message alone."""
    logprobs = _token_logprobs(chunk, bytes_of)
    message = chat_pb2.StreamChatResponse(id=request_id, model=model, delta=chunk.text, logprobs=logprobs)
    if chunk.finish_reason is not None:
        message.finish_reason = FINISH_REASONS[chunk.finish_reason]
        message.usage.prompt_tokens, message.usage.completion_tokens = usage
        message.seed = chunk.seed
    return message


def _token_logprobs(chunk: Chunk, bytes_of: BytesOf) -> list[common_pb2.TokenLogprob]:
    pairs = zip(chunk.token_ids, chunk.logprobs, strict=False)  # logprobs are empty unless asked for
    return [common_pb2.TokenLogprob(token_id=id_, logprob=logprob, token=bytes_of(id_)) for id_, logprob in pairs]


def translate_response(
    request_id: str, model: str, languages: tuple[str, str], translations: Iterable[Translation]
) -> translation_pb2.TranslateResponse:
    source, target = languages
    return translation_pb2.TranslateResponse(
        id=request_id,
        model=model,
        source_language=source,
        target_language=target,
        translations=[
            translation_pb2.Translation(
                hypotheses=map(_hypothesis, translation.hypotheses),
                usage=_usage([translation]),
            )
            for translation in translations
        ],
    )


def stream_translate_response(
    request_id: str, model: str, languages: tuple[str, str], text: str
) -> translation_pb2.StreamTranslateResponse:
    """One message of a stream."""
    source, target = languages
    return translation_pb2.StreamTranslateResponse(
        id=request_id, model=model, delta=text, source_language=source, target_language=target
    )


def last_stream_translate_response(
    request_id: str, model: str, languages: tuple[str, str], pieces: Sequence[Piece]
) -> translation_pb2.StreamTranslateResponse:
    """The last message of a stream, after those of all `pieces`: it tells what is true of the whole."""
    message = stream_translate_response(request_id, model, languages, "")
    cut = any(piece.finish_reason == "length" for piece in pieces)
    message.finish_reason = FINISH_REASONS["length" if cut else "stop"]
    message.usage.CopyFrom(_usage(pieces))
    return message


def _hypothesis(hypothesis: Hypothesis) -> translation_pb2.Hypothesis:
    return translation_pb2.Hypothesis(
        text=hypothesis.text, score=hypothesis.score, finish_reason=FINISH_REASONS[hypothesis.finish_reason]
    )


def _usage(parts: Sequence[Translation | Piece]) -> common_pb2.Usage:
    return common_pb2.Usage(
        prompt_tokens=sum(part.prompt_tokens for part in parts),
        completion_tokens=sum(part.completion_tokens for part in parts),
    )


def image_proto(data: bytes, mime_type: str, size: tuple[int, int], seed: int = 0) -> image_pb2.Image:
    """`size` is (width, height)."""
    width, height = size
    return image_pb2.Image(data=data, mime_type=mime_type, seed=seed, width=width, height=height)


def step_progress(progress: Progress) -> image_pb2.StepProgress:
    """With its previews made small, which is slow enough for a thread."""
    previews = [image_proto(data, "image/jpeg", size) for data, size in map(preview, progress.previews)]
    return image_pb2.StepProgress(step=progress.step, total=progress.total, previews=previews)


def model_proto(name: str, info: "ModelInfo", limits: dict[str, int]) -> models_pb2.Model:
    """What a model folder says of itself; `limits` are the fields of ModelLimits. The state is the caller's to set."""
    lineage = {key: str(info.manifest[key]) for key in ("run", "stage", "source") if info.manifest.get(key)}
    return models_pb2.Model(
        name=name,
        kind=KINDS[info.kind],
        revision=info.revision,
        limits=models_pb2.ModelLimits(**limits),
        lineage=models_pb2.ModelLineage(**lineage),
    )
