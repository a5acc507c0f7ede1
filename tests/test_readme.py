"""The README is true: its paths exist, its commands parse, its file samples are read, its Python is the client's."""

import ast
import json
import re
from pathlib import Path

import pytest
import typer
import yaml

from services.config import ServerConfig
from training.data.captions import read_captioned
from training.data.chats import read_chats
from training.data.pairs import read_pairs
from training.data.prompts import read_prompts
from training.data.rankings import read_rankings
from training.data.text import read_documents
from training.recipe import load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
READERS = {
    "text": read_documents,
    "chats": read_chats,
    "rankings": read_rankings,
    "prompts": read_prompts,
    "pairs": lambda sources: read_pairs(sources, "de", "en"),
    "pictures": read_captioned,
}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    lines = "\n".join(blocks("console")).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].split() for line in lines if line.startswith("chatforge ")]


def test_every_path_in_the_tree_exists():
    (tree,) = blocks("text")
    folder, missing = "", []
    for line in tree.splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split()
        if not line.startswith(" "):
            folder = names[0]
        paths = [folder] if not line.startswith(" ") else [folder.split("v1")[0] + name for name in names]
        missing += [path for path in paths if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_parses(command):
    from services.cli import app

    root = typer.main.get_command(app)
    with root.make_context("chatforge", list(command[1:]), resilient_parsing=False) as context:
        name, sub, rest = root.resolve_command(context, [*context._protected_args, *context.args])
        sub.make_context(name, rest, parent=context)


def test_there_are_commands_to_check():
    assert len(commands()) >= 8


def test_every_make_target_exists():
    targets = set(re.findall(r"make (\w+)", README))
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def samples():
    rows = re.findall(r"^\| (text|chats|rankings|prompts|pairs|pictures)\b.*?\| `(\{.*\})` \|$", README, re.MULTILINE)
    return dict(rows)


@pytest.mark.parametrize("kind", READERS)
def test_every_file_sample_is_read(kind, tmp_path):
    line = samples()[kind]
    json.loads(line)
    path = tmp_path / f"{kind}.jsonl"
    path.write_text(line + "\n", "utf-8")
    assert list(READERS[kind]([str(path)]))


def test_the_recipe_samples_are_valid(tmp_path):
    recipes = []
    for number, sample in enumerate(block for block in blocks("yaml") if "# server.yaml" not in block):
        path = tmp_path / f"{number}.yaml"
        path.write_text(sample, "utf-8")
        recipes.append(load_recipe(str(path)))
    assert recipes[0].rank.judge == "person" and recipes[2].translation.pairs == ["corpus/*.tsv"]
    assert list(recipes[1].stages) == ["sft"]


def test_the_server_sample_is_valid():
    (sample,) = (block for block in blocks("yaml") if "# server.yaml" in block)
    config = ServerConfig.model_validate(yaml.safe_load(sample))
    assert config.translation["de-en"].backend == "ct2" and config.chat["mine"].max_num_seqs == 32


def test_the_python_sample_calls_what_the_client_has():
    from services.client import Client

    (sample,) = blocks("python")
    called = [n.func for n in ast.walk(ast.parse(sample)) if isinstance(n, ast.Call)]
    calls = {f.attr for f in called if isinstance(f, ast.Attribute) and getattr(f.value, "id", "") == "client"}
    assert "generate_image" in calls and all(hasattr(Client, name) for name in calls)


def test_every_linked_file_exists():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
