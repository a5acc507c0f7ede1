"""What a server serves: one strict config, from a YAML file or from the command line.

    port: 9000
    chat:
      smollm2: {model: models/smollm2, dtype: bf16}

A `model` is a model folder, or the name of a run in runs/, which stands for its newest chat model. Imports nothing
heavier than pydantic. Every mistake is a ServerConfigError that names the key, the value and the fix.
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Positive = Annotated[int, Field(gt=0)]
CHAT_STAGES = ("ppo", "sft")  # newest first
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ServerConfigError(ValueError):
    """A server that cannot start; the message names the key, the value and the fix."""


class ChatModelConfig(BaseModel):
    """One chat model, and what a request to it may hold."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str  # a model folder, or a run's name
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # auto: as the folder's weights are
    max_num_seqs: Positive = 16  # answers made at the same time
    max_waiting: Annotated[int, Field(ge=0)] = 64  # requests that wait for one of them; the next is RESOURCE_EXHAUSTED
    context_tokens: Positive = 2048  # prompt and answer together; less where the model was made for less
    max_new_tokens: Positive = 1024
    max_messages: Positive = 128
    max_characters: Positive = 64_000  # over all messages of a request

    @property
    def folder(self) -> Path:
        return find_model(self.model)


class ServerConfig(BaseModel):
    """A server: its models, its port and what it may use of the machine."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    chat: Annotated[dict[str, ChatModelConfig], Field(min_length=1)]
    port: Annotated[int, Field(gt=0, lt=65536)] = 9000
    replicas: Positive = 1  # processes that each hold every model
    threads: Positive | None = None  # torch threads per replica; default: the machine's cores over the replicas
    gpus_per_replica: Annotated[int, Field(ge=0)] = 0
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0  # of a whole answer, streams included
    object_store_mb: Annotated[int, Field(ge=80)] = 200
    metrics_port: Annotated[int, Field(gt=0, lt=65536)] | None = None  # Prometheus reads /metrics there

    @model_validator(mode="after")
    def _names_are_plain(self) -> Self:
        for name in self.chat:
            if not _NAME.fullmatch(name):
                raise ValueError(f"chat: model name {name!r} must be letters, digits, '.', '_' or '-', at most 64")
        return self


def load_config(path: Path | None, **changes: Any) -> ServerConfig:
    """The YAML file at `path`, or an empty one, with `changes` put over it; `chat` is merged by name."""
    tree = _read(path) if path else {}
    chat = {**(tree.get("chat") or {}), **changes.pop("chat", {})}
    tree.update(changes, chat=chat)
    try:
        config = ServerConfig.model_validate(tree)
    except ValidationError as error:
        raise ServerConfigError("\n".join(_explained(dict(e)) for e in error.errors())) from None
    for model in config.chat.values():
        check_chat_folder(model.folder)
    return config


def parse_chat_option(option: str) -> tuple[str, str]:
    """(name, model) of `NAME=MODEL` or of MODEL alone, which is then called by its run or its folder."""
    name, equals, model = option.partition("=")
    if equals and _NAME.fullmatch(name):
        return name, model
    path = find_model(option)
    from_run = path.name == "model" and path.parent.name in CHAT_STAGES
    return (path.parent.parent.name if from_run else path.resolve().name), option


def find_model(model: str, runs: Path = Path("runs")) -> Path:
    """The folder that `model` names: itself, or the newest chat model of the run of that name."""
    folder = Path(model)
    if (folder / "config.json").is_file():
        return folder
    run = folder if (folder / "run.json").is_file() else runs / model
    for stage in CHAT_STAGES:
        if (run / stage / "model" / "config.json").is_file():
            return run / stage / "model"
    if (run / "run.json").is_file():
        raise ServerConfigError(
            f"run {model!r} has no chat model yet: it needs its sft stage; `chatforge runs {model}`"
        )
    raise ServerConfigError(f"model {model!r} not found: give a folder with a config.json, or a run in {runs}/")


def check_chat_folder(folder: Path) -> None:
    """What can be told without loading: raises ServerConfigError where a chat model cannot be in `folder`."""
    card = folder / "chatforge.json"
    kind = json.loads(card.read_text("utf-8")).get("kind", "causal-lm") if card.is_file() else "causal-lm"
    if kind != "causal-lm":
        raise ServerConfigError(f"{folder}: holds a {kind} model; chat needs a causal-lm")
    settings = folder / "tokenizer_config.json"
    if not settings.is_file():
        raise ServerConfigError(f"{folder}: has no tokenizer_config.json; a chat model's folder holds its tokenizer")
    if not (folder / "chat_template.jinja").is_file() and "chat_template" not in json.loads(
        settings.read_text("utf-8")
    ):
        raise ServerConfigError(f"{folder}: its tokenizer has no chat template; serve an instruction-tuned model")


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ServerConfigError(f"config {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ServerConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ServerConfigError(f"{path}: a server's config is a mapping, not {type(tree).__name__}")
    return tree


def _explained(error: dict[str, Any]) -> str:
    """One line for one pydantic error: key, value, and what is valid there."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        model = ChatModelConfig if error["loc"][0] == "chat" else ServerConfig
        return f"{key}: no such key; valid: {', '.join(model.model_fields)}"
    if error["type"] == "missing":
        return f"{key}: is required and has no default"
    if error["type"] == "too_short":
        return "chat: no model to serve; give --chat MODEL or a config file"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}={error['input']!r}: {message}" if key else message
