"""The client of a ChatForge server, sync and async. Needs grpc, protobuf and chatforge.v1 alone.

    with Client("localhost:9000") as client:
        print(client.chat("What is the sea?", max_new_tokens=50).text)
        for piece in client.stream_chat([{"role": "user", "content": "Hello!"}], temperature=0):
            print(piece, end="", flush=True)
        print(client.translate("Das Meer ist blau.", source="de", target="en").text)
        client.generate_image("a red apple", seed=7)[0].save("apple.png")

`address` is HOST:PORT, https://HOST for TLS, or several at once: "ipv4:A:9000,B:9000". Calls go round all the addresses
of a name, such as a headless Service of Kubernetes, which has one a node; new ones are seen when a connection ends.
When a node dies,

- a call of which nothing has come yet is made again, elsewhere, up to `retries` times and within its `timeout`: the
  work may be done twice, an answer comes once;
- a stream that has begun raises CallError UNAVAILABLE: the pieces so far stand, and whether to ask again is for the
  caller to decide (`retryable` is true);
- a connection that was cut is noticed at once, a machine that falls silent only when `timeout` is over.

Whatever else goes wrong raises CallError at once.
"""

from collections.abc import Sequence
from typing import Any, Self, overload

import grpc
import grpc.aio
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from chatforge.v1 import (
    chat_pb2,
    chat_pb2_grpc,
    image_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    translation_pb2,
    translation_pb2_grpc,
)
from services import replies
from services.address import DEFAULT_ADDRESS
from services.replies import (
    ImageReply,
    LanguagePair,
    Messages,
    ModelCard,
    Reply,
    StepProgress,
    TokenLogprob,
    TranslationReply,
)
from services.transport import (
    AsyncStream,
    Attempts,
    CallError,
    Collected,
    Metadata,
    Stream,
    async_unary,
    connect,
    unary,
)

__all__ = [
    "AsyncClient",
    "CallError",
    "Client",
    "ImageReply",
    "LanguagePair",
    "Messages",
    "ModelCard",
    "Reply",
    "StepProgress",
    "TokenLogprob",
    "TranslationReply",
]

_CHAT = (("application", "chat"),)  # Serve routes by it
_TRANSLATION = (("application", "translation"),)
_IMAGE = (("application", "image"),)
_MODELS = (("application", "models"),)
_HEALTH = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")


class _Connection:
    """What the sync and the async client share: the channel, the stubs, the policy."""

    def __init__(self, channel: Any, timeout: float, retries: int) -> None:
        self._channel, self._timeout, self._retries = channel, timeout, retries
        self._chat = chat_pb2_grpc.ChatServiceStub(channel)
        self._translation = translation_pb2_grpc.TranslationServiceStub(channel)
        self._image = image_pb2_grpc.ImageServiceStub(channel)
        self._models = models_pb2_grpc.ModelServiceStub(channel)
        # HealthCheckRequest {string service = 1} and HealthCheckResponse {enum status = 1} have the wire form of these.
        self._health = channel.unary_unary(
            "/grpc.health.v1.Health/Check", StringValue.SerializeToString, Int32Value.FromString
        )

    def _attempts(self, timeout: float | None) -> Attempts:
        return Attempts(self._timeout if timeout is None else timeout, self._retries)


