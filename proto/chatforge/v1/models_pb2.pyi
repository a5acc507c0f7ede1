from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ModelKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODEL_KIND_UNSPECIFIED: _ClassVar[ModelKind]
    MODEL_KIND_CAUSAL_LM: _ClassVar[ModelKind]
    MODEL_KIND_REWARD: _ClassVar[ModelKind]
    MODEL_KIND_TRANSLATION: _ClassVar[ModelKind]
    MODEL_KIND_TEXT_TO_IMAGE: _ClassVar[ModelKind]

class ModelState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODEL_STATE_UNSPECIFIED: _ClassVar[ModelState]
    MODEL_STATE_LOADING: _ClassVar[ModelState]
    MODEL_STATE_READY: _ClassVar[ModelState]
    MODEL_STATE_FAILED: _ClassVar[ModelState]
MODEL_KIND_UNSPECIFIED: ModelKind
MODEL_KIND_CAUSAL_LM: ModelKind
MODEL_KIND_REWARD: ModelKind
MODEL_KIND_TRANSLATION: ModelKind
MODEL_KIND_TEXT_TO_IMAGE: ModelKind
MODEL_STATE_UNSPECIFIED: ModelState
MODEL_STATE_LOADING: ModelState
MODEL_STATE_READY: ModelState
MODEL_STATE_FAILED: ModelState

class ModelLimits(_message.Message):
    __slots__ = ("context_tokens", "max_new_tokens", "max_messages", "max_characters", "max_texts", "max_num_beams", "max_images", "max_pixels", "max_num_inference_steps", "max_upload_bytes")
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGES_FIELD_NUMBER: _ClassVar[int]
    MAX_CHARACTERS_FIELD_NUMBER: _ClassVar[int]
    MAX_TEXTS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_BEAMS_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGES_FIELD_NUMBER: _ClassVar[int]
    MAX_PIXELS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_INFERENCE_STEPS_FIELD_NUMBER: _ClassVar[int]
    MAX_UPLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    context_tokens: int
    max_new_tokens: int
    max_messages: int
    max_characters: int
    max_texts: int
    max_num_beams: int
    max_images: int
    max_pixels: int
    max_num_inference_steps: int
    max_upload_bytes: int
    def __init__(self, context_tokens: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., max_messages: _Optional[int] = ..., max_characters: _Optional[int] = ..., max_texts: _Optional[int] = ..., max_num_beams: _Optional[int] = ..., max_images: _Optional[int] = ..., max_pixels: _Optional[int] = ..., max_num_inference_steps: _Optional[int] = ..., max_upload_bytes: _Optional[int] = ...) -> None: ...

class ModelLineage(_message.Message):
    __slots__ = ("run", "stage", "source")
    RUN_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    run: str
    stage: str
    source: str
    def __init__(self, run: _Optional[str] = ..., stage: _Optional[str] = ..., source: _Optional[str] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "kind", "revision", "limits", "lineage", "state", "source_language", "target_language")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_LANGUAGE_FIELD_NUMBER: _ClassVar[int]
    TARGET_LANGUAGE_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: ModelKind
    revision: str
    limits: ModelLimits
    lineage: ModelLineage
    state: ModelState
    source_language: str
    target_language: str
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[_Union[ModelKind, str]] = ..., revision: _Optional[str] = ..., limits: _Optional[_Union[ModelLimits, _Mapping]] = ..., lineage: _Optional[_Union[ModelLineage, _Mapping]] = ..., state: _Optional[_Union[ModelState, str]] = ..., source_language: _Optional[str] = ..., target_language: _Optional[str] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: Model
    def __init__(self, model: _Optional[_Union[Model, _Mapping]] = ...) -> None: ...
