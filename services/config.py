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

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import Field, model_validator

from services.address import DEFAULT_PORT
from services.folders import NAME, model_folder
from services.strict import ServerConfigError, Strict, validated
from serving.engine.api import MIN_CONTEXT_TOKENS
from serving.image.api import MAX_NUM_INFERENCE_STEPS
from serving.translation.api import MAX_NUM_BEAMS

Positive = Annotated[int, Field(gt=0)]
Gpus = Annotated[float, Field(ge=0, le=1)]
LanguageTag = Annotated[str, Field(pattern=r"^[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*$")]  # BCP-47: de, pt-BR, zh-Hant
Service = Literal["chat", "translation", "image"]
_SENTENCE_TOKENS = 64  # of a sentence that is translated, its beams included


class _ModelConfig(Strict):
    """What every model has."""

    service: ClassVar[Service]

    model: str  # a model folder, or a run's name
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # auto: as the folder's weights are; an image model's: fp32
    allow_unsafe: bool = False  # pickled weights, and code that comes with the folder: either may do all that we may

    @property
    def folder(self) -> Path:
        """Raises ServerConfigError where no model for the service can be in it."""
        return model_folder(self.model, self.service)


class ChatModelConfig(_ModelConfig):
    """One chat model, and what a request to it may hold."""

    service = "chat"

    max_num_seqs: Positive = 16  # answers made at the same time
    max_waiting: Positive = 64  # requests that wait for one of them; the next is RESOURCE_EXHAUSTED
    context_tokens: Annotated[int, Field(ge=MIN_CONTEXT_TOKENS)] = 2048  # prompt and answer; less where the model's is
    max_new_tokens: Positive = 1024
    max_messages: Positive = 128
    max_characters: Positive = 64_000  # over all messages of a request

    @property
    def at_once(self) -> int:
        """Requests that are answered at the same time."""
        return self.max_num_seqs

    @property
    def bound(self) -> int:
        """Requests that are answered or wait, at the most."""
        return self.max_num_seqs + self.max_waiting


