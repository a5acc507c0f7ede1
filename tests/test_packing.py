"""What goes along with a job: our code and what a recipe names beside it, and nothing that merely lies around."""

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from services.packing import LIMIT, Package, PackingError, amount, code_files, pack
from training.config import ConfigError
from training.data.records import DataError
from training.inputs import local_inputs
from training.recipe import Recipe, load_recipe, shipped_recipes

ROOT = Path(__file__).parents[1]
RECIPE = ("mine.yaml", "name: mine\n")


def names(package: Package) -> set[str]:
    return set(zipfile.ZipFile(io.BytesIO(package.data)).namelist())


def tree(root: Path, *files: str) -> Path:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"of {name}\n", "utf-8")
    return root


def sparse(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to submit from."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- the code


def test_the_code_is_packed_and_little_else() -> None:
    package = pack(RECIPE, {})
    folders = {name.split("/")[0] for name in names(package)}
    assert folders == {"training", "serving", "services", "chatforge", "mine.yaml"}
    assert {"services/cli.py", "training/recipes/tiny.yaml", "chatforge/v1/chat_pb2_grpc.py"} <= names(package)
    assert not [name for name in names(package) if "__pycache__" in name or name.endswith(".pyc")]
    assert package.files == len(names(package)) and package.size < 4 << 20


def test_the_same_content_is_the_same_upload(here: Path) -> None:
    first = pack(RECIPE, {})
    assert pack(RECIPE, {}) == first and pack(("mine.yaml", "name: other\n"), {}).uri != first.uri


def test_what_was_packed_runs_without_the_rest(tmp_path: Path) -> None:
    """The command of a job, in a folder that holds the upload alone."""
    zipfile.ZipFile(io.BytesIO(pack(RECIPE, {}).data)).extractall(tmp_path)
    code = "import services.cli as cli, training.pipeline, serving, chatforge.v1.chat_pb2 as pb2\n"
    code += "print(cli.__file__, pb2.__file__)"
    told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [Path(file).parents[1] for file in told.stdout.split()] == [tmp_path, tmp_path / "chatforge"]
    command = [sys.executable, "-m", "services.cli", "train", "nowhere.yaml", "--run", "mine"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert told.returncode == 2 and told.stderr.startswith("error: recipe 'nowhere.yaml' not found")


def test_gitignore_counts_in_every_folder(tmp_path: Path) -> None:
    root = tree(
        tmp_path, "training/a.py", "training/secret.txt", "training/out/x.bin", "training/deep/b.py",
        "training/deep/c.log", "training/deep/kept.log", "training/.env", "training/__pycache__/a.pyc",
        "training/runs/r.py", "elsewhere/d.py",
    )  # fmt: skip
    (root / ".gitignore").write_text("secret.*\nruns/\n*.log\n", "utf-8")
    (root / "training" / ".gitignore").write_text("/out\n", "utf-8")
    (root / "training" / "deep" / ".gitignore").write_text("!kept.log\n", "utf-8")
    found = code_files({"training": root / "training"}, root)
    assert set(found) == {"training/a.py", "training/deep/b.py", "training/deep/kept.log"}


def test_a_gitignore_above_the_code_does_not_count(tmp_path: Path) -> None:
    """Installed packages lie in an environment that its project ignores."""
    (tmp_path / ".gitignore").write_text("*\n", "utf-8")
    site = tree(tmp_path / "site-packages", "training/a.py")
    assert set(code_files({"training": site / "training"}, site)) == {"training/a.py"}


# ---- what a recipe names


def recipe(**text: list[str]) -> Recipe:
    stages = {"tokenizer": {"text": text["tokenizer"]}} if "tokenizer" in text else {}
    sized = {"num_layers": 1, "tokens": 100_000}
    stages |= {"pretrain": {"text": text["pretrain"], **sized}} if "pretrain" in text else {}
    return Recipe.model_validate({"name": "mine", **stages})


def test_relative_files_go_along_under_their_names_and_nothing_beside_them(here: Path) -> None:
    tree(here, "data/a.txt", "data/b.txt", "data/other.jsonl", "runs/old/model.bin", "models/m/model.safetensors")
    sparse(here / "data" / "huge.tar", 10 << 30)
    inputs = local_inputs(recipe(tokenizer=["data/*.txt"], pretrain=["./data/../data/a.txt"]))
    added = names(pack(RECIPE, inputs)) - names(pack(RECIPE, {}))
    assert added == {"data/a.txt", "data/b.txt"}


def test_pictures_go_along_with_their_captions(here: Path) -> None:
    tree(here, "pictures/1.png", "pictures/2.png", "pictures/unnamed.png")
    lines = '{"file_name": "1.png", "caption": "a"}\n{"file_name": "2.png", "caption": "b"}\n'
    (here / "pictures" / "metadata.jsonl").write_text(lines, "utf-8")
    image = {"images": ["pictures"], "steps": 1, "prompts": ["a red apple"]}
    inputs = local_inputs(Recipe.model_validate({"name": "mine", "image": image, "evaluate": {}}))
    assert names(pack(RECIPE, inputs)) - names(pack(RECIPE, {})) == {
        "pictures/1.png", "pictures/2.png", "pictures/metadata.jsonl",
    }  # fmt: skip


def test_what_the_nodes_have_or_fetch_is_not_looked_at(here: Path) -> None:
    far = ["/nowhere/a.txt", "~/nowhere.txt", "s3://bucket/a.txt", "hub:owner/name", "sample:nothing"]
    assert local_inputs(recipe(tokenizer=far)) == {}
    vae = {"images": ["hub:owner/name"], "steps": 1, "vae": "pixels", "text_encoder": "openai/clip-vit-base-patch32"}
    assert local_inputs(Recipe.model_validate({"name": "mine", "image": vae})) == {}


def test_a_large_file_is_refused_and_named(here: Path) -> None:
    sparse(here / "data" / "huge.txt", 10 << 30)
    tree(here, "data/small.txt")
    inputs = local_inputs(recipe(tokenizer=["data/small.txt"], pretrain=["data/huge.txt"]))
    with pytest.raises(PackingError) as refused:
        pack(RECIPE, inputs)
    assert str(refused.value).startswith("the upload would be 10.0 GiB, over the 100.0 MiB that are sent along; the ")
    assert "largest: data/huge.txt 10.0 GiB (pretrain.text), " in str(refused.value)
    assert "by an absolute path that every node of the cluster has, or by a URI" in str(refused.value)


def test_the_limit_counts_every_file(here: Path) -> None:
    sparse(here / "a.txt", LIMIT - (4 << 20))
    assert pack(RECIPE, {"sft.chats='a.txt'": [Path("a.txt")]}).size > LIMIT - (4 << 20)
    sparse(here / "b.txt", 4 << 20)
    with pytest.raises(PackingError, match=r"largest: a.txt 96.0 MiB \(sft.chats\), b.txt 4.0 MiB \(ppo.prompts\), "):
        pack(RECIPE, {"sft.chats='a.txt'": [Path("a.txt")], "ppo.prompts='b.txt'": [Path("b.txt")]})


def test_a_path_that_leaves_the_folder_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(here, "data/a.txt", "work/b.txt")
    monkeypatch.chdir(here / "work")
    with pytest.raises(
        PackingError, match=r"tokenizer.text='../data/a.txt': only what lies in the folder that you sub"
    ):
        pack(RECIPE, local_inputs(recipe(tokenizer=["../data/a.txt"])))


def test_data_never_takes_the_place_of_code(here: Path) -> None:
    tree(here, "training/config.py")
    with pytest.raises(PackingError, match=r"training/config.py: the code has a file of that name"):
        pack(RECIPE, {"tokenizer.text": [Path("training/config.py")]})


def test_a_model_folder_is_refused(here: Path) -> None:
    tree(here, "models/m/config.json")
    text = {"images": ["hub:owner/name"], "steps": 1}
    for name, said in (("models/m", "a model folder is not sent along"), ("./nowhere", "a model folder is not sent")):
        with pytest.raises(ConfigError, match=f"image.text_encoder='{name}': {said}"):
            local_inputs(Recipe.model_validate({"name": "mine", "image": {**text, "text_encoder": name}}))


def test_a_file_that_is_not_there_is_refused(here: Path) -> None:
    with pytest.raises(DataError, match=r"data/\*.txt: matches no file"):
        local_inputs(recipe(tokenizer=["data/*.txt"]))


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_survives_the_journey(name: str, tmp_path: Path) -> None:
    from services.cli_jobs import resolved

    shipped = load_recipe(name, ["name=elsewhere"])
    (tmp_path / "elsewhere.yaml").write_text(resolved(shipped), "utf-8")
    assert load_recipe(str(tmp_path / "elsewhere.yaml")) == shipped
    assert "base" not in yaml.safe_load(resolved(shipped))


@pytest.mark.parametrize(("size", "said"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (10 << 30, "10.0 GiB")])
def test_amounts_are_readable(size: int, said: str) -> None:
    assert amount(size) == said
