"""Recipes: a whole run as YAML, read into one strict class.

`base: NAME` makes a recipe a variation of another; `--set stage.field=value` changes single fields. Every mistake is a
`ConfigError` that names the key, the value and what would have been valid, before anything expensive starts.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from training.config import (
    ConfigError,
    EvaluateConfig,
    ImageConfig,
    ImageVaeConfig,
    PPOConfig,
    PretrainConfig,
    RankConfig,
    RewardConfig,
    SFTConfig,
    StageConfig,
    TokenizerConfig,
    TranslationConfig,
)

RECIPES = Path(__file__).parent / "recipes"

# What each stage reads of the stages before it, where its config does not name another model.
PARENTS: dict[str, dict[str, str | None]] = {
    "tokenizer": {},
    "pretrain": {"tokenizer": None},
    "sft": {"pretrain": "model"},
    "rank": {"sft": "model"},
    "reward": {"sft": "model", "rank": "rankings"},
    "ppo": {"sft": "model", "reward": "reward_model"},
    "translation": {},
    "image_vae": {},
    "image": {"image_vae": "vae"},
    "evaluate": dict.fromkeys(("pretrain", "sft", "reward", "ppo", "translation", "image"), None),
}
# Fields that name a model, and those that name data, of any stage.
MODELS = ("model", "reward_model", "vae", "text_encoder")
SOURCES = ("text", "chats", "prompts", "rankings", "pairs", "images")


class Recipe(StageConfig):
    """A whole run: its stages in order, and where they run."""

    name: str
    seed: int = 1
    workers: int | str = 1  # 2..8: as many as there is room for
    device: Literal["auto", "cpu", "cuda"] = "auto"
    val_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05  # held out of every stage: documents, chats, prompts
    # Environment variables that `submit` forwards to the job; their values are written nowhere.
    env: list[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]] = Field(default_factory=list)
    tokenizer: TokenizerConfig | None = None
    pretrain: PretrainConfig | None = None
    sft: SFTConfig | None = None
    rank: RankConfig | None = None
    reward: RewardConfig | None = None
    ppo: PPOConfig | None = None
    translation: TranslationConfig | None = None
    image_vae: ImageVaeConfig | None = None
    image: ImageConfig | None = None
    evaluate: EvaluateConfig | None = None

    @property
    def stages(self) -> dict[str, StageConfig]:
        """The stages this recipe has, in the order they run."""
        fields = ((name, getattr(self, name)) for name in STAGES)
        return {name: config for name, config in fields if config is not None}

    @property
    def worker_range(self) -> range:
        """The least to the most workers of a training stage; one number where `workers` is one."""
        least, _, most = str(self.workers).partition("..")
        return range(int(least), int(most or least) + 1)

    @model_validator(mode="after")
    def _averages_are_whole(self) -> Self:
        for name, config in (("image_vae", self.image_vae), ("image", self.image)):
            if config and config.zero_stage == 3 and len(self.worker_range) > 1:
                raise ValueError(
                    f"{name}.zero_stage=3 with workers={self.workers}: averaged weights would be in as many parts as "
                    "there are workers; take zero_stage 2, or one number of workers"
                )
        return self

    @field_validator("workers", mode="before")
    @classmethod
    def _counts_workers(cls, workers: Any) -> int | str:
        found = re.fullmatch(r"([1-9]\d*)(?:\.\.([1-9]\d*))?", str(workers))
        if not found or int(found[2] or found[1]) < int(found[1]):
            raise ValueError("must be a number above 0, or the least and the most of them as in 2..8")
        return int(found[1]) if found[2] is None else found[0]


STAGES = ("tokenizer", "pretrain", "sft", "rank", "reward", "ppo", "translation", "image_vae", "image", "evaluate")


def load_recipe(recipe: str, overrides: list[str] | None = None) -> Recipe:
    """A shipped recipe's name or a YAML file, with `stage.field=value` overrides applied.

    Raises ConfigError naming the first wrong key or value.
    """
    tree = _read(recipe)
    for override in overrides or []:
        _set(tree, override)
    return _validated(tree)


def shipped_recipes() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-4` as text; people mean a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _read(recipe: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        raise ConfigError(f"recipe {recipe!r} not found: {_nearest(recipe, shipped_recipes())}, or give a .yaml file")
    if str(path) in seen:
        raise ConfigError(f"recipe {recipe!r} is its own base: {' -> '.join((*seen, str(path)))}")
    try:
        tree = yaml.load(path.read_text("utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of stages, not {type(tree).__name__}")
    base = tree.pop("base", None)
    tree.setdefault("name", path.stem)
    if base is None:
        return tree
    sibling = path.parent / str(base)
    return _merged(_read(str(sibling) if sibling.is_file() else str(base), (*seen, str(path))), tree)


def _merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in change.items():
        both_maps = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merged(out[key], value) if both_maps else value
    return out


def _set(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r}: write it as stage.field=value")
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {key}: {parent} is a value, not a section")
        node = child
    try:
        node[leaf] = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ConfigError(f"--set {key}: {text!r} is not a YAML value") from None


def _validated(tree: dict[str, Any]) -> Recipe:
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explained(dict(e)) for e in error.errors())) from None


def _explained(error: dict[str, Any]) -> str:
    """One line for one pydantic error: key, value, and what is valid there."""
    where = [str(part) for part in error["loc"]]
    key = ".".join(where)
    if error["type"] == "extra_forbidden":
        return f"{key}: no such key; {_nearest(where[-1], _fields_at(where[:-1]))}"
    if error["type"] == "missing":
        return f"{key}: is required and has no default"
    message = error["msg"].removeprefix("Value error, ")
    if not where or isinstance(error["input"], dict):
        return f"{key}: {message}" if where else message
    return f"{key}={error['input']!r}: {message}"


def _fields_at(where: list[str]) -> list[str]:
    fields = Recipe.model_fields
    for part in where:
        annotation = fields[part].annotation
        options = getattr(annotation, "__args__", (annotation,))
        fields = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel)).model_fields
    return list(fields)


def _nearest(word: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(valid)}"
