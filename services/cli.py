"""The `chatforge` command. Every heavy import is inside the command that needs it, so `--help` answers at once.

A user's mistake (ValueError) prints one line and exits 2, another failure that we foresee exits 1, Ctrl-C exits 130,
SIGTERM 143.
"""

import errno
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from services import cli_bench, cli_client, cli_jobs
from services.address import DEFAULT_PORT
from services.cli_options import (
    JsonOption,
    RecipeArgument,
    RunOption,
    RunsOption,
    SetOption,
    WorkersOption,
    read_recipe,
    show,
    show_table,
)

RUNS = Path("runs")
TERMINATED = 128 + signal.SIGTERM


class _Commands(TyperGroup):
    """Runs a command and turns what it raises into a line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        signal.signal(signal.SIGTERM, _terminate)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader of our output has gone, as `head` does
            sys.stdout = None  # type: ignore[assignment]
            raise typer.Exit(0) from None
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package in ("", "chatforge", "services", "serving", "training"):
                raise
            needed = "in a clone: pip install '.[train,serve,demo]'"
            typer.echo(f"error: this needs the package {package}, which is not installed; {needed}", err=True)
            raise typer.Exit(2) from None
        except (ValueError, RuntimeError) as error:
            code = _exit_code(error)
            if code is None:
                raise
            typer.echo(f"{'' if code == TERMINATED else 'error: '}{error}{_hint(error)}", err=True)
            raise typer.Exit(code) from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            typer.echo(f"error: {error}: free some; the same command goes on", err=True)
            raise typer.Exit(1) from None


def _exit_code(error: Exception) -> int | None:
    """None for a bug, whose traceback is worth more than a line."""
    if getattr(error, "may_pass", False):  # a store that was away, training.store.StoreError
        return 1
    if isinstance(error, ValueError):
        return 2
    from training.run import StageCrashed, StageInterrupted

    if isinstance(error, StageInterrupted):
        return TERMINATED
    from services.app import ServerStartError

    if isinstance(error, (StageCrashed, ServerStartError)):
        return 1
    called = getattr(error, "code", None)  # services.client.CallError, which is not imported for this
    if called in ("INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED"):
        return 2
    return 1 if called else None


def _hint(error: Exception) -> str:
    """How to mend what gRPC says of a server that it could not reach."""
    unreached = getattr(error, "code", None) == "UNAVAILABLE" and not getattr(error, "by_server", True)
    return "; is `chatforge serve` running there? see --server" if unreached else ""


def _terminate(*_: object) -> NoReturn:
    raise SystemExit(TERMINATED)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Train your own ChatGPT, and serve it over gRPC.",
)
app.add_typer(cli_bench.app, name="bench")
app.add_typer(cli_client.app)
app.add_typer(cli_jobs.app)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("chatforge"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """What stands before a command."""


# ---- training


@app.command()
def demo() -> None:
    """The whole story on this machine, with real data: train every stage, serve, talk to it."""
    from services.demo import run_demo

    run_demo(RUNS)


@app.command()
def train(
    recipe: RecipeArgument,
    stage: Annotated[str | None, typer.Option(help="Run this stage alone.")] = None,
    set_: SetOption = [],  # noqa: B006 - typer's way to say "none given"
    workers: WorkersOption = None,
    run: RunOption = None,
    runs: RunsOption = str(RUNS),
) -> None:
    """Run what is not yet done of a recipe; the same command goes on after an interruption."""
    from training import pipeline

    pipeline.train(read_recipe(recipe, set_, workers, run), runs, only=stage, say=typer.echo)


@app.command()
def plan(
    recipe: RecipeArgument,
    set_: SetOption = [],  # noqa: B006
    workers: WorkersOption = None,
    run: RunOption = None,
    runs: RunsOption = str(RUNS),
) -> None:
    """What a recipe would do: stages, what is done or stale and why, the numbers that follow."""
    from training import pipeline

    chosen = read_recipe(recipe, set_, workers, run)
    typer.echo(pipeline.describe(chosen, pipeline.plan(chosen, runs)))


@app.command()
def runs(
    name: Annotated[str | None, typer.Argument(help="One run, in detail.")] = None,
    runs: RunsOption = str(RUNS),
    json: JsonOption = False,
) -> None:
    """What there is in runs/: stages, their state, their final metrics."""
    from services.listing import runs_table, stages_table
    from training.runs import describe_run, list_runs, run_folder

    if name:
        show_table(stages_table, describe_run(run_folder(runs, name)), json)
    else:
        show_table(runs_table, list_runs(runs), json)


@app.command()
def report(run: str, runs: RunsOption = str(RUNS)) -> None:
    """Draw a run: one HTML page with its curves and its samples."""
    from training.report import write_report

    typer.echo(write_report(_run_folder(run, runs, samples=True)))


@app.command()
def rank(run: str, runs: RunsOption = str(RUNS)) -> None:
    """Rank a run's sampled completions yourself; stop and come back at any time."""
    from training.rank import rank_in_terminal
    from training.run import Run
    from training.store import is_uri

    if is_uri(runs):
        raise ValueError(f"--runs {runs}: your answers are written on this disk as you give them; name a folder")
    rank_in_terminal(Run(_run_folder(run, runs), "rank"))


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run, or a model folder.")],
    data: Annotated[list[str], typer.Argument(help="For a model folder: texts, rankings or sentence pairs.")] = [],  # noqa: B006
    source: Annotated[
        str | None, typer.Option("--from", metavar="LANGUAGE", help="Of pairs; default: the model's.")
    ] = None,
    target: Annotated[str | None, typer.Option("--to", metavar="LANGUAGE", help="The same.")] = None,
    runs: RunsOption = str(RUNS),
) -> None:
    """What a run's models are worth on its held-out data, or a model folder on data of yours."""
    from services.listing import measures_table
    from training import pipeline
    from training.runs import describe_run, run_folder

    run = None if "/" in model else run_folder(runs, model)  # a run's name has none
    if run is None or not (run / "run.json").is_file():
        if not data:
            raise ValueError(
                f"evaluate {model}: no run of that name in {runs}; for a model folder, name data to measure it on"
            )
        from training.evaluate import evaluate_model

        show(measures_table(evaluate_model(model, data, source_language=source, target_language=target)))
        return
    if data:
        folder = f"{runs}/{model}/STAGE/model"
        raise ValueError(f"evaluate {model}: a run is measured on its own held-out data; for other data name {folder}")
    from training.config import EvaluateConfig
    from training.recipe import Recipe

    recipe = Recipe.model_validate_json((run / "run.json").read_text("utf-8"))
    if recipe.evaluate is None:
        recipe = recipe.model_copy(update={"evaluate": EvaluateConfig()})
    pipeline.train(recipe, runs, only="evaluate", say=typer.echo)
    show(measures_table(describe_run(run_folder(runs, model))["stages"]["evaluate"]["metrics"]))


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE.gguf")],
    out: Annotated[Path, typer.Argument(help="The model folder to write.")],
) -> None:
    """Make a model folder out of a GGUF file."""
    from training.import_gguf import import_gguf

    import_gguf(file, out)
    typer.echo(out)


