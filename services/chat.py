"""The servicer of ChatService: one Serve deployment, whose replicas each hold every chat model of the server.

`model` chooses among them inside the replica, so a token crosses two processes, replica and proxy, whatever the number
of models. Models that should not share a process go into servers of their own.
"""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from chatforge.v1.chat_pb2 import ChatRequest, ChatResponse, StreamChatRequest, StreamChatResponse
from services import convert
from services.chat_model import ChatModel
from services.choice import choose_name
from services.config import ChatModelConfig
from services.errors import answers
from services.metrics import ChatMetrics, RequestTimes
from services.servicer import Servicer
from services.stream import coalesced
from serving.engine.api import Chunk


class ChatService(Servicer[ChatModel, ChatMetrics]):
    """Answers conversations; its methods are the RPCs of chatforge.v1.ChatService."""

    def __init__(self, models: dict[str, ChatModelConfig], device: str = "cpu") -> None:
        """Loads every model. Raises ValueError where a folder cannot be served."""
        super().__init__(models, device, ChatModel, ChatMetrics)
        self._open_streams = 0

    @answers(ChatResponse)
    async def Chat(self, request: ChatRequest, grpc_context: Any, request_id: str) -> ChatResponse:
        model = self._models[choose_name("model", request.model, self._models)]
        prompt_ids, params = await model.prepare(request)
        times = RequestTimes(self._metrics[model.name], len(prompt_ids))
        chunks: list[Chunk] = []
        async with aclosing(model.engine.generate(prompt_ids, params, request_id)) as answer:  # type: ignore[type-var]
            async for chunk in answer:
                times.saw(chunk)
                chunks.append(chunk)
        return convert.chat_response(request_id, model.name, chunks, len(prompt_ids), model.bytes_of)

    @answers(StreamChatResponse)
    async def StreamChat(
        self, request: StreamChatRequest, grpc_context: Any, request_id: str
    ) -> AsyncIterator[StreamChatResponse]:
        model = self._models[choose_name("model", request.model, self._models)]
        prompt_ids, params = await model.prepare(request)
        times = RequestTimes(self._metrics[model.name], len(prompt_ids))
        completion_tokens = 0
        self._open_streams += 1
        try:
            chunks = coalesced(model.engine.generate(prompt_ids, params, request_id), lambda: self._open_streams)
            async with aclosing(chunks) as answer:  # type: ignore[type-var]
                async for chunk in answer:
                    times.saw(chunk)
                    completion_tokens += len(chunk.token_ids)
                    if _worth_sending(chunk):
                        usage = len(prompt_ids), completion_tokens
                        yield convert.stream_chat_response(request_id, model.name, chunk, usage, model.bytes_of)
        finally:
            self._open_streams -= 1


def _worth_sending(chunk: Chunk) -> bool:
    """A token that completes no character yet has nothing to tell."""
    return bool(chunk.text or chunk.logprobs or chunk.finish_reason)
