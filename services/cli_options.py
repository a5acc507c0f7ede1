"""What several commands share: their arguments, how a recipe is read, how a table is shown."""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from training.recipe import Recipe

RecipeArgument = Annotated[str, typer.Argument(help="A shipped recipe's name, or a YAML file.")]
SetOption = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a field: sft.batch_size=8.")]
WorkersOption = Annotated[
    str | None, typer.Option(metavar="N", help="Worker processes of every training stage; 2..8: as many as fit.")
]
RunOption = Annotated[str | None, typer.Option("--run", metavar="NAME", help="The run's name; default: the recipe's.")]
RunsOption = Annotated[
    str,
    typer.Option(
        "--runs", metavar="FOLDER", envvar="CHATFORGE_RUNS", help="Where runs live: a folder, or s3://BUCKET/PREFIX."
    ),
]

JsonOption = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]


def read_recipe(recipe: str, changes: list[str], workers: str | None, run: str | None) -> "Recipe":
    """A recipe with what the command line changes in it; raises ConfigError."""
    from training.recipe import load_recipe

    more = [f"workers={workers}"] if workers is not None else []
    more += [f"name={run}"] if run is not None else []
    return load_recipe(recipe, [*changes, *more])


def show(renderable: Any) -> None:
    from rich.console import Console

    Console().print(renderable)


def show_table(table: Callable[[Any], Any], value: Any, as_json: bool) -> None:
    """What `table` makes of a value, or the value itself for programs."""
    if as_json:
        typer.echo(json.dumps(value, default=asdict, ensure_ascii=False, indent=2))
    else:
        show(table(value))