# ---- serving


@app.command()
def serve(
    config: Annotated[Path | None, typer.Argument(help="YAML, ours or Serve's; options below go before it.")] = None,
    chat: Annotated[
        list[str], typer.Option(metavar="MODEL", help="A model folder, NAME=FOLDER, or a run. Repeat for more.")
    ] = [],  # noqa: B006
    translation: Annotated[list[str], typer.Option(metavar="MODEL", help="The same, for models that translate.")] = [],  # noqa: B006
    image: Annotated[list[str], typer.Option(metavar="MODEL", help="The same, for models that draw.")] = [],  # noqa: B006
    port: Annotated[int | None, typer.Option(help=f"Default: {DEFAULT_PORT}.")] = None,
) -> None:
    """Answer over gRPC until Ctrl-C."""
    from services.config import load_config
    from services.folders import parse_model_option

    models: dict[str, dict[str, Any]] = {"chat": {}, "translation": {}, "image": {}}
    for service, options in (("chat", chat), ("translation", translation), ("image", image)):
        for name, model in (parse_model_option(option, service) for option in options):
            if name in models[service]:
                raise ValueError(f"--{service}: {name!r} is given twice; give one another name: NAME={model}")
            models[service][name] = {"model": model}
    settings = load_config(config, **models, **({} if port is None else {"port": port}))
    from services.app import running

    typer.echo(f"starting {', '.join(name for names in settings.services.values() for name in names)} ...")
    with running(settings, typer.echo) as server:
        for service, device in server.devices.items():
            for name, served in settings.models[service].items():
                typer.echo(f"  {name:<24} {served.folder}, on {device}")
        typer.echo(f"ready at {server.address}, on every network interface of this machine")
        for command, names, text in (
            ("chat", list(settings.chat), "Hello!"),
            ("translate", list(settings.translation), "Guten Tag!"),
            ("draw", list(settings.image), "a red apple"),
        ):
            if names:
                typer.echo(f'  chatforge {command} --server {server.address} --model {names[0]} "{text}"')
        signal.pause()


def _run_folder(run: str, runs: str, samples: bool = False) -> Path:
    from training.runs import run_folder

    folder = run_folder(runs, run, samples)
    if not (folder / "run.json").is_file():
        raise ValueError(f"run {run!r} not found in {runs}/; `chatforge runs` lists what there is")
    return folder


if __name__ == "__main__":
    app()
