"""Wire types and engine types: nothing is lost or invented on the way."""

import dataclasses

import pytest

from chatforge.v1 import chat_pb2, common_pb2
from services import convert
from services.errors import StatusError
from serving.engine.api import Chunk, SamplingParams, joined

DEFAULTS = SamplingParams(max_new_tokens=99, temperature=0.2, top_p=0.9, top_k=7, repetition_penalty=1.1)
EVERYTHING = {
    "max_new_tokens": 5, "temperature": 0.5, "top_p": 0.25, "top_k": 3, "repetition_penalty": 2.0, "seed": 2**62,
    "logprobs": True, "stop": ["a", "b"],
}  # fmt: skip


def test_every_knob_arrives() -> None:
    params = convert.sampling_params(chat_pb2.GenerationConfig(**EVERYTHING), DEFAULTS)
    assert dataclasses.asdict(params) == EVERYTHING | {"stop": ("a", "b")}


def test_unset_is_the_models_default_and_zero_is_zero() -> None:
    assert convert.sampling_params(chat_pb2.GenerationConfig(), DEFAULTS) == DEFAULTS
    greedy = convert.sampling_params(chat_pb2.GenerationConfig(temperature=0.0, top_k=0, seed=0), DEFAULTS)
    assert greedy == dataclasses.replace(DEFAULTS, temperature=0.0, top_k=0, seed=0)


def test_a_wrong_knob_is_named_as_the_wire_names_it() -> None:
    with pytest.raises(StatusError, match=r"^config\.top_p: 1\.5 must be above 0 and at most 1$") as caught:
        convert.sampling_params(chat_pb2.GenerationConfig(top_p=1.5), DEFAULTS)
    assert caught.value.field == "config.top_p"


def test_an_empty_answer_of_the_model_may_be_part_of_a_conversation() -> None:
    roles = (chat_pb2.ROLE_SYSTEM, chat_pb2.ROLE_USER, chat_pb2.ROLE_ASSISTANT, chat_pb2.ROLE_USER)
    wire = [chat_pb2.Message(role=r, content=c) for r, c in zip(roles, ("be kind", "hi", "", "well?"), strict=True)]
    assert convert.chat_messages(wire) == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "well?"},
    ]


CHUNKS = [
    Chunk("Grüße ", (1, 2), 9, (-0.5, -1.0)),
    Chunk("", (3,), 9, (-2.0,)),
    Chunk("🙂", (4,), 9, (-0.25,), "length"),
]


def test_a_whole_answer() -> None:
    response = convert.chat_response("r", "m", CHUNKS, 11)
    assert response == chat_pb2.ChatResponse(
        id="r",
        model="m",
        message=chat_pb2.Message(role=chat_pb2.ROLE_ASSISTANT, content="Grüße 🙂"),
        finish_reason=common_pb2.FINISH_REASON_LENGTH,
        usage=common_pb2.Usage(prompt_tokens=11, completion_tokens=4),
        seed=9,
        logprobs=[
            common_pb2.TokenLogprob(token_id=i, logprob=p) for i, p in enumerate((-0.5, -1.0, -2.0, -0.25), start=1)
        ],
    )


def test_usage_reason_and_seed_are_on_the_last_message_alone() -> None:
    first, _, last = (convert.stream_chat_response("r", "m", chunk, (11, 4)) for chunk in CHUNKS)
    assert {field.name for field, _ in first.ListFields()} == {"id", "model", "delta", "logprobs"}
    assert last.usage == common_pb2.Usage(prompt_tokens=11, completion_tokens=4)
    assert (last.finish_reason, last.seed) == (common_pb2.FINISH_REASON_LENGTH, 9)


def test_joined_chunks_are_the_same_answer() -> None:
    assert joined(CHUNKS) == Chunk("Grüße 🙂", (1, 2, 3, 4), 9, (-0.5, -1.0, -2.0, -0.25), "length")
