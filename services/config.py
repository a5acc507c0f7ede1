"""What a server serves: one strict config, from a YAML file or from the command line.

    port: 9000
    chat:
      smollm2: {model: models/smollm2, dtype: bf16}
    translation:
      de-en: {model: pictograms, max_num_beams: 4}
    image:
      painter: {model: image-small, max_images: 4}

A `model` is a model folder, or the name of a run in runs/, which stands for its newest model of that service. The file
may be a config of Ray Serve too, for a cluster (services.serve_config). Imports nothing heavier than pydantic. Every
mistake is a ServerConfigError that names the key, the value and the fix.
"""

import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from services.address import DEFAULT_PORT

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
LanguageTag = Annotated[str, Field(pattern=r"^[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*$")]  # BCP-47: de, pt-BR, zh-Hant
Service = Literal["chat", "translation", "image"]
STAGES = {"chat": ("ppo", "sft"), "translation": ("translation",), "image": ("image",)}  # of a run, newest first
_SENTENCE_TOKENS = 64  # of a sentence that is translated, its beams included
_KINDS = {"chat": "causal-lm", "translation": "translation", "image": "text-to-image"}
_Model = TypeVar("_Model", bound=BaseModel)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ServerConfigError(ValueError):
    """A server that cannot start; the message names the key, the value and the fix."""


