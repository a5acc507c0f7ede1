"""The contract: its stubs are the protos', its style is buf's, and what it says is what DESIGN promised."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from services_world import ROOT

from chatforge.v1 import chat_pb2, image_pb2, models_pb2, translation_pb2
from serving.engine.api import SamplingParams
from serving.image.api import ImageParams
from serving.translation.api import TranslationParams

PROTO = ROOT / "proto"
PROTOS = sorted(str(path.relative_to(PROTO)) for path in PROTO.glob("chatforge/v1/*.proto"))


def test_the_committed_stubs_are_those_of_the_protos(tmp_path: Path) -> None:
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={PROTO}", *outputs, *PROTOS]
    subprocess.run(command, check=True)
    made = {path.name: path.read_text("utf-8") for path in (tmp_path / "chatforge/v1").iterdir()}
    kept = {path.name: path.read_text("utf-8") for path in (PROTO / "chatforge/v1").glob("*_pb2*.py*")}
    assert sorted(made) == sorted(kept)
    assert [name for name in made if made[name] != kept[name]] == [], "run `make proto`"


def test_the_protos_are_in_bufs_standard_style_with_every_field_commented() -> None:
    buf = Path(sys.executable).parent / "buf"
    told = subprocess.run([buf, "lint"], cwd=PROTO, capture_output=True, text=True)
    assert (told.returncode, told.stdout) == (0, "")


def test_proto_is_a_source_root_and_no_package() -> None:
    """An __init__.py there would shadow proto-plus, which Google's libraries import as `proto`."""
    assert not (PROTO / "__init__.py").exists()
    assert (PROTO / "chatforge/v1/__init__.py").exists()


@pytest.mark.parametrize(
    ("file", "service", "methods"),
    [
        (chat_pb2, "ChatService", ["Chat", "StreamChat"]),
        (translation_pb2, "TranslationService", ["Translate", "StreamTranslate", "ListLanguages"]),
        (image_pb2, "ImageService", ["GenerateImage", "StreamGenerateImage", "EditImage"]),
        (models_pb2, "ModelService", ["ListModels", "GetModel"]),
    ],
)
def test_services_and_methods(file: object, service: str, methods: list[str]) -> None:
    described = file.DESCRIPTOR.services_by_name[service]  # type: ignore[attr-defined]
    assert described.full_name == f"chatforge.v1.{service}"
    assert [method.name for method in described.methods] == methods


def test_unary_and_stream_take_the_same_request() -> None:
    """One validator serves both, so their fields must not drift apart."""

    def fields(message: object) -> list[tuple[str, int, int]]:
        return [(f.name, f.number, f.type) for f in message.DESCRIPTOR.fields]  # type: ignore[attr-defined]

    assert fields(chat_pb2.ChatRequest) == fields(chat_pb2.StreamChatRequest)
    whole, stream = fields(image_pb2.GenerateImageRequest), fields(image_pb2.StreamGenerateImageRequest)
    assert whole == stream[:-1] and stream[-1][0] == "preview_every"
    many, one = fields(translation_pb2.TranslateRequest), fields(translation_pb2.StreamTranslateRequest)
    assert [("text", *rest) if name == "texts" else (name, *rest) for name, *rest in many] == one


@pytest.mark.parametrize(
    ("config", "params"),
    [(chat_pb2.GenerationConfig, SamplingParams), (translation_pb2.TranslationConfig, TranslationParams)],
)
def test_every_knob_is_optional_and_is_that_of_serving(config: Any, params: Any) -> None:
    """temperature = 0 differs from unset; a knob that the engine lacks could only be ignored."""
    fields = config.DESCRIPTOR.fields
    assert all(field.has_presence or field.is_repeated for field in fields)
    assert sorted(field.name for field in fields) == sorted(params.__dataclass_fields__)


def test_every_knob_of_an_image_is_that_of_serving_or_of_its_file() -> None:
    """Strength is an edit's own; seeds and how many there are come to a request beside its params."""
    config = image_pb2.ImageConfig.DESCRIPTOR
    of_the_request = {"num_images", "seed", "format", "quality", "embed_metadata"}
    assert {f.name for f in config.fields} - of_the_request == ImageParams.__dataclass_fields__.keys() - {"strength"}
    zero_is_unset = {"sampler", "format", "embed_metadata"}
    assert {field.name for field in config.fields if not field.has_presence} == zero_is_unset
    assert image_pb2.EditImageRequest.DESCRIPTOR.fields_by_name["strength"].has_presence
