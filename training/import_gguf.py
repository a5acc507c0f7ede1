"""A GGUF file as a model folder: what others pretrained, for serving or as a start for SFT.

The weights are unpacked to bfloat16: a model that is served or trained on here computes with dense matrices. The
tokenizer, its chat template and its special tokens come from the file's own metadata.

Leaves out: keeping the quantised blocks; files in several parts; architectures that transformers cannot read.
"""

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.run import folder_atomic
from training.store import sha256
from training.tokenizer import CHATML, CHATML_MARKED

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Where generation stops, beside the file's own eos: a chat model's turn may end in one, its document in another.
END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>", "</s>")


def import_gguf(file: Path, out: Path) -> None:
    """Write `out` as a causal-lm model folder; whole or not at all.

    Raises ValueError where `file` is no GGUF file that transformers reads, and where `out` holds something else.
    """
    _check(file, out)
    try:
        tokenizer = _tokenizer(file)
        model = _model(file, tokenizer)
    except (ImportError, ValueError, RuntimeError, struct.error) as error:
        raise ValueError(f"{file}: cannot be read as a causal language model (is it whole?): {error}") from error
    with folder_atomic(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        card = {"kind": "causal-lm", "source": file.name, "sha256": sha256(file), **_about(file)}
        (folder / "chatforge.json").write_text(json.dumps(card, indent=2) + "\n", "utf-8")


def _check(file: Path, out: Path) -> None:
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError(f"{file}: not a GGUF file")
    if out.exists() and not (out / "config.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: is there already and is no model folder; name a new one")


def _tokenizer(file: Path) -> "PreTrainedTokenizerFast":
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    if tokenizer.chat_template:
        tokenizer.chat_template = tokenizer.chat_template.replace(CHATML, CHATML_MARKED)
    return tokenizer


def _model(file: Path, tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedModel":
    """The dense model. transformers does not save one that came from GGUF, hence the weights move to a fresh one."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

    unpacked = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    config = unpacked.config
    vars(config).pop("quantization_config", None)  # the weights are dense now
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(unpacked.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=_end_ids(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def _end_ids(tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    vocabulary = tokenizer.get_vocab()
    known = [vocabulary[token] for token in END_TOKENS if token in vocabulary]
    return list(dict.fromkeys([tokenizer.eos_token_id, *known]))


def _about(file: Path) -> dict[str, Any]:
    """What the file says of its maker."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    keys = ("name", "organization", "license")
    return {key: fields[f"general.{key}"].contents() for key in keys if f"general.{key}" in fields}
