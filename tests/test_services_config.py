"""A server's config: strict, and every mistake named with its key, its value and the fix."""

import json
from pathlib import Path
from typing import Any

import pytest

from services.config import ServerConfigError, find_model, load_config, parse_chat_option


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model in models/mine and the runs `whole` (sft, ppo), `half` (sft) and `empty`."""
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "models/mine")
    for run, stages in (("whole", ("sft", "ppo")), ("half", ("sft",)), ("empty", ())):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "run.json").write_text("{}", "utf-8")
        for stage in stages:
            model(tmp_path / "runs" / run / stage / "model")
    return tmp_path


def model(folder: Path, **card: Any) -> Path:
    """As much of a model folder as is looked at before anything is loaded."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}), "utf-8")
    if card:
        (folder / "chatforge.json").write_text(json.dumps(card), "utf-8")
    return folder


@pytest.mark.parametrize(
    ("option", "name", "found"),
    [
        ("models/mine", "mine", "models/mine"),
        ("friend=models/mine", "friend", "models/mine"),
        ("whole", "whole", "runs/whole/ppo/model"),
        ("half", "half", "runs/half/sft/model"),
        ("runs/half", "half", "runs/half/sft/model"),
        ("chat=whole", "chat", "runs/whole/ppo/model"),
        ("runs/whole/sft/model", "whole", "runs/whole/sft/model"),
    ],
)
def test_a_chat_option_is_a_folder_or_a_run_with_or_without_a_name(
    folder: Path, option: str, name: str, found: str
) -> None:
    parsed, model = parse_chat_option(option)
    assert (parsed, find_model(model)) == (name, Path(found))


def test_a_file_and_options_are_put_together(folder: Path) -> None:
    file = folder / "server.yaml"
    file.write_text("port: 9100\nchat:\n  a: {model: whole, dtype: bf16, max_messages: 3}\n", "utf-8")
    config = load_config(file, chat={"b": {"model": "models/mine"}}, port=9200)
    assert config.port == 9200 and list(config.chat) == ["a", "b"]
    assert (config.chat["a"].dtype, config.chat["a"].max_messages, config.chat["b"].dtype) == ("bf16", 3, "auto")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "chat: no model to serve; give --chat MODEL or a config file"),
    "unknown key": (
        {"chat": {"a": {"model": "half", "dtyp": "bf16"}}},
        r"chat\.a\.dtyp: no such key; valid: model",
    ),
    "unknown top key": ({"prot": 1, "chat": {"a": {"model": "half"}}}, "prot: no such key; valid: chat, port"),
    "wrong value": ({"chat": {"a": {"model": "half", "dtype": "fp16"}}}, r"chat\.a\.dtype='fp16': .*'bf16'"),
    "wrong type": ({"port": "9000", "chat": {"a": {"model": "half"}}}, "port='9000': .*valid integer"),
    "no model": ({"chat": {"a": {}}}, r"chat\.a\.model: is required"),
    "bad name": ({"chat": {"a b": {"model": "half"}}}, "model name 'a b' must be letters"),
    "no such model": (
        {"chat": {"a": {"model": "nowhere"}}},
        "'nowhere' not found: give a folder with",
    ),
    "no chat model yet": ({"chat": {"a": {"model": "empty"}}}, "run 'empty' has no chat model yet"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_named(folder: Path, case: str) -> None:
    tree, said = WRONG[case]
    with pytest.raises(ServerConfigError, match=said):
        load_config(None, **tree)


def test_folders_that_hold_no_chat_model_are_refused_before_anything_starts(folder: Path) -> None:
    model(folder / "reward", kind="reward")
    with pytest.raises(ServerConfigError, match="reward: holds a reward model; chat needs a causal-lm"):
        load_config(None, chat={"a": {"model": "reward"}})
    (model(folder / "plain") / "tokenizer_config.json").write_text("{}", "utf-8")
    with pytest.raises(ServerConfigError, match="plain: its tokenizer has no chat template"):
        load_config(None, chat={"a": {"model": "plain"}})
    (model(folder / "bare") / "tokenizer_config.json").unlink()
    with pytest.raises(ServerConfigError, match=r"bare: has no tokenizer_config\.json"):
        load_config(None, chat={"a": {"model": "bare"}})


@pytest.mark.parametrize(
    ("text", "said"), [("- a\n", "is a mapping, not list"), ("a: [", "not valid YAML"), (None, "No such file")]
)
def test_a_file_that_is_no_config(folder: Path, text: str | None, said: str) -> None:
    if text is not None:
        (folder / "x.yaml").write_text(text, "utf-8")
    with pytest.raises(ServerConfigError, match=said):
        load_config(folder / "x.yaml")
