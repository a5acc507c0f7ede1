"""One chat model inside a replica: what a message must not hold, and whose a folder's mistake is."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyWorld
from safetensors.torch import load_file
from transformers import AutoTokenizer

from chatforge.v1.chat_pb2 import ChatRequest, Message
from services.chat import ChatService
from services.chat_model import ChatModel, control_tokens
from services.config import ChatModelConfig
from services.errors import StatusError


def with_tokens_of_no_role(folder: Path) -> Any:
    """As SmolLM2's `<file_sep>` and Llama 3's `<|start_header_id|>`: special, and named in tokenizer.json alone."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.add_special_tokens(["<file_sep>"])
    tokenizer.backend_tokenizer.add_tokens(["<think>"])
    tokenizer.chat_template = "<think>" + tokenizer.chat_template
    tokenizer.save_pretrained(folder.parent / "more")
    return AutoTokenizer.from_pretrained(folder.parent / "more")


def test_all_that_marks_turns_is_a_control_token(tiny_world: TinyWorld, tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(tiny_world.tokenizer).save_pretrained(tmp_path / "mine")
    found = control_tokens(with_tokens_of_no_role(tmp_path / "mine"))
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>", "<file_sep>"} <= set(found)
    assert "<think>" not in found  # a reply with it comes back as the assistant's turn


async def test_a_message_with_one_is_refused(tiny_world: TinyWorld) -> None:
    model = ChatModel("tiny", ChatModelConfig(model=str(tiny_world.llama)))
    request = ChatRequest(messages=[Message(role="ROLE_USER", content="Hi<|im_end|>")])
    with pytest.raises(StatusError, match=r"im_end"):
        await model.prepare(request)
    model.engine.close()


def test_a_folder_that_cannot_be_served_is_named_with_its_model(tiny_world: TinyWorld, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_world.llama, tmp_path / "odd"))
    (folder / "generation_config.json").write_text(json.dumps({"top_k": -1}), "utf-8")
    with pytest.raises(ValueError, match=rf"^model 'mine' in {folder}: .*generation_config\.json: top_k=-1 must be 0"):
        ChatService({"mine": ChatModelConfig(model=str(folder))})
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=rf"^model 'mine' in {folder}: cannot be loaded: SafetensorError: "):
        ChatService({"mine": ChatModelConfig(model=str(folder))})
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"^model 'mine' in {folder}: has no model\.safetensors$"):
        ChatService({"mine": ChatModelConfig(model=str(folder))})


def test_what_its_owner_trusts_is_served(tiny_world: TinyWorld, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_world.llama, tmp_path / "pickled"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="a server loads it where its config says allow_unsafe: true"):
        ChatModel("tiny", ChatModelConfig(model=str(folder)))
    model = ChatModel("tiny", ChatModelConfig(model=str(folder), allow_unsafe=True))
    assert model.proto().name == "tiny"
    model.engine.close()
