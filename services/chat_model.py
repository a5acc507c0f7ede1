"""One chat model inside a replica: template and tokenizer before the engine, limits before both."""

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from chatforge.v1 import chat_pb2
from services import convert
from services.config import ChatModelConfig
from services.errors import invalid
from services.servicer import DTYPES, ServedModel
from services.token_bytes import TokenBytes
from serving.engine.api import Engine, SamplingParams
from serving.engine.torch_engine import TorchEngine
from serving.folder import read_json
from serving.model_folder import load_causal_lm

Request = chat_pb2.ChatRequest | chat_pb2.StreamChatRequest  # of the same fields

_DEFAULT_NEW_TOKENS = 256
_DEFAULT_KNOBS = ("temperature", "top_p", "top_k", "repetition_penalty")


def control_tokens(tokenizer: Any) -> list[str]:
    """What a message must not hold: special tokens, also those that have no role of their own in the settings.

    Others that a template knows, as `<think>`, are text that a model itself answers with, and gets back as its turn.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return [token for token in dict.fromkeys([*tokenizer.all_special_tokens, *special]) if token.strip()]


class ChatModel(ServedModel):
    """An engine with its tokenizer and its limits."""

    def __init__(self, name: str, config: ChatModelConfig, device: str = "cpu", threads: int | None = None) -> None:
        """Loads the folder's weights; `threads` are the engine's. Raises ValueError where it cannot be served."""
        super().__init__(name, folder := config.folder, config.allow_unsafe)
        self.config = config
        model, self.tokenizer = load_causal_lm(folder, DTYPES[config.dtype], allow_unsafe=config.allow_unsafe)
        self.context_tokens = min(config.context_tokens, self.info.context_length or config.context_tokens)
        self.engine: Engine = TorchEngine(
            model.to(device),
            self.tokenizer,
            max_num_seqs=config.max_num_seqs,
            max_waiting=config.max_waiting,
            context_tokens=self.context_tokens,
            threads=threads,
        )
        self.defaults = _defaults(folder)
        self._control_tokens = control_tokens(self.tokenizer)
        self.bytes_of = TokenBytes(self.tokenizer)

    @property
    def worker(self) -> Engine:
        return self.engine

    @property
    def limits(self) -> dict[str, int]:
        return {
            "context_tokens": self.context_tokens,
            "max_new_tokens": min(self.config.max_new_tokens, self.context_tokens - 1),
            "max_messages": self.config.max_messages,
            "max_characters": self.config.max_characters,
        }

    async def prepare(self, request: Request) -> tuple[list[int], SamplingParams]:
        """The prompt's tokens and how to answer it.

        Raises StatusError where the request is outside of the limits, cheap checks first.
        """
        self._check_size(request)
        messages = convert.chat_messages(request.messages)
        params = convert.sampling_params(request.config, self.defaults)
        prompt_ids = await asyncio.to_thread(self._render, messages)
        return prompt_ids, self._fit(params, len(prompt_ids), request.config.HasField("max_new_tokens"))

    def _check_size(self, request: Request) -> None:
        limits = self.config
        if not request.messages:
            raise invalid("messages", "is empty; send at least one message")
        if len(request.messages) > limits.max_messages:
            raise invalid("messages", f"has {len(request.messages)} messages, above the limit of {limits.max_messages}")
        characters = sum(len(m.content) for m in request.messages)
        if characters > limits.max_characters:
            raise invalid("messages", f"has {characters} characters, above the limit of {limits.max_characters}")
        for i, message in enumerate(request.messages):
            if control := next((t for t in self._control_tokens if t in message.content), None):
                raise invalid(f"messages[{i}].content", f"holds {control!r}, a control token of the model")

    def _render(self, messages: list[convert.ChatMessage]) -> list[int]:
        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except TemplateError as error:  # some templates want strictly alternating roles, or have no system role
            raise invalid("messages", f"the model's chat template refuses them: {error}") from None

    def _fit(self, params: SamplingParams, prompt_tokens: int, asked: bool) -> SamplingParams:
        """Holds `max_new_tokens` to what the limits leave: a refusal where it was asked for, a cut where it was not."""
        room = self.context_tokens - prompt_tokens
        if room < 1:
            raise invalid("messages", f"has {prompt_tokens} tokens, above the limit of {self.context_tokens - 1}")
        limit = self.config.max_new_tokens
        if asked and params.max_new_tokens > limit:
            raise invalid("config.max_new_tokens", f"{params.max_new_tokens} is above the limit of {limit}")
        if asked and params.max_new_tokens > room:
            raise invalid(
                "config.max_new_tokens",
                f"{params.max_new_tokens} is above {room}, which the prompt of {prompt_tokens} tokens leaves of the "
                f"context of {self.context_tokens}",
            )
        return dataclasses.replace(params, max_new_tokens=min(params.max_new_tokens, limit, room))


def _defaults(folder: Path) -> SamplingParams:
    """The sampling that the folder's generation_config.json recommends."""
    known = read_json(file := folder / "generation_config.json")
    chosen = {knob: known[knob] for knob in _DEFAULT_KNOBS if known.get(knob) is not None}
    try:
        return SamplingParams(max_new_tokens=_DEFAULT_NEW_TOKENS, **chosen)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
