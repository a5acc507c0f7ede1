"""Opening the model that a recipe names: one that cannot be had is a mistake, told with its field, and no crash."""

from typing import Any

from transformers import AutoConfig

from training.run import StageError


def pretrained(auto: Any, field: str, model: str, **options: Any) -> Any:
    """`auto.from_pretrained(model)`; raises StageError with the field that names the model where there is none.

    What a disk or a connection does passes through: it may pass, and a worker that dies of it is started again.
    """
    try:
        return auto.from_pretrained(model, **options)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and (error.errno is not None or _is_away(error.__cause__)):
            raise
        why = " ".join(str(error).split())
        raise StageError(f"{field}={model}: {why}; correct the name, or give a model folder") from error


def _is_away(cause: BaseException | None) -> bool:
    """Whether it was the hub that could not be reached, and not a name that it does not have."""
    return cause is not None and any(
        "Connect" in kind.__name__ or "Timeout" in kind.__name__ for kind in type(cause).mro()
    )


def length_limit(max_length: int, field: str, model: str) -> int:
    """`max_length`, or what the model was made for where that is less: tokens. Raises StageError as `pretrained`."""
    config = pretrained(AutoConfig, field, model)
    return min(max_length, getattr(config, "max_position_embeddings", None) or max_length)
