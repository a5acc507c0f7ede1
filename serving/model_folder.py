"""The model folder: what joins training to serving. A Hugging Face folder or hub name, opened safely."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from serving.folder import Json, kind_by_config, kind_of, read_json

_SAMPLE_BYTES = 1 << 20  # of each end of a weights file, for the revision
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_OPT_IN = "a server loads it where its config says allow_unsafe: true for this model"


@dataclass(frozen=True)
class ModelInfo:
    """What a model folder says of itself; reading it loads no weights."""

    kind: str  # one of serving.folder's KINDS
    revision: str  # changes with the folder's contents; for a hub name the hub's commit
    context_length: int | None  # tokens; None where the kind has no such limit
    manifest: Json = field(default_factory=dict)  # chatforge.json; empty for a folder made elsewhere


def describe(path: str | Path, *, allow_unsafe: bool = False) -> ModelInfo:
    """Kind, revision and limits of a model folder or hub name.

    Raises ValueError where it is none, and where its config is code that comes with it, unless `allow_unsafe`.
    """
    folder = Path(path)
    manifest = read_json(folder / "chatforge.json")
    if (folder / "model_index.json").is_file():
        return ModelInfo(kind_of(folder), _revision(folder), None, manifest)
    config = _config(path, allow_unsafe)
    revision = _revision(folder) if folder.is_dir() else str(config._commit_hash)
    return ModelInfo(_kind(path, config), revision, context_length(config), manifest)


def load_causal_lm(
    path: str | Path, dtype: torch.dtype | None = None, *, allow_unsafe: bool = False
) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) of a folder or hub name; `dtype` None keeps the folder's own.

    Raises ValueError where the folder is none or holds another kind of model, and where loading would run code that
    comes with it (pickled weights, remote code), unless its owner trusts it: `allow_unsafe`.
    """
    return _load(path, AutoModelForCausalLM, "causal-lm", dtype, allow_unsafe)


def load_translation(
    path: str | Path, dtype: torch.dtype | None = None, *, allow_unsafe: bool = False
) -> tuple[Any, Any]:
    """(encoder-decoder in eval mode, tokenizer): as `load_causal_lm`, with the same refusals."""
    return _load(path, AutoModelForSeq2SeqLM, "translation", dtype, allow_unsafe)


def _load(path: str | Path, auto: Any, wanted: str, dtype: torch.dtype | None, allow_unsafe: bool) -> tuple[Any, Any]:
    """The model by `auto`, one of transformers' AutoModel classes, where the folder's kind is the wanted one."""
    config = _config(path, allow_unsafe)
    if (kind := _kind(path, config)) != wanted:
        raise ValueError(f"{path}: holds a {kind} model; a {wanted} is needed here")
    if wanted == "translation" and not config.is_encoder_decoder:  # whatever its card says
        raise ValueError(f"{path}: {config.model_type} is no encoder-decoder; a translation model is needed here")
    if (folder := Path(path)).is_dir() and not allow_unsafe:
        refuse_pickle(folder)
    try:
        model = auto.from_pretrained(
            path,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=None if allow_unsafe else True,
            trust_remote_code=allow_unsafe,
        )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=allow_unsafe)
    except OSError as error:
        raise ValueError(f"{path}: cannot be loaded: {error}") from error
    return model.eval(), tokenizer


def eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a completion: generation_config's, or the tokenizer's where it names none."""
    named = getattr(model.generation_config, "eos_token_id", None)
    if named is None:
        named = tokenizer.eos_token_id
    if named is None:
        return frozenset()
    return frozenset([named] if isinstance(named, int) else named)


def context_length(config: Any) -> int | None:
    """How many tokens, prompt and completion together, the model was made for; None where it names no limit."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(limit := getattr(config, name, None), int) and limit > 0:
            return limit
    return None


def _config(path: str | Path, allow_unsafe: bool) -> Any:
    folder = Path(path)
    if folder.is_absolute() and not folder.is_dir():
        raise ValueError(f"{path}: no such model folder")
    needs_code = [f for f in ("config.json", "tokenizer_config.json") if "auto_map" in read_json(folder / f)]
    if needs_code and not allow_unsafe:
        raise ValueError(
            f"{path}: {needs_code[0]} asks for remote code (auto_map), which would run with your rights; if you trust "
            f"its author, {_OPT_IN}"
        )
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=allow_unsafe)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: neither a model folder nor a hub name that can be loaded: {error}") from error


def refuse_pickle(folder: Path, weights: str = "model.safetensors") -> None:
    """Raises ValueError where a folder has no safetensors, `weights` being what they are usually called."""
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(f.name for pattern in _PICKLED for f in folder.glob(pattern))
    if pickled:
        raise ValueError(
            f"{folder}: has only pickled weights ({pickled[0]}), which can run any code when loaded; convert them to "
            f"safetensors; if you trust their author, {_OPT_IN}"
        )
    raise ValueError(f"{folder}: has no {weights}")


def _kind(path: str | Path, config: Any) -> str:
    """`config` is asked for a hub name alone."""
    folder = Path(path)
    return kind_of(folder) if folder.is_dir() else kind_by_config(config.to_dict())


def _revision(folder: Path) -> str:
    """12 hex digits over the folder's JSON files and both ends of its weights: quick for any size."""
    digest = hashlib.sha256()
    for file in sorted(f for pattern in ("*.json", "*.safetensors", *_PICKLED) for f in folder.rglob(pattern)):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)} {size}".encode())
        with file.open("rb") as f:
            digest.update(f.read(_SAMPLE_BYTES))
            f.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(f.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:12]
