"""What the servicers of the services that hold models have in common: ChatService, TranslationService, ImageService."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from chatforge.v1.models_pb2 import Model
from services import convert
from services.config import ModelConfig
from services.threads import give_away_the_pool
from serving.model_folder import describe

DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}


class Works(Protocol):
    """What a model answers by: TorchEngine, Translator, Painter."""

    device_is_lost: bool

    def stats(self) -> Any: ...


class ServedModel(ABC):
    """One model inside a replica."""

    def __init__(self, name: str, folder: Path, allow_unsafe: bool) -> None:
        self.name, self.info = name, describe(folder, allow_unsafe=allow_unsafe)

    @property
    @abstractmethod
    def worker(self) -> Works: ...

    @property
    @abstractmethod
    def limits(self) -> dict[str, int]:
        """What a request may hold, by the names of chatforge.v1.ModelLimits."""

    def proto(self) -> Model:
        return convert.model_proto(self.name, self.info, self.limits)


class Metrics(Protocol):
    """What one model publishes."""

    def show(self, stats: Any) -> None: ...


M = TypeVar("M", bound=ServedModel)
K = TypeVar("K", bound=Metrics)


class Servicer(Generic[M, K]):
    """One Serve deployment, whose replicas each hold every model of the service. A subclass has the RPCs."""

    def __init__(
        self,
        models: Mapping[str, ModelConfig],
        device: str,
        load: Callable[[str, Any, str, int], M],
        metrics: Callable[[str], K],
    ) -> None:
        """Loads every model by `load(name, config, device, threads)`. Raises ValueError where one cannot be served."""
        threads = give_away_the_pool()
        self._models = {name: _loaded(load, name, config, device, threads) for name, config in models.items()}
        self._metrics = {name: metrics(name) for name in models}

    def describe(self) -> list[Model]:
        """Every model's card, for ModelService."""
        return [model.proto() for model in self._models.values()]

    def check_health(self) -> None:
        """Serve calls this every few seconds; what it sees goes out as gauges. Raises where a device is lost."""
        for name, model in self._models.items():
            self._metrics[name].show(model.worker.stats())
            if model.worker.device_is_lost:
                raise RuntimeError(f"{name}: its device is lost; only another process can use it again")


def _loaded(load: Callable[[str, Any, str, int], M], name: str, config: ModelConfig, device: str, threads: int) -> M:
    try:
        return load(name, config, device, threads)
    except Exception as error:
        said = str(error).removeprefix(f"{config.model}: ")
        if not isinstance(error, ValueError):  # a file that was cut short, a device without room
            said = f"cannot be loaded: {type(error).__name__}: {said}"
            said += "; gpus_per_replica: 0 serves on the CPU" * (device == "cuda")
        raise ValueError(f"model {name!r} in {config.model}: {said}") from error
