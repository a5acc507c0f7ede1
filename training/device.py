"""Where a stage runs: device, process-group backend, environment. Pure, and without torch."""

from training.config import ConfigError

ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DS_SKIP_CUDA_CHECK": "1",
}


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
