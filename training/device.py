"""Where a stage runs: device, process-group backend, environment. Pure, and without torch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from training.config import ConfigError

ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DS_SKIP_CUDA_CHECK": "1",
}


@contextmanager
def tokenizing_on_all_cores() -> Iterator[None]:
    """Inside, tokenizers use every core; elsewhere one: processes that fork after they have used more may hang."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def choose_device(requested: str, gpus: int, workers: int) -> str:
    """`cuda` where there is a GPU for every worker, else `cpu`; raises ConfigError for a cuda that is not there."""
    if requested == "cpu":
        return "cpu"
    if gpus >= workers:
        return "cuda"
    if requested == "cuda":
        raise ConfigError(f"device=cuda needs a GPU for each of workers={workers}; there are {gpus}: use device=auto")
    return "cpu"


def backend(device: str) -> str:
    """torch.distributed's backend for a device."""
    return {"cpu": "gloo", "cuda": "nccl"}[device]
