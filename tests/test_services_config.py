"""A server's config: strict, and every mistake named with its key, its value and the fix."""

import json
from pathlib import Path
from typing import Any

import pytest

from services.config import load_config
from services.folders import find_model, parse_model_option
from services.strict import ServerConfigError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with models/mine and models/sd, and the runs `whole` (sft, ppo), `half`, `words`, ..."""
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "models/mine")
    pipeline(tmp_path / "models/sd")
    runs = {
        "whole": ("sft", "ppo"), "half": ("sft",), "words": ("translation",), "pictures": ("image",), "empty": (),
    }  # fmt: skip
    for run, stages in runs.items():
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "run.json").write_text("{}", "utf-8")
        for stage in stages:
            card = {"kind": "translation"} if stage == "translation" else {}
            made = tmp_path / "runs" / run / stage / "model"
            pipeline(made, kind="text-to-image") if stage == "image" else model(made, **card)
    return tmp_path


def model(folder: Path, **card: Any) -> Path:
    """As much of a model folder as is looked at before anything is loaded."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}), "utf-8")
    if card:
        (folder / "chatforge.json").write_text(json.dumps(card), "utf-8")
    return folder


def pipeline(folder: Path, **card: Any) -> Path:
    """The same of a diffusers pipeline folder."""
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}', "utf-8")
    if card:
        (folder / "chatforge.json").write_text(json.dumps(card), "utf-8")
    return folder


@pytest.mark.parametrize(
    ("service", "option", "name", "found"),
    [
        ("chat", "models/mine", "mine", "models/mine"),
        ("chat", "friend=models/mine", "friend", "models/mine"),
        ("chat", "whole", "whole", "runs/whole/ppo/model"),
        ("chat", "half", "half", "runs/half/sft/model"),
        ("chat", "runs/half", "half", "runs/half/sft/model"),
        ("chat", "chat=whole", "chat", "runs/whole/ppo/model"),
        ("chat", "runs/whole/sft/model", "whole", "runs/whole/sft/model"),
        ("translation", "words", "words", "runs/words/translation/model"),
        ("translation", "de-en=words", "de-en", "runs/words/translation/model"),
        ("translation", "models/mine", "mine", "models/mine"),
        ("image", "models/sd", "sd", "models/sd"),
        ("image", "pictures", "pictures", "runs/pictures/image/model"),
        ("image", "painter=pictures", "painter", "runs/pictures/image/model"),
    ],
)
def test_a_model_option_is_a_folder_or_a_run_with_or_without_a_name(
    folder: Path, service: str, option: str, name: str, found: str
) -> None:
    parsed, model = parse_model_option(option, service)
    assert (parsed, find_model(model, service=service)) == (name, Path(found))


def test_a_file_and_options_are_put_together(folder: Path) -> None:
    file = folder / "server.yaml"
    file.write_text("port: 9100\nchat:\n  a: {model: whole, dtype: bf16, max_messages: 3}\n", "utf-8")
    config = load_config(file, chat={"b": {"model": "models/mine"}}, port=9200)
    assert config.port == 9200 and list(config.chat) == ["a", "b"]
    assert (config.chat["a"].dtype, config.chat["a"].max_messages, config.chat["b"].dtype) == ("bf16", 3, "auto")
    assert config.services == {"chat": ["a", "b"]}


def test_a_server_may_translate_too_or_alone(folder: Path) -> None:
    file = folder / "server.yaml"
    file.write_text("translation:\n  b: {model: words, source_language: de, backend: ct2}\n", "utf-8")
    alone = load_config(file)
    assert alone.services == {"translation": ["b"]}
    assert (alone.translation["b"].backend, alone.translation["b"].source_language) == ("ct2", "de")
    both = load_config(file, chat={"c": {"model": "half"}}, translation={"a": {"model": "words"}})
    assert both.services == {"chat": ["c"], "translation": ["a", "b"]}


