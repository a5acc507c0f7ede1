"""Which folder a server's model is in, and whether it can be in it, by what can be told without loading."""

import re
from pathlib import Path

from services.strict import ServerConfigError
from serving.folder import kind_of, read_json

STAGES = {"chat": ("ppo", "sft"), "translation": ("translation",), "image": ("image",)}  # of a run, newest first
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # of a model
_KINDS = {"chat": "causal-lm", "translation": "translation", "image": "text-to-image"}


def parse_model_option(option: str, service: str) -> tuple[str, str]:
    """(name, model) of `NAME=MODEL` or of MODEL alone, which is then called by its run or its folder."""
    name, equals, model = option.partition("=")
    if equals and NAME.fullmatch(name):
        return name, model
    path = find_model(option, service=service)
    from_run = path.name == "model" and path.parent.name in STAGES[service]
    return (path.parent.parent.name if from_run else path.resolve().name), option


def find_model(model: str, runs: Path = Path("runs"), service: str = "chat") -> Path:
    """The folder that `model` names: itself, or the newest model for `service` of the run of that name."""
    folder = Path(model)
    if _is_model(folder):
        return folder
    run = folder if (folder / "run.json").is_file() else runs / model
    for stage in STAGES[service]:
        if _is_model(run / stage / "model"):
            return run / stage / "model"
    if (run / "run.json").is_file():
        needed = STAGES[service][-1]
        raise ServerConfigError(
            f"run {model!r} has no {service} model yet: it needs its {needed} stage; `chatforge runs {model}`"
        )
    file = "model_index.json" if service == "image" else "config.json"
    raise ServerConfigError(f"model {model!r} not found: give a folder with a {file}, or a run in {runs}/")


def model_folder(model: str, service: str) -> Path:
    """The folder that `model` names. Raises ServerConfigError where no model for `service` can be in it."""
    folder = find_model(model, service=service)
    try:
        kind = kind_of(folder)
        tokenizer = read_json(folder / "tokenizer_config.json")
    except ValueError as error:
        raise ServerConfigError(str(error)) from None
    if kind != _KINDS[service]:
        raise ServerConfigError(f"{folder}: holds a {kind} model; {service} needs a {_KINDS[service]} model")
    if service != "image" and not (folder / "tokenizer_config.json").is_file():
        raise ServerConfigError(
            f"{folder}: has no tokenizer_config.json; a {service} model's folder holds its tokenizer"
        )
    if service == "chat" and "chat_template" not in tokenizer and not (folder / "chat_template.jinja").is_file():
        raise ServerConfigError(f"{folder}: its tokenizer has no chat template; serve an instruction-tuned model")
    return folder


def _is_model(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("config.json", "model_index.json"))
