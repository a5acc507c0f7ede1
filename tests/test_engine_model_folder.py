"""What a model folder says of itself, and what is refused before it can do harm."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TinyWorld

from serving.folder import kind_of, read_json
from serving.model_folder import describe, load_causal_lm, load_translation


@pytest.fixture
def folder(tiny_world: TinyWorld, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_world.llama, tmp_path / "model"))


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_folder_is_described_without_loading_it(folder: Path) -> None:
    info = describe(folder)
    assert (info.kind, info.context_length, info.manifest["run"]) == ("causal-lm", 256, "tiny")
    (folder / "chatforge.json").unlink()
    assert describe(folder).kind == "causal-lm"


def test_the_revision_follows_the_contents(folder: Path, tiny_world: TinyWorld) -> None:
    assert describe(folder).revision == describe(tiny_world.llama).revision
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert describe(folder).revision != describe(tiny_world.llama).revision


def test_dtype_is_the_folders_own_unless_asked_for(folder: Path) -> None:
    assert load_causal_lm(folder)[0].dtype == torch.float32
    model, _ = load_causal_lm(folder, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such model folder"):
        load_causal_lm(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="neither a model folder nor a hub name"):
        load_causal_lm(tmp_path)


def test_pickled_weights_are_refused_unless_trusted(folder: Path) -> None:
    model, _ = load_causal_lm(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled weights \(pytorch_model.bin\).*allow_unsafe"):
        load_causal_lm(folder)
    trusted, _ = load_causal_lm(folder, allow_unsafe=True)
    assert torch.equal(trusted.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_refused(folder: Path, file: str) -> None:
    edit(folder / file, auto_map={"AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match=f"{file} asks for remote code.*allow_unsafe"):
        load_causal_lm(folder)


def test_another_kind_is_refused(folder: Path) -> None:
    edit(folder / "chatforge.json", kind="reward")
    assert describe(folder).kind == "reward"
    with pytest.raises(ValueError, match="holds a reward model"):
        load_causal_lm(folder)
    edit(folder / "chatforge.json", kind="poem")
    with pytest.raises(ValueError, match="kind='poem'"):
        describe(folder)


def test_a_folder_made_elsewhere_is_of_the_kind_that_its_config_tells(
    folder: Path, tiny_world: TinyWorld, tmp_path: Path
) -> None:
    """transformers would draw the head that is missing at random, and answer with noise."""
    (folder / "chatforge.json").unlink()
    edit(folder / "config.json", architectures=["LlamaForSequenceClassification"])
    assert kind_of(folder) == describe(folder).kind == "reward"
    with pytest.raises(ValueError, match="holds a reward model; a causal-lm is needed here"):
        load_causal_lm(folder)
    opus = Path(shutil.copytree(tiny_world.translation, tmp_path / "opus"))
    (opus / "chatforge.json").unlink()
    assert kind_of(opus) == describe(opus).kind == "translation"
    with pytest.raises(ValueError, match="holds a translation model; a causal-lm is needed here"):
        load_causal_lm(opus)
    edit(folder / "config.json", architectures=["LlamaForCausalLM"])
    with pytest.raises(ValueError, match="holds a causal-lm model; a translation is needed here"):
        load_translation(folder)


@pytest.mark.parametrize("text", ["[1", "[1]", '["ab"]', "5"])
def test_a_file_that_holds_no_object_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=r"config\.json: not a JSON object"):
        read_json(tmp_path / "config.json")
