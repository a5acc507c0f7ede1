"""What a model folder says of itself in its JSON files, without torch: what a server's config is checked by."""

import json
from pathlib import Path
from typing import Any

Json = dict[str, Any]

KINDS = ("causal-lm", "reward", "translation", "text-to-image")


def kind_of(folder: Path) -> str:
    """One of KINDS: as chatforge.json has it or, in a folder made elsewhere, as the model's own config does.

    Raises ValueError where chatforge.json names none of them.
    """
    kind = read_json(folder / "chatforge.json").get("kind")
    if kind is None:
        is_pipeline = (folder / "model_index.json").is_file()
        kind = "text-to-image" if is_pipeline else kind_by_config(read_json(folder / "config.json"))
    if kind not in KINDS:
        raise ValueError(f"{folder}: kind={kind!r} is none of {', '.join(KINDS)}")
    return str(kind)


def kind_by_config(config: Json) -> str:
    """The kind that transformers' config.json tells: by it, a head that the folder lacks would be drawn at random."""
    if any("SequenceClassification" in name for name in config.get("architectures") or ()):
        return "reward"
    return "translation" if config.get("is_encoder_decoder") else "causal-lm"


def read_json(file: Path) -> Json:
    """The file's object, empty where there is no such file. Raises ValueError where it holds none."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not a JSON object: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: not a JSON object, but a {type(found).__name__}")
    return found