class Client(_Connection):
    """Talks to one server; safe to share between threads. Close it, or use it in a `with` block.

    `timeout` is in seconds, of a whole call with its retries; every method takes another. Methods raise CallError.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, *, timeout: float = 300.0, retries: int = 4) -> None:
        super().__init__(connect(address), timeout, retries)

    def chat(self, messages: Messages, *, model: str = "", timeout: float | None = None, **config: Any) -> Reply:
        """The whole answer; `config` has the fields of GenerationConfig (max_new_tokens, temperature, stop, ...)."""
        request = replies.chat_request(chat_pb2.ChatRequest, messages, model, config)
        return replies.chat_reply(self._unary(self._chat.Chat, request, _CHAT, timeout))

    def stream_chat(
        self, messages: Messages, *, model: str = "", timeout: float | None = None, **config: Any
    ) -> Stream[str, Reply]:
        """The answer's text in pieces, while it is made; leaving the loop or closing it cancels the call."""
        request = replies.chat_request(chat_pb2.StreamChatRequest, messages, model, config)
        collected = Collected(replies.delta, replies.finished, replies.streamed_chat_reply)
        return Stream(self._chat.StreamChat, request, _CHAT, self._attempts(timeout), collected)

    @overload
    def translate(self, texts: str, **options: Any) -> TranslationReply: ...  # type: ignore[overload-overlap]

    @overload
    def translate(self, texts: Sequence[str], **options: Any) -> list[TranslationReply]: ...

    def translate(
        self,
        texts: str | Sequence[str],
        *,
        source: str = "",
        target: str = "",
        model: str = "",
        timeout: float | None = None,
        **config: Any,
    ) -> TranslationReply | list[TranslationReply]:
        """A text gives its translation, a sequence of texts a list in their order.

        Languages are BCP-47 tags ("de"), empty where the server leaves no choice; `config` has the fields of
        TranslationConfig (num_beams, num_hypotheses, ...).
        """
        request = replies.translate_request(texts, (source, target), model, config)
        response = self._unary(self._translation.Translate, request, _TRANSLATION, timeout)
        return replies.translation_replies(response, texts)

    def stream_translate(
        self,
        text: str,
        *,
        source: str = "",
        target: str = "",
        model: str = "",
        timeout: float | None = None,
        **config: Any,
    ) -> Stream[str, TranslationReply]:
        """The translation of a document sentence by sentence, while it is made; leaving the loop cancels the call."""
        request = replies.stream_translate_request(text, (source, target), model, config)
        collected = Collected(replies.delta, replies.finished, replies.streamed_translation_reply)
        return Stream(self._translation.StreamTranslate, request, _TRANSLATION, self._attempts(timeout), collected)

    def list_languages(self, timeout: float | None = None) -> list[LanguagePair]:
        """From what into what the server translates."""
        request = translation_pb2.ListLanguagesRequest()
        return replies.language_pairs(self._unary(self._translation.ListLanguages, request, _TRANSLATION, timeout))

    def generate_image(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        model: str = "",
        timeout: float | None = None,
        **config: Any,
    ) -> list[ImageReply]:
        """The prompt's images, in the order of their seeds.

        `config` has the fields of ImageConfig (width, num_inference_steps, num_images, ...), where sampler is "ddim",
        "dpm++" or "euler", and format "png", "jpeg" or "webp".
        """
        request = replies.generate_image_request(prompt, negative_prompt, model, config)
        return replies.image_replies(self._unary(self._image.GenerateImage, request, _IMAGE, timeout))

    def stream_generate_image(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        model: str = "",
        preview_every: int = 0,
        timeout: float | None = None,
        **config: Any,
    ) -> Stream[StepProgress | ImageReply, list[ImageReply]]:
        """The steps while they are made, with previews at every so many, then each image; leaving the loop cancels."""
        request = replies.stream_generate_image_request(prompt, negative_prompt, model, preview_every, config)
        return Stream(self._image.StreamGenerateImage, request, _IMAGE, self._attempts(timeout), _collected_images())

    def edit_image(
        self,
        prompt: str,
        image: bytes,
        *,
        mask: bytes | None = None,
        strength: float | None = None,
        negative_prompt: str = "",
        model: str = "",
        timeout: float | None = None,
        **config: Any,
    ) -> list[ImageReply]:
        """An image drawn anew after a prompt, where a mask is white or, without one, all of it.

        Both are the content of PNG, JPEG or WebP files; `config` is that of generate_image.
        """
        given = {"image": image, "mask": mask, "strength": strength}
        request = replies.edit_image_request(prompt, negative_prompt, model, given, config)
        return replies.image_replies(self._unary(self._image.EditImage, request, _IMAGE, timeout))

    def list_models(self, timeout: float | None = None) -> list[ModelCard]:
        """Every model of the server, by name."""
        request = models_pb2.ListModelsRequest()
        response = self._unary(self._models.ListModels, request, _MODELS, timeout)
        return [replies.model_card(model) for model in response.models]

    def get_model(self, name: str = "", timeout: float | None = None) -> ModelCard:
        """One model; an empty name means the only one there is."""
        request = models_pb2.GetModelRequest(name=name)
        return replies.model_card(self._unary(self._models.GetModel, request, _MODELS, timeout).model)

    def health(self, service: str = "", timeout: float | None = None) -> str:
        """SERVING or NOT_SERVING: of the whole server, or of one service such as chatforge.v1.ChatService."""
        return _HEALTH[self._unary(self._health, StringValue(value=service), (), timeout).value]

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _unary(self, call: Any, request: Any, metadata: Metadata, timeout: float | None) -> Any:
        return unary(call, request, metadata, self._attempts(timeout))