class ChatModelConfig(BaseModel):
    """One chat model, and what a request to it may hold."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str  # a model folder, or a run's name
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # auto: as the folder's weights are
    max_num_seqs: Positive = 16  # answers made at the same time
    max_waiting: NotNegative = 64  # requests that wait for one of them; the next is RESOURCE_EXHAUSTED
    context_tokens: Positive = 2048  # prompt and answer together; less where the model was made for less
    max_new_tokens: Positive = 1024
    max_messages: Positive = 128
    max_characters: Positive = 64_000  # over all messages of a request

    @property
    def folder(self) -> Path:
        """Raises ServerConfigError where no chat model can be in it."""
        return _with_chat_template(_checked(find_model(self.model), "chat"))

    @property
    def at_once(self) -> int:
        """Requests that are answered at the same time."""
        return self.max_num_seqs

    @property
    def bound(self) -> int:
        """Requests that are answered or wait, at the most."""
        return self.max_num_seqs + self.max_waiting


class TranslationModelConfig(BaseModel):
    """One translation model, and what a request to it may hold."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str  # a model folder, or a run's name
    source_language: LanguageTag | None = None  # default: what the folder says of itself
    target_language: LanguageTag | None = None
    backend: Literal["torch", "ct2"] = "torch"  # ct2: CTranslate2, an extra
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # auto: as the folder's weights are
    max_texts: Positive = 128
    max_characters: Positive = 64_000  # over all texts of a request
    max_num_beams: Annotated[int, Field(gt=0, le=32)] = 8
    max_new_tokens: Positive = 512  # of one sentence
    max_batch_tokens: Positive = 4096  # of the sentences that are translated at the same time, times their beams
    max_waiting: Positive = 4096  # sentences of all requests that wait for a batch; the next is RESOURCE_EXHAUSTED

    @property
    def folder(self) -> Path:
        """Raises ServerConfigError where no translation model can be in it."""
        return _checked(find_model(self.model, service="translation"), "translation")

    @property
    def at_once(self) -> int:
        """Requests that are answered at the same time: about one a sentence, its beams included."""
        return max(1, self.max_batch_tokens // _SENTENCE_TOKENS)

    @property
    def bound(self) -> int:
        """Requests that are answered or wait, at the most: a request is a sentence at least, that a token at least."""
        return self.max_batch_tokens + self.max_waiting


class ImageModelConfig(BaseModel):
    """One image model, and what a request to it may hold."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str  # a diffusers pipeline folder, or a run's name
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # auto: fp32
    max_batch: Positive = 8  # images drawn at the same time
    max_waiting: Positive = 64  # images of all requests that wait for a batch; the next is RESOURCE_EXHAUSTED
    max_images: Annotated[int, Field(gt=0, le=64)] = 8  # of a request; their previews go into one message
    max_pixels: Annotated[int, Field(ge=64, le=1 << 20)] = 1 << 20  # of an image; more may not fit into a message
    max_num_inference_steps: Annotated[int, Field(gt=0, le=1000)] = 150
    max_upload_bytes: Annotated[int, Field(gt=0, le=3 << 20)] = 3 << 20  # image and mask; the same
    max_characters: Annotated[int, Field(gt=0, le=10_000)] = 2000  # of both prompts; EXIF holds no more

    @property
    def folder(self) -> Path:
        """Raises ServerConfigError where no image model can be in it."""
        return _checked(find_model(self.model, service="image"), "image")

    @property
    def at_once(self) -> int:
        """Requests that are answered at the same time: a request is an image at least."""
        return self.max_batch

    @property
    def bound(self) -> int:
        """Requests that are answered or wait, at the most."""
        return self.max_batch + self.max_waiting


ModelConfig = ChatModelConfig | TranslationModelConfig | ImageModelConfig


class Scale(BaseModel):
    """The replicas of one service: processes that each hold every model of it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    replicas: Positive = 1
    max_replicas: Positive | None = None  # above `replicas`: so many where requests would wait, `replicas` at the least
    threads: Positive | None = None  # torch threads per replica; default: its cpus, or its share of the machine's cores
    cpus: Annotated[float, Field(ge=0)] = 0.0  # per replica, of a node that has them; 0: any node, also a full one
    gpus: NotNegative = 0  # per replica

    @model_validator(mode="after")
    def _may_grow(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas={self.max_replicas}: is below replicas={self.replicas}; raise or drop it")
        return self


class ModelsArgs(Scale):
    """What services.app:models takes."""

    services: dict[Service, list[str]]  # the names of each service's models


class ChatArgs(Scale):
    """What services.app:chat takes."""

    models: Annotated[dict[str, ChatModelConfig], Field(min_length=1)]


class TranslationArgs(Scale):
    """What services.app:translation takes."""

    models: Annotated[dict[str, TranslationModelConfig], Field(min_length=1)]


class ImageArgs(Scale):
    """What services.app:image takes."""

    models: Annotated[dict[str, ImageModelConfig], Field(min_length=1)]


ServiceArgs = ChatArgs | TranslationArgs | ImageArgs
SERVICE_ARGS: dict[str, type[ServiceArgs]] = {"chat": ChatArgs, "translation": TranslationArgs, "image": ImageArgs}


class ServerConfig(BaseModel):
    """A server: its models, its port and what it may use of the machine."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    chat: dict[str, ChatModelConfig] = {}
    translation: dict[str, TranslationModelConfig] = {}
    image: dict[str, ImageModelConfig] = {}
    port: Annotated[int, Field(gt=0, lt=65536)] = DEFAULT_PORT
    replicas: Positive = 1  # of each service: processes that each hold every model of it
    threads: Positive | None = None  # torch threads per replica; default: the machine's cores over all replicas
    gpus_per_replica: NotNegative = 0
    scale: dict[Literal[Service, "models"], Scale] = {}  # in place of those three, by service
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0  # of a whole answer, streams included
    object_store_mb: Annotated[int, Field(ge=80)] = 200
    metrics_port: Annotated[int, Field(gt=0, lt=65536)] | None = None  # Prometheus reads /metrics there

    @property
    def services(self) -> dict[Service, list[str]]:
        """The names of each service's models, of the services that have any."""
        return {service: sorted(models) for service, models in self._models().items() if models}

    def arguments(self) -> dict[str, ModelsArgs | ServiceArgs]:
        """What the builders in services.app take, by application: a service without models has none.

        Paths are absolute, since a replica may run in another folder. Raises ServerConfigError where a folder cannot
        hold its model.
        """
        listed = {"services": self.services, **dict(self.scale.get("models", Scale()))}
        made: dict[str, ModelsArgs | ServiceArgs] = {"models": ModelsArgs.model_validate(listed)}
        for service in self.services:
            models = {
                name: model.model_copy(update={"model": str(model.folder.resolve())})
                for name, model in self._models()[service].items()
            }
            made[service] = SERVICE_ARGS[service].model_validate({"models": models, **dict(self._scale(service))})
        return made

    def sharing_one_machine(self) -> Self:
        """The same without `cpus`: where all replicas share a machine, they would only keep some from starting."""
        scale = {service: s.model_copy(update={"cpus": 0.0}) for service, s in self.scale.items()}
        return self.model_copy(update={"scale": scale})

    def _scale(self, service: Service) -> Scale:
        """With threads, where neither they nor cpus are said: a share of this machine's cores."""
        scales = {name: self.scale.get(name, self._alike()) for name in self.services}
        if scales[service].threads or scales[service].cpus:
            return scales[service]
        replicas = sum(s.max_replicas or s.replicas for s in scales.values())
        threads = max(1, len(os.sched_getaffinity(0)) // replicas)
        return scales[service].model_copy(update={"threads": threads})

    def _alike(self) -> Scale:
        return Scale(replicas=self.replicas, threads=self.threads, gpus=self.gpus_per_replica)

    def _models(self) -> dict[Service, Mapping[str, ModelConfig]]:
        return {"chat": self.chat, "translation": self.translation, "image": self.image}

    @model_validator(mode="after")
    def _serves_something(self) -> Self:
        if not self.services:
            raise ValueError("no model to serve; give --chat, --translation or --image MODEL, or a config file")
        return self

    @model_validator(mode="after")
    def _names_are_plain_and_unique(self) -> Self:
        for service, names in self.services.items():
            if wrong := [name for name in names if not _NAME.fullmatch(name)]:
                raise ValueError(
                    f"{service}: model name {wrong[0]!r} must be letters, digits, '.', '_' or '-', at most 64"
                )
        taken: dict[str, str] = {}
        for service, models in self._models().items():
            if twice := sorted(models.keys() & taken.keys()):
                raise ValueError(
                    f"{service}: model name {twice[0]!r} is a {taken[twice[0]]} model's; give it another: "
                    f"--{service} NAME={models[twice[0]].model}"
                )
            taken |= dict.fromkeys(models, service)
        return self


def load_config(path: Path | None, **changes: Any) -> ServerConfig:
    """The YAML file at `path`, or an empty one, with `changes` put over it; a service's models are merged by name.

    The file has either form, ours or Ray Serve's. Every model folder is looked at.
    """
    tree = _read(path) if path else {}
    if "applications" in tree:
        from services.serve_config import short_form

        tree = short_form(tree)
    for service in STAGES:
        given, more = tree.get(service) or {}, changes.pop(service, {})
        tree[service] = {**given, **more} if isinstance(given, dict) else given  # what is none is explained below
    tree.update(changes)
    config = validated(ServerConfig, tree)
    config.arguments()  # raises where a folder cannot hold its model
    return config


def parse_model_option(option: str, service: str) -> tuple[str, str]:
    """(name, model) of `NAME=MODEL` or of MODEL alone, which is then called by its run or its folder."""
    name, equals, model = option.partition("=")
    if equals and _NAME.fullmatch(name):
        return name, model
    path = find_model(option, service=service)
    from_run = path.name == "model" and path.parent.name in STAGES[service]
    return (path.parent.parent.name if from_run else path.resolve().name), option


def find_model(model: str, runs: Path = Path("runs"), service: str = "chat") -> Path:
    """The folder that `model` names: itself, or the newest model for `service` of the run of that name."""
    folder = Path(model)
    if _is_model(folder):
        return folder
    run = folder if (folder / "run.json").is_file() else runs / model
    for stage in STAGES[service]:
        if _is_model(run / stage / "model"):
            return run / stage / "model"
    if (run / "run.json").is_file():
        needed = STAGES[service][-1]
        raise ServerConfigError(
            f"run {model!r} has no {service} model yet: it needs its {needed} stage; `chatforge runs {model}`"
        )
    file = "model_index.json" if service == "image" else "config.json"
    raise ServerConfigError(f"model {model!r} not found: give a folder with a {file}, or a run in {runs}/")


def _is_model(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("config.json", "model_index.json"))


def _checked(folder: Path, service: str) -> Path:
    """`folder`, by what can be told without loading. Raises ServerConfigError where it holds no model for `service`."""
    card = folder / "chatforge.json"
    kind = (_read_json(card).get("kind") if card.is_file() else None) or _kind_without_card(folder)
    if kind != _KINDS[service]:
        raise ServerConfigError(f"{folder}: holds a {kind} model; {service} needs a {_KINDS[service]} model")
    if service != "image" and not (folder / "tokenizer_config.json").is_file():
        raise ServerConfigError(
            f"{folder}: has no tokenizer_config.json; a {service} model's folder holds its tokenizer"
        )
    return folder


def _kind_without_card(folder: Path) -> str:
    if (folder / "model_index.json").is_file():
        return "text-to-image"
    return "translation" if _read_json(folder / "config.json").get("is_encoder_decoder") else "causal-lm"


def _with_chat_template(folder: Path) -> Path:
    templated = (folder / "chat_template.jinja").is_file()
    if not templated and "chat_template" not in _read_json(folder / "tokenizer_config.json"):
        raise ServerConfigError(f"{folder}: its tokenizer has no chat template; serve an instruction-tuned model")
    return folder


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise ServerConfigError(f"{file}: not a JSON object: {error}") from None


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


def validated(kind: type[_Model], tree: Any, at: str = "") -> _Model:
    """`tree` as a `kind`. Raises ServerConfigError, a line for each mistake; `at` stands before every key."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ServerConfigError("\n".join(at + _explained(kind, dict(e)) for e in error.errors())) from None


def _explained(kind: type[BaseModel], error: dict[str, Any]) -> str:
    """One line for one pydantic error: key, value, and what is valid there."""
    where = [part for part in error["loc"] if part != "[key]"]
    key = ".".join(str(part) for part in where)
    if error["type"] == "extra_forbidden":
        keys = _keys_beside(kind, where)
        return f"{key}: no such key; valid: {', '.join(keys)}{nearest(str(where[-1]), keys)}"
    if error["type"] == "missing":
        return f"{key}: is required and has no default"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "literal_error":
        message += nearest(str(error["input"]), re.findall(r"'([^']*)'", message))
    return f"{key}={error['input']!r}: {message}" if key else message


def _keys_beside(kind: Any, where: list[str | int]) -> list[str]:
    for part in where[:-1]:
        is_config = isinstance(kind, type) and issubclass(kind, BaseModel)
        kind = kind.model_fields[part].annotation if is_config else get_args(kind)[-1]
    return list(kind.model_fields)


def nearest(word: str, valid: Iterable[str]) -> str:
    """What to put behind a mistake's message: the valid word that was meant, where one is near."""
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
