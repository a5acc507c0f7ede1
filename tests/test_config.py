"""Recipes: every mistake is refused at once, naming key, value and what would have been valid."""

import pytest
import yaml

from training.config import ConfigError, PretrainConfig, SFTConfig
from training.recipe import STAGES, Recipe, load_recipe, shipped_recipes


def write(path, tree):
    path.write_text(yaml.safe_dump(tree), "utf-8")
    return str(path)


MINIMAL = {"pretrain": {"text": ["a.txt"], "tokens": 1000}}


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_valid(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.stages


def test_stages_are_the_recipe_fields_that_hold_a_stage():
    settings = {"name", "seed", "workers", "device", "val_fraction", "env"}
    assert set(STAGES) == set(Recipe.model_fields) - settings


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("pretrain.learning_rte=1", ["pretrain.learning_rte", "learning_rate"]),
        ("pretran.tokens=5", ["pretran", "pretrain"]),
        ("pretrain.tokens=many", ["pretrain.tokens", "'many'"]),
        ("pretrain.tokens=-5", ["pretrain.tokens", "-5", "greater than 0"]),
        ("pretrain.architecture=bert", ["pretrain.architecture", "'bert'", "gpt2"]),
        ("pretrain.hidden_size=30", ["hidden_size=30", "num_heads=4"]),
        ("ppo={prompts: [a], total_episodes: 1, gradient_checkpointing: true}", ["ppo", "lower micro_batch_size"]),
        ("pretrain.zero_stage=4", ["pretrain.zero_stage", "4", "3"]),
        ("seed=one", ["seed", "'one'"]),
        ("pretrain", ["stage.field=value"]),
        ("seed.x=1", ["seed is a value"]),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path, override, words):
    with pytest.raises(ConfigError) as error:
        load_recipe(write(tmp_path / "r.yaml", {**MINIMAL, "seed": 1}), [override])
    for word in words:
        assert word in str(error.value)


def test_a_missing_key_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"pretrain\.tokens: is required"):
        load_recipe(write(tmp_path / "r.yaml", {"pretrain": {"text": ["a"]}}))


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'tiny'"):
        load_recipe("tinny")


def test_a_recipe_is_a_variation_of_its_base(tmp_path):
    write(tmp_path / "base.yaml", {**MINIMAL, "seed": 7})
    recipe = load_recipe(write(tmp_path / "big.yaml", {"base": "base.yaml", "pretrain": {"tokens": 9}}))
    assert (recipe.name, recipe.seed, recipe.pretrain.tokens, recipe.pretrain.text) == ("big", 7, 9, ["a.txt"])


def test_a_recipe_that_is_its_own_base_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="its own base"):
        load_recipe(write(tmp_path / "loop.yaml", {"base": "loop.yaml"}))


def test_scientific_notation_is_a_number(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("pretrain: {text: [a], tokens: 10, learning_rate: 1e-4}\n")
    assert load_recipe(str(path), ["pretrain.weight_decay=1e-2"]).pretrain.learning_rate == 1e-4


def test_overrides_reach_their_field(tmp_path):
    recipe = load_recipe(write(tmp_path / "r.yaml", MINIMAL), ["pretrain.tokens=99", "sft.chats=[b.jsonl]"])
    assert recipe.pretrain.tokens == 99
    assert recipe.sft.chats == ["b.jsonl"]


def test_batch_arithmetic_names_its_three_dials():
    config = SFTConfig(chats=["a"], batch_size=32, micro_batch_size=8)
    assert config.gradient_accumulation_steps(workers=2) == 2
    with pytest.raises(ConfigError, match=r"batch_size=32 .* workers × micro_batch_size = 3 × 8 = 24"):
        config.gradient_accumulation_steps(workers=3)


def test_steps_follow_from_tokens():
    config = PretrainConfig(text=["a"], tokens=100_000, batch_size=8, seq_len=128)
    assert (config.batch_tokens, config.steps) == (1024, 97)
