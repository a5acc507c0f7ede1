"""What Python calls the values of the protos' enums; the server reads these tables backwards."""

from collections.abc import Mapping
from typing import Literal, TypeVar

from chatforge.v1 import chat_pb2, common_pb2, image_pb2, models_pb2

FinishReason = Literal["stop", "length"]
_Name = TypeVar("_Name", bound=str)

ROLES = {"system": chat_pb2.ROLE_SYSTEM, "user": chat_pb2.ROLE_USER, "assistant": chat_pb2.ROLE_ASSISTANT}
FINISH_REASONS: dict[FinishReason, common_pb2.FinishReason] = {
    "stop": common_pb2.FINISH_REASON_STOP,
    "length": common_pb2.FINISH_REASON_LENGTH,
}
SAMPLERS = {
    "ddim": image_pb2.SAMPLER_DDIM,
    "dpm++": image_pb2.SAMPLER_DPM_SOLVER_PP,
    "euler": image_pb2.SAMPLER_EULER,
}
FORMATS = {
    "png": image_pb2.IMAGE_FORMAT_PNG,
    "jpeg": image_pb2.IMAGE_FORMAT_JPEG,
    "webp": image_pb2.IMAGE_FORMAT_WEBP,
}
KINDS = {
    "causal-lm": models_pb2.MODEL_KIND_CAUSAL_LM,
    "reward": models_pb2.MODEL_KIND_REWARD,
    "translation": models_pb2.MODEL_KIND_TRANSLATION,
    "text-to-image": models_pb2.MODEL_KIND_TEXT_TO_IMAGE,
}
STATES = {
    "loading": models_pb2.MODEL_STATE_LOADING,
    "ready": models_pb2.MODEL_STATE_READY,
    "failed": models_pb2.MODEL_STATE_FAILED,
}


def by_number(table: Mapping[_Name, int]) -> dict[int, _Name]:
    """The same table from number to name."""
    return {number: name for name, number in table.items()}