def test_a_server_may_draw_too_or_alone(folder: Path) -> None:
    alone = load_config(None, image={"b": {"model": "models/sd", "max_images": 3}})
    assert alone.services == {"image": ["b"]} and alone.image["b"].max_images == 3
    every = {"chat": {"c": {"model": "half"}}, "translation": {"a": {"model": "words"}}}
    assert load_config(None, **every, image={"p": {"model": "pictures"}}).services == {
        "chat": ["c"],
        "translation": ["a"],
        "image": ["p"],
    }


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "^no model to serve; give --chat, --translation or --image MODEL, or a config file$"),
    "unknown key": (
        {"chat": {"a": {"model": "half", "dtyp": "bf16"}}},
        r"chat\.a\.dtyp: no such key; valid: model",
    ),
    "unknown translation key": (
        {"translation": {"a": {"model": "words", "max_beams": 2}}},
        r"translation\.a\.max_beams: no such key; valid: model, dtype, allow_unsafe, source_language",
    ),
    "unknown top key": ({"prot": 1, "chat": {"a": {"model": "half"}}}, "prot: no such key; valid: chat, translation"),
    "wrong value": ({"chat": {"a": {"model": "half", "dtype": "fp16"}}}, r"chat\.a\.dtype='fp16': .*'bf16'"),
    "wrong type": ({"port": "9000", "chat": {"a": {"model": "half"}}}, "port='9000': .*valid integer"),
    "wrong language": (
        {"translation": {"a": {"model": "words", "source_language": "de_DE"}}},
        r"translation\.a\.source_language='de_DE': String should match",
    ),
    "too many beams": (
        {"translation": {"a": {"model": "words", "max_num_beams": 33}}},
        r"translation\.a\.max_num_beams=33: .*less than or equal to 32",
    ),
    "one name twice": (
        {"chat": {"a": {"model": "half"}}, "translation": {"a": {"model": "words"}}},
        "translation: model name 'a' is a chat model's; give it another: --translation NAME=words",
    ),
    "bad translation name": (
        {"translation": {"-": {"model": "words"}}},
        "translation: model name '-' must be letters",
    ),
    "unknown image key": (
        {"image": {"a": {"model": "pictures", "max_steps": 2}}},
        r"image\.a\.max_steps: no such key; valid: model, dtype",
    ),
    "more pixels than a message holds": (
        {"image": {"a": {"model": "pictures", "max_pixels": 1_048_577}}},
        r"image\.a\.max_pixels=1048577: .*less than or equal to 1048576",
    ),
    "one name for a translator and a painter": (
        {"translation": {"a": {"model": "words"}}, "image": {"a": {"model": "pictures"}}},
        "image: model name 'a' is a translation model's; give it another: --image NAME=pictures",
    ),
    "no such image model": (
        {"image": {"a": {"model": "nowhere"}}},
        r"'nowhere' not found: give a folder with a model_index\.json",
    ),
    "no image model yet": (
        {"image": {"a": {"model": "half"}}},
        "run 'half' has no image model yet: it needs its image stage",
    ),
    "fewer replicas at the most": (
        {"chat": {"a": {"model": "half"}}, "scale": {"chat": {"replicas": 2, "max_replicas": 1}}},
        r"^scale\.chat: max_replicas=1: is below replicas=2; raise or drop it$",
    ),
    "no place to wait": (
        {"chat": {"a": {"model": "half", "max_waiting": 0}}},
        r"chat\.a\.max_waiting=0: .*greater than 0",
    ),
    "a context without room for an answer": (
        {"chat": {"a": {"model": "half", "context_tokens": 1}}},
        r"chat\.a\.context_tokens=1: .*greater than or equal to 2",
    ),
    "no model": ({"chat": {"a": {}}}, r"chat\.a\.model: is required"),
    "bad name": ({"chat": {"a b": {"model": "half"}}}, "model name 'a b' must be letters"),
    "no such model": (
        {"chat": {"a": {"model": "nowhere"}}},
        "'nowhere' not found: give a folder with",
    ),
    "no chat model yet": ({"chat": {"a": {"model": "words"}}}, "run 'words' has no chat model yet: it needs its sft"),
    "no translation model yet": (
        {"translation": {"a": {"model": "half"}}},
        "run 'half' has no translation model yet: it needs its translation stage",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_named(folder: Path, case: str) -> None:
    tree, said = WRONG[case]
    with pytest.raises(ServerConfigError, match=said):
        load_config(None, **tree)


def test_folders_that_hold_no_chat_model_are_refused_before_anything_starts(folder: Path) -> None:
    model(folder / "reward", kind="reward")
    with pytest.raises(ServerConfigError, match="reward: holds a reward model; chat needs a causal-lm model"):
        load_config(None, chat={"a": {"model": "reward"}})
    (model(folder / "foreign") / "config.json").write_text('{"architectures": ["XForSequenceClassification"]}', "utf-8")
    with pytest.raises(ServerConfigError, match="foreign: holds a reward model; chat needs a causal-lm model"):
        load_config(None, chat={"a": {"model": "foreign"}})
    (model(folder / "plain") / "tokenizer_config.json").write_text("{}", "utf-8")
    with pytest.raises(ServerConfigError, match="plain: its tokenizer has no chat template"):
        load_config(None, chat={"a": {"model": "plain"}})
    (model(folder / "bare") / "tokenizer_config.json").unlink()
    with pytest.raises(ServerConfigError, match=r"bare: has no tokenizer_config\.json"):
        load_config(None, chat={"a": {"model": "bare"}})


def test_folders_of_another_kind_are_refused_for_translation(folder: Path) -> None:
    with pytest.raises(ServerConfigError, match="mine: holds a causal-lm model; translation needs a translation model"):
        load_config(None, translation={"a": {"model": "models/mine"}})
    made_elsewhere = model(folder / "opus")
    (made_elsewhere / "config.json").write_text('{"is_encoder_decoder": true}', "utf-8")
    assert load_config(None, translation={"a": {"model": "opus"}}).translation["a"].folder == Path("opus")
    with pytest.raises(ServerConfigError, match="opus: holds a translation model; chat needs a causal-lm model"):
        load_config(None, chat={"a": {"model": "opus"}})
    (made_elsewhere / "tokenizer_config.json").unlink()
    with pytest.raises(ServerConfigError, match=r"opus: has no tokenizer_config\.json"):
        load_config(None, translation={"a": {"model": "opus"}})
    (made_elsewhere / "chatforge.json").write_text("[1", "utf-8")
    with pytest.raises(ServerConfigError, match=r"chatforge\.json: not a JSON object"):
        load_config(None, translation={"a": {"model": "opus"}})


def test_folders_of_another_kind_are_refused_for_images(folder: Path) -> None:
    with pytest.raises(ServerConfigError, match="mine: holds a causal-lm model; image needs a text-to-image model"):
        load_config(None, image={"a": {"model": "models/mine"}})
    with pytest.raises(ServerConfigError, match="sd: holds a text-to-image model; chat needs a causal-lm model"):
        load_config(None, chat={"a": {"model": "models/sd"}})
    with pytest.raises(ServerConfigError, match="sd: holds a text-to-image model; translation needs a translation"):
        load_config(None, translation={"a": {"model": "models/sd"}})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n", "x.yaml: a server's config is a mapping, not list"),
        ("# nothing yet\n", "x.yaml: is empty; name a model in it, as in `chat: {mine: {model: FOLDER}}`"),
        ("a: [", "not valid YAML"),
        ("chat: [half]", r"chat=\['half'\]: Input should be a valid dictionary"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_config(folder: Path, text: str | None, said: str) -> None:
    if text is not None:
        (folder / "x.yaml").write_text(text, "utf-8")
    with pytest.raises(ServerConfigError, match=said):
        load_config(folder / "x.yaml")


def test_a_file_that_is_not_utf8_is_named(folder: Path) -> None:
    (folder / "x.yaml").write_bytes("# für\n".encode("latin-1"))
    with pytest.raises(ServerConfigError, match=r"x\.yaml: not UTF-8 at byte 4$"):
        load_config(folder / "x.yaml")