class AsyncClient(_Connection):
    """`Client` for asyncio: the same methods, awaited; those called stream_... give async iterators."""

    def __init__(self, address: str = DEFAULT_ADDRESS, *, timeout: float = 300.0, retries: int = 4) -> None:
        super().__init__(connect(address, grpc.aio), timeout, retries)

    async def chat(self, messages: Messages, *, model: str = "", timeout: float | None = None, **config: Any) -> Reply:
        request = replies.chat_request(chat_pb2.ChatRequest, messages, model, config)
        return replies.chat_reply(await self._unary(self._chat.Chat, request, _CHAT, timeout))

    def stream_chat(
        self, messages: Messages, *, model: str = "", timeout: float | None = None, **config: Any
    ) -> AsyncStream[str, Reply]:
        request = replies.chat_request(chat_pb2.StreamChatRequest, messages, model, config)
        collected = Collected(replies.delta, replies.finished, replies.streamed_chat_reply)
        return AsyncStream(self._chat.StreamChat, request, _CHAT, self._attempts(timeout), collected)

    @overload
    async def translate(self, texts: str, **options: Any) -> TranslationReply: ...  # type: ignore[overload-overlap]

    @overload
    async def translate(self, texts: Sequence[str], **options: Any) -> list[TranslationReply]: ...

    async def translate(
        self,
        texts: str | Sequence[str],
        *,
        source: str = "",
        target: str = "",
        model: str = "",
        timeout: float | None = None,
        **config: Any,
    ) -> TranslationReply | list[TranslationReply]:
        request = replies.translate_request(texts, (source, target), model, config)
        response = await self._unary(self._translation.Translate, request, _TRANSLATION, timeout)
        return replies.translation_replies(response, texts)

    def stream_translate(
        self,
        text: str,
        *,
        source: str = "",
        target: str = "",
        model: str = "",
        timeout: float | None = None,
        **config: Any,
    ) -> AsyncStream[str, TranslationReply]:
        request = replies.stream_translate_request(text, (source, target), model, config)
        collected = Collected(replies.delta, replies.finished, replies.streamed_translation_reply)
        return AsyncStream(self._translation.StreamTranslate, request, _TRANSLATION, self._attempts(timeout), collected)

    async def list_languages(self, timeout: float | None = None) -> list[LanguagePair]:
        request = translation_pb2.ListLanguagesRequest()
        response = await self._unary(self._translation.ListLanguages, request, _TRANSLATION, timeout)
        return replies.language_pairs(response)

    async def generate_image(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        model: str = "",
        timeout: float | None = None,
        **config: Any,
    ) -> list[ImageReply]:
        request = replies.generate_image_request(prompt, negative_prompt, model, config)
        return replies.image_replies(await self._unary(self._image.GenerateImage, request, _IMAGE, timeout))

    def stream_generate_image(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        model: str = "",
        preview_every: int = 0,
        timeout: float | None = None,
        **config: Any,
    ) -> AsyncStream[StepProgress | ImageReply, list[ImageReply]]:
        request = replies.stream_generate_image_request(prompt, negative_prompt, model, preview_every, config)
        return AsyncStream(
            self._image.StreamGenerateImage, request, _IMAGE, self._attempts(timeout), _collected_images()
        )

    async def edit_image(
        self,
        prompt: str,
        image: bytes,
        *,
        mask: bytes | None = None,
        strength: float | None = None,
        negative_prompt: str = "",
        model: str = "",
        timeout: float | None = None,
        **config: Any,
    ) -> list[ImageReply]:
        given = {"image": image, "mask": mask, "strength": strength}
        request = replies.edit_image_request(prompt, negative_prompt, model, given, config)
        return replies.image_replies(await self._unary(self._image.EditImage, request, _IMAGE, timeout))

    async def list_models(self, timeout: float | None = None) -> list[ModelCard]:
        request = models_pb2.ListModelsRequest()
        response = await self._unary(self._models.ListModels, request, _MODELS, timeout)
        return [replies.model_card(model) for model in response.models]

    async def get_model(self, name: str = "", timeout: float | None = None) -> ModelCard:
        request = models_pb2.GetModelRequest(name=name)
        return replies.model_card((await self._unary(self._models.GetModel, request, _MODELS, timeout)).model)

    async def health(self, service: str = "", timeout: float | None = None) -> str:
        return _HEALTH[(await self._unary(self._health, StringValue(value=service), (), timeout)).value]

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _unary(self, call: Any, request: Any, metadata: Metadata, timeout: float | None) -> Any:
        return await async_unary(call, request, metadata, self._attempts(timeout))


def _collected_images() -> Collected[StepProgress | ImageReply, list[ImageReply]]:
    return Collected(replies.image_event, replies.is_last_image, replies.streamed_image_replies)
