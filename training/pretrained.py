"""Opening the model that a recipe names: one that cannot be had is a mistake, told with its field, and no crash."""

from typing import Any

from transformers import AutoConfig

from training.run import StageError


def pretrained(auto: Any, field: str, model: str, **options: Any) -> Any:
    """`auto.from_pretrained(model)`; raises StageError with the field that names the model where that fails."""
    try:
        return auto.from_pretrained(model, **options)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise StageError(f"{field}={model}: {why}; correct the name, or give a model folder") from error


def length_limit(max_length: int, field: str, model: str) -> int:
    """`max_length`, or what the model was made for where that is less: tokens. Raises StageError as `pretrained`."""
    config = pretrained(AutoConfig, field, model)
    return min(max_length, getattr(config, "max_position_embeddings", None) or max_length)
