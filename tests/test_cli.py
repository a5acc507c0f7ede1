"""The command line, frozen: a new command or flag is a decision, made here."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer.main
from services_world import environment, run_command

from services.cli import app

COMMANDS = {
    "demo": "",
    "train": "recipe --stage --set --workers --run --runs",
    "plan": "recipe --set --workers --run --runs",
    "runs": "name --runs --json",
    "report": "run --runs",
    "rank": "run --runs",
    "evaluate": "model data --from --to --runs",
    "import": "file out",
    "serve": "config --chat --translation --image --port",
    "chat": (
        "text --server --model --system --max-new-tokens --temperature --top-p --top-k --repetition-penalty --stop "
        "--seed"
    ),
    "translate": (
        "text --file --from --to --server --model --num-beams --num-hypotheses --length-penalty --max-new-tokens"
    ),
    "draw": (
        "prompt --output --n --grid --width --height --steps --guidance-scale --seed --sampler --negative-prompt "
        "--image --mask --strength --from --server --model"
    ),
    "models": "--server --json",
    "health": "--server",
    "submit": "recipe --address --set --workers --run --stage --runs --retries --detach",
    "jobs": "--address --json",
    "logs": "name --address --follow",
    "stop": "name --address",
    "bench serve": "model",
    "bench translate": "model pairs",
    "bench draw": "model",
    "bench submit": "",
    "bench train": "",
}


def test_the_command_line_is_frozen() -> None:
    assert dict(_commands(typer.main.get_command(app))) == COMMANDS


def _commands(group: Any, prefix: str = "") -> Any:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix}{name} ")
        else:
            said = (p.opts[0] if p.param_type_name == "option" else p.name for p in command.params)
            yield prefix + name, " ".join(said)


def test_the_version_is_told(tmp_path: Path) -> None:
    assert run_command(["--version"], tmp_path).stdout == f"{version('chatforge')}\n"


def test_runs_are_told_as_json_too(tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "run.json").write_text('{"sft": {"chats": []}}', "utf-8")
    mine = {"name": "mine", "recipe": {"sft": {"chats": []}}, "stages": {}}
    assert json.loads(run_command(["runs", "--json"], tmp_path).stdout) == [mine]
    assert json.loads(run_command(["runs", "mine", "--json"], tmp_path).stdout) == mine


def test_the_environment_may_name_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATFORGE_SERVER", "localhost")
    assert "address='localhost'" in run_command(["models"], tmp_path).stderr


def test_a_chat_that_is_not_utf8_is_refused_by_name(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "services.cli", "chat"]
    told = subprocess.run(command, input=b"abc\xff", cwd=tmp_path, env=environment(), capture_output=True)
    assert (told.returncode, told.stderr) == (2, b"error: stdin: not UTF-8: byte 3 is 0xff\n")


def test_every_command_has_a_help_line() -> None:
    assert all(command.help for command in typer.main.get_command(app).commands.values())  # type: ignore[attr-defined]


def test_help_imports_nothing_heavy() -> None:
    """What keeps `chatforge --help` under half a second."""
    code = (
        "import sys\nfrom services.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('grpc', 'ray', 'torch', 'transformers', 'pydantic', 'yaml', 'numpy') if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert told.stdout.endswith("\n[]\n") and "serve" in told.stdout and told.stderr == ""


MISTAKES = {
    "no such recipe": (["plan", "tinny"], "recipe 'tinny' not found: did you mean 'tiny'?"),
    "wrong field": (
        ["plan", "tiny", "--set", "sft.batchsize=1"],
        "sft.batchsize: no such key; did you mean 'batch_size'?",
    ),
    "no such model": (["serve", "--chat", "nowhere"], "model 'nowhere' not found: give a folder with a config.json"),
    "nothing to serve": (["serve"], "no model to serve; give --chat, --translation or --image MODEL, or a config file"),
    "no such translation model": (["serve", "--translation", "nowhere"], "model 'nowhere' not found: give a folder"),
    "two documents": (["translate", "--file", "a.txt", "text"], "a text and --file are given; give one of them"),
    "no such document": (["translate", "--file", "nowhere.txt"], "nowhere.txt: No such file or directory"),
    "no such image model": (["serve", "--image", "nowhere"], "model 'nowhere' not found: give a folder with a model_"),
    "a picture of another type": (["draw", "-o", "a.gif", "a cat"], "a.gif: ends in none of .png, .jpg, .jpeg, .webp"),
    "a picture into no folder": (["draw", "-o", "no/a.png", "a cat"], "no/a.png: there is no folder no"),
    "a mask of nothing": (["draw", "--mask", "m.png", "a cat"], "--mask: needs --image, the picture that is drawn"),
    "strength of nothing": (["draw", "--strength", "0.5", "a cat"], "--strength: needs --image, the picture"),
    "no such picture": (["draw", "--image", "nowhere.png", "a cat"], "nowhere.png: No such file or directory"),
    "no such sampler": (["draw", "--sampler", "dmp", "a cat"], "sampler: 'dmp' is none of ddim, dpm++, euler"),
    "no such run": (["report", "nowhere"], "run 'nowhere' not found in runs/"),
    "no run to rank": (["rank", "nowhere"], "run 'nowhere' not found in runs/"),
    "a run to rank in a bucket": (["rank", "mine", "--runs", "s3://b/runs"], "--runs s3://b/runs: your answers are"),
    "no run to show": (["runs", "nowhere"], "run 'nowhere' not found"),
    "nothing to evaluate on": (["evaluate", "nowhere"], "name data to measure it on"),
    "no run there": (["evaluate", "nowhere", "--runs", "there"], "evaluate nowhere: no run of that name in there; for"),
    "a text that is not UTF-8": (["translate", "ab\udcff"], "text: not UTF-8 at character 3"),
    "no address": (
        ["chat", "--server", "localhost", "hi"],
        "address='localhost': write HOST:PORT, or https://HOST",
    ),
    "one name for two": (
        ["serve", "--translation", "a=b", "--translation", "a=c"],
        "--translation: 'a' is given twice; give one another name: NAME=c",
    ),
    "no such file": (["import", "nowhere.gguf", "out"], "nowhere.gguf: no such file"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_prints_one_line_and_exits_2(case: str, tmp_path: Path) -> None:
    arguments, said = MISTAKES[case]
    told = run_command(arguments, tmp_path)
    assert told.returncode == 2 and told.stdout == ""
    assert told.stderr.startswith(f"error: {said}") or said in told.stderr
    assert told.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_runs_are_looked_for_where_they_are_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "there" / "mine").mkdir(parents=True)
    (tmp_path / "there" / "mine" / "run.json").write_text("{}", "utf-8")
    told = run_command(["evaluate", "mine", "data.txt", "--runs", "there"], tmp_path)
    assert told.returncode == 2 and told.stderr.endswith("for other data name there/mine/STAGE/model\n")
    told = run_command(["rank", "mine", "--runs", "there"], tmp_path)
    assert told.returncode == 2 and "run 'mine' has no completions to rank" in told.stderr


def test_a_package_that_is_missing_is_named_with_how_to_get_it(tmp_path: Path) -> None:
    """After `pip install .`, which brings the client alone."""
    (tmp_path / "ray.py").write_text("raise ModuleNotFoundError(\"No module named 'ray'\", name='ray')", "utf-8")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom services.cli import app\napp(['train', 'tiny'])"
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert told.returncode == 2 and told.stderr == (
        "error: this needs the package ray, which is not installed; in a clone: pip install '.[train,serve,demo]'\n"
    )


def test_a_server_that_is_not_there_exits_1(tmp_path: Path) -> None:
    told = run_command(["chat", "--server", "127.0.0.1:1", "hi"], tmp_path)
    assert told.returncode == 1 and told.stderr.startswith("error: UNAVAILABLE: ") and told.stderr.count("\n") == 1
    assert told.stderr.endswith("; is `chatforge serve` running there? see --server\n")


def test_the_plan_of_a_shipped_recipe_is_printed(tmp_path: Path) -> None:
    told = run_command(["plan", "tiny", "--workers", "1", "--run", "mine"], tmp_path)
    assert told.returncode == 0 and told.stderr == ""
    assert told.stdout.startswith("recipe mine: seed 1, workers 1") and "pretrain" in told.stdout