class TranslationModelConfig(_ModelConfig):
    """One translation model, and what a request to it may hold."""

    service = "translation"

    source_language: LanguageTag | None = None  # default: what the folder says of itself
    target_language: LanguageTag | None = None
    backend: Literal["torch", "ct2"] = "torch"  # ct2: CTranslate2, an extra
    max_texts: Positive = 128
    max_characters: Positive = 64_000  # over all texts of a request
    max_num_beams: Annotated[int, Field(gt=0, le=MAX_NUM_BEAMS)] = 8
    max_new_tokens: Positive = 512  # of one sentence
    max_batch_tokens: Positive = 4096  # of the sentences that are translated at the same time, times their beams
    max_waiting: Positive = 4096  # sentences of all requests that wait for a batch; the next is RESOURCE_EXHAUSTED

    @property
    def at_once(self) -> int:
        """Requests that are answered at the same time: about one a sentence, its beams included."""
        return max(1, self.max_batch_tokens // _SENTENCE_TOKENS)

    @property
    def bound(self) -> int:
        """Requests that are answered or wait, at the most: a request is a sentence at least, that a token at least."""
        return self.max_batch_tokens + self.max_waiting


class ImageModelConfig(_ModelConfig):
    """One image model, and what a request to it may hold."""

    service = "image"

    max_batch: Positive = 8  # images drawn at the same time
    max_waiting: Positive = 64  # images of all requests that wait for a batch; the next is RESOURCE_EXHAUSTED
    max_images: Annotated[int, Field(gt=0, le=64)] = 8  # of a request; their previews go into one message
    max_pixels: Annotated[int, Field(ge=64, le=1 << 20)] = 1 << 20  # of an image; more may not fit into a message
    max_num_inference_steps: Annotated[int, Field(gt=0, le=MAX_NUM_INFERENCE_STEPS)] = 150
    max_upload_bytes: Annotated[int, Field(gt=0, le=3 << 20)] = 3 << 20  # image and mask; the same
    max_characters: Annotated[int, Field(gt=0, le=10_000)] = 2000  # of both prompts; EXIF holds no more

    @property
    def at_once(self) -> int:
        """Requests that are answered at the same time: a request is an image at least."""
        return self.max_batch

    @property
    def bound(self) -> int:
        """Requests that are answered or wait, at the most."""
        return self.max_batch + self.max_waiting


ModelConfig = ChatModelConfig | TranslationModelConfig | ImageModelConfig


class Scale(Strict):
    """The replicas of one service: processes that each hold every model of it."""

    replicas: Positive = 1
    max_replicas: Positive | None = None  # above `replicas`: so many where requests would wait, `replicas` at the least
    threads: Positive | None = None  # torch threads per replica; default: its cpus, or its share of the machine's cores
    cpus: Annotated[float, Field(ge=0)] = 0.0  # per replica, of a node that has them; 0: any node, also a full one
    gpus: Gpus | None = None  # per replica; default: on one machine an equal part of its GPUs, on a cluster none

    @model_validator(mode="after")
    def _may_grow(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas={self.max_replicas}: is below replicas={self.replicas}; raise or drop it")
        return self

    @property
    def most_replicas(self) -> int:
        return self.max_replicas or self.replicas


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


class ServerConfig(Strict):
    """A server: its models, its port and what it may use of the machine."""

    chat: dict[str, ChatModelConfig] = Field(default_factory=dict)
    translation: dict[str, TranslationModelConfig] = Field(default_factory=dict)
    image: dict[str, ImageModelConfig] = Field(default_factory=dict)
    port: Annotated[int, Field(gt=0, lt=65536)] = DEFAULT_PORT
    replicas: Positive = 1  # of each service: processes that each hold every model of it
    threads: Positive | None = None  # torch threads per replica; default: the machine's cores over all replicas
    gpus_per_replica: Gpus | None = None  # default: an equal part of the machine's GPUs, one at the most
    scale: dict[Literal[Service, "models"], Scale] = Field(default_factory=dict)  # in place of those three, by service
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0  # of a whole answer, streams included
    object_store_mb: Annotated[int, Field(ge=80)] = 200
    metrics_port: Annotated[int, Field(gt=0, lt=65536)] | None = None  # Prometheus reads /metrics there

    @property
    def services(self) -> dict[Service, list[str]]:
        """The names of each service's models, of the services that have any."""
        return {service: sorted(models) for service, models in self.models.items() if models}

    @property
    def scales(self) -> dict[Service, Scale]:
        """Of every service that has models."""
        alike = Scale(replicas=self.replicas, threads=self.threads, gpus=self.gpus_per_replica)
        return {service: self.scale.get(service, alike) for service in self.services}

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
                for name, model in self.models[service].items()
            }
            made[service] = SERVICE_ARGS[service].model_validate({"models": models, **dict(self._scale(service))})
        return made

    def sharing_one_machine(self) -> Self:
        """The same without `cpus`: where all replicas share a machine, they would only keep some from starting."""
        scale = {service: s.model_copy(update={"cpus": 0.0}) for service, s in self.scale.items()}
        return self.model_copy(update={"scale": scale})

    def _scale(self, service: Service) -> Scale:
        """With threads, where neither they nor cpus are said: a share of this machine's cores."""
        scale = self.scales[service]
        if scale.threads or scale.cpus:
            return scale
        replicas = sum(s.most_replicas for s in self.scales.values())
        threads = max(1, len(os.sched_getaffinity(0)) // replicas)
        return scale.model_copy(update={"threads": threads})

    @property
    def models(self) -> dict[Service, Mapping[str, ModelConfig]]:
        """By service and name."""
        return {"chat": self.chat, "translation": self.translation, "image": self.image}

    @model_validator(mode="after")
    def _serves_something(self) -> Self:
        if not self.services:
            raise ValueError("no model to serve; give --chat, --translation or --image MODEL, or a config file")
        return self

    @model_validator(mode="after")
    def _names_are_plain_and_unique(self) -> Self:
        for service, names in self.services.items():
            if wrong := [name for name in names if not NAME.fullmatch(name)]:
                raise ValueError(
                    f"{service}: model name {wrong[0]!r} must be letters, digits, '.', '_' or '-', at most 64"
                )
        taken: dict[str, str] = {}
        for service, models in self.models.items():
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
    for service in SERVICE_ARGS:
        given, more = tree.get(service) or {}, changes.pop(service, {})
        tree[service] = {**given, **more} if isinstance(given, dict) else given  # what is none is explained below
    tree.update(changes)
    config = validated(ServerConfig, tree)
    config.arguments()  # raises where a folder cannot hold its model
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ServerConfigError(f"config {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ServerConfigError(f"{path}: not UTF-8 at byte {error.start + 1}") from None
    except yaml.YAMLError as error:
        raise ServerConfigError(f"{path}: not valid YAML: {error}") from None
    if tree is None:
        raise ServerConfigError(f"{path}: is empty; name a model in it, as in `chat: {{mine: {{model: FOLDER}}}}`")
    if not isinstance(tree, dict):
        raise ServerConfigError(f"{path}: a server's config is a mapping, not {type(tree).__name__}")
    return tree
