"""Wire types and engine types: nothing is lost or invented on the way."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from chatforge.v1 import chat_pb2, common_pb2, image_pb2, translation_pb2
from services import convert
from services.errors import StatusError
from services.pictures import Encoding
from serving.engine.api import Chunk, SamplingParams, joined
from serving.image.api import ImageParams, Progress
from serving.translation.api import Hypothesis, Piece, Translation, TranslationParams

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


@pytest.mark.parametrize(("role", "said"), [(0, "is not set"), (7, "7 is not known here")])
def test_a_role_that_is_none_is_told_which_there_are(role: Any, said: str) -> None:
    there_are = "there are: ROLE_SYSTEM, ROLE_USER, ROLE_ASSISTANT"
    with pytest.raises(StatusError, match=rf"^messages\[0\]\.role: {said}; {there_are}$"):
        convert.chat_messages([chat_pb2.Message(role=role, content="hi")])


def test_a_format_that_is_none_is_told_which_there_are() -> None:
    with pytest.raises(StatusError, match="9 is not known here; there are: IMAGE_FORMAT_PNG, IMAGE_FORMAT_JPEG"):
        convert.image_encoding(image_pb2.ImageConfig(format=9))  # type: ignore[arg-type]


CHUNKS = [
    Chunk("Grüße ", (1, 2), 9, (-0.5, -1.0)),
    Chunk("", (3,), 9, (-2.0,)),
    Chunk("🙂", (4,), 9, (-0.25,), "length"),
]


def bytes_of(token: int) -> bytes:
    return str(token).encode()


def test_a_whole_answer() -> None:
    response = convert.chat_response("r", "m", CHUNKS, 11, bytes_of)
    assert response == chat_pb2.ChatResponse(
        id="r",
        model="m",
        message=chat_pb2.Message(role=chat_pb2.ROLE_ASSISTANT, content="Grüße 🙂"),
        finish_reason=common_pb2.FINISH_REASON_LENGTH,
        usage=common_pb2.Usage(prompt_tokens=11, completion_tokens=4),
        seed=9,
        logprobs=[
            common_pb2.TokenLogprob(token_id=i, logprob=p, token=b"%d" % i)
            for i, p in enumerate((-0.5, -1.0, -2.0, -0.25), start=1)
        ],
    )


def test_usage_reason_and_seed_are_on_the_last_message_alone() -> None:
    first, _, last = (convert.stream_chat_response("r", "m", chunk, (11, 4), bytes_of) for chunk in CHUNKS)
    assert {field.name for field, _ in first.ListFields()} == {"id", "model", "delta", "logprobs"}
    assert last.usage == common_pb2.Usage(prompt_tokens=11, completion_tokens=4)
    assert (last.finish_reason, last.seed) == (common_pb2.FINISH_REASON_LENGTH, 9)


def test_joined_chunks_are_the_same_answer() -> None:
    assert joined(CHUNKS) == Chunk("Grüße 🙂", (1, 2, 3, 4), 9, (-0.5, -1.0, -2.0, -0.25), "length")


# ---- translation


BEAMS = TranslationParams(num_beams=6, length_penalty=0.5, max_new_tokens=99)


def test_every_translation_knob_arrives_and_unset_is_the_models_default() -> None:
    knobs = {"num_beams": 3, "length_penalty": 0.25, "num_hypotheses": 2, "max_new_tokens": 5}
    params = convert.translation_params(translation_pb2.TranslationConfig(**knobs), BEAMS)
    assert dataclasses.asdict(params) == knobs
    assert convert.translation_params(translation_pb2.TranslationConfig(), BEAMS) == BEAMS
    neutral = convert.translation_params(translation_pb2.TranslationConfig(length_penalty=0.0), BEAMS)
    assert neutral == dataclasses.replace(BEAMS, length_penalty=0.0)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"length_penalty": float("nan")}, "config.length_penalty: nan must be between -10 and 10"),
        ({"num_hypotheses": 7}, "config.num_hypotheses: 7 must be between 1 and num_beams=6"),
    ],
)
def test_a_wrong_translation_knob_is_named_as_the_wire_names_it(knobs: dict[str, float], said: str) -> None:
    with pytest.raises(StatusError, match=f"^{said}$"):
        convert.translation_params(translation_pb2.TranslationConfig(**knobs), BEAMS)


def test_translations_keep_their_order() -> None:
    translations = [
        Translation((Hypothesis("Öl", -0.5, "stop"), Hypothesis("oil", -1.5, "length")), 3, 2),
        Translation((Hypothesis("", 0.0, "stop"),), 0, 0),
    ]
    hypothesis, usage = translation_pb2.Hypothesis, common_pb2.Usage
    stop, length = common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH
    assert convert.translate_response("r", "m", ("de", "en"), translations) == translation_pb2.TranslateResponse(
        id="r",
        model="m",
        source_language="de",
        target_language="en",
        translations=[
            translation_pb2.Translation(
                hypotheses=[
                    hypothesis(text="Öl", score=-0.5, finish_reason=stop),
                    hypothesis(text="oil", score=-1.5, finish_reason=length),
                ],
                usage=usage(prompt_tokens=3, completion_tokens=2),
            ),
            translation_pb2.Translation(hypotheses=[hypothesis(finish_reason=stop)], usage=usage()),
        ],
    )


def test_the_last_message_tells_what_is_true_of_the_whole_document() -> None:
    pieces = [Piece("a ", "stop", 3, 2), Piece("b", "length", 4, 5), Piece("c", "stop", 1, 1)]
    last = convert.last_stream_translate_response("r", "m", ("de", "en"), pieces)
    assert (last.delta, last.finish_reason) == ("", common_pb2.FINISH_REASON_LENGTH)
    assert last.usage == common_pb2.Usage(prompt_tokens=8, completion_tokens=8)
    whole = convert.last_stream_translate_response("r", "m", ("de", "en"), pieces[::2])
    assert whole.finish_reason == common_pb2.FINISH_REASON_STOP


# ---- images


DRAWN = ImageParams(64, 48, num_inference_steps=9, guidance_scale=2.0)


def test_every_image_knob_arrives_and_unset_is_the_models_default() -> None:
    knobs = {"num_inference_steps": 5, "guidance_scale": 1.5, "width": 8, "height": 16}
    wire = image_pb2.ImageConfig(**knobs, sampler=image_pb2.SAMPLER_DPM_SOLVER_PP)
    params = convert.image_params(wire, DRAWN, strength=0.5)
    assert dataclasses.asdict(params) == knobs | {"sampler": "dpm++", "strength": 0.5}
    assert convert.image_params(image_pb2.ImageConfig(), DRAWN) == DRAWN


@pytest.mark.parametrize("value", [0.7, 7.3, 1e-3, 100.0, 1.0, 0.8, 0.1])
def test_a_float_of_the_wire_is_what_was_typed(value: float) -> None:
    """int(10 · 0.7) steps of an edit are 7; as float32 has it, they would be 6."""
    assert image_pb2.EditImageRequest(strength=0.7).strength != 0.7
    assert convert.decimal(image_pb2.EditImageRequest(strength=value).strength) == value


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"guidance_scale": float("inf")}, r"config\.guidance_scale: inf must be between 1 \(no guidance\) and 100"),
        ({"width": -3}, r"config\.width: -3 must be at least 8"),
        (
            {"sampler": 7},
            r"config\.sampler: 7 is not known here; there are: SAMPLER_DDIM, SAMPLER_DPM_SOLVER_PP, SAMPLER_EULER",
        ),
    ],
)
def test_a_wrong_image_knob_is_named_as_the_wire_names_it(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(StatusError, match=f"^{said}$"):
        convert.image_params(image_pb2.ImageConfig(**knobs), DRAWN)


def test_a_wrong_strength_is_the_requests_and_not_its_configs() -> None:
    with pytest.raises(StatusError, match=r"^strength: 0 must be above 0 and at most 1$"):
        convert.image_params(image_pb2.ImageConfig(), DRAWN, strength=0)


def test_seeds_follow_the_first_and_a_fresh_one_can_be_typed_again() -> None:
    assert convert.image_seeds(image_pb2.ImageConfig(seed=0, num_images=3)) == (0, 1, 2)
    assert convert.image_seeds(image_pb2.ImageConfig(seed=2**63 - 1)) == (2**63 - 1,)
    fresh = {convert.image_seeds(image_pb2.ImageConfig())[0] for _ in range(20)}
    assert len(fresh) > 1 and all(0 <= seed < 2**32 for seed in fresh)


def test_a_picture_is_png_unless_it_is_asked_for_otherwise() -> None:
    config = image_pb2.ImageConfig
    assert convert.image_encoding(config()) == Encoding("PNG")
    assert convert.image_encoding(config(format=image_pb2.IMAGE_FORMAT_WEBP)) == Encoding("WEBP", 90)
    assert convert.image_encoding(config(format=image_pb2.IMAGE_FORMAT_JPEG, quality=1)) == Encoding("JPEG", 1)


def test_a_steps_previews_are_small_jpegs() -> None:
    told = convert.step_progress(Progress(2, 9, (np.zeros((512, 256, 3), np.uint8),)))
    assert (told.step, told.total, len(told.previews)) == (2, 9, 1)
    preview = told.previews[0]
    assert (preview.mime_type, preview.width, preview.height, preview.seed) == ("image/jpeg", 128, 256, 0)
