"""The commands for a Ray cluster: submit a recipe as a job, list jobs, show their logs, stop them.

What a job prints goes to stdout, what is said about it to stderr.
"""

import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli_options import (
    JsonOption,
    RecipeArgument,
    RunOption,
    SetOption,
    WorkersOption,
    read_recipe,
    show_table,
)

if TYPE_CHECKING:
    from services.dashboard import Job
    from services.jobs import Submission
    from training.recipe import Recipe

app = typer.Typer()

AddressOption = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Of Ray's dashboard, http://HEAD:8265; default: RAY_API_SERVER_ADDRESS."),
]
JobArgument = Annotated[str, typer.Argument(metavar="JOB_OR_RUN", help="A job's id, or a run: its newest job.")]


@app.command()
def submit(
    recipe: RecipeArgument,
    address: AddressOption = None,
    set_: SetOption = [],  # noqa: B006 - typer's way to say "none given"
    workers: WorkersOption = None,
    run: RunOption = None,
    stage: Annotated[str | None, typer.Option(help="Run this stage alone.")] = None,
    runs: Annotated[
        str | None,
        typer.Option(metavar="URI", help="Where runs live: a folder that every node has, s3://...; or CHATFORGE_RUNS."),
    ] = None,
    retries: Annotated[int, typer.Option(min=0, help="Submit again after a failure, so many times.")] = 0,
    detach: Annotated[bool, typer.Option("--detach", help="Print the job's id and do not wait.")] = False,
) -> None:
    """Train a recipe as a job on a Ray cluster; the same command goes on after a failure, or follows what runs.

    Our code goes along, and the files that the recipe names by relative paths. Absolute paths are the nodes' own.
    """
    from services import jobs
    from services.dashboard import dashboard_at

    if detach and retries:
        raise ValueError("--retries: needs the command to wait; leave out --detach")
    submission = _submission(read_recipe(recipe, set_, workers, run), recipe, stage, runs)
    dashboard = dashboard_at(address)
    dashboard.check()
    job_id = jobs.patiently(lambda: jobs.start(dashboard, submission, _say), _say)
    if detach:
        typer.echo(job_id)
        return
    with _goes_on(job_id, dashboard.address):
        _end(jobs.run_to_end(dashboard, submission, job_id, retries, _print, _say))


@app.command("jobs")
def jobs_(address: AddressOption = None, json: JsonOption = False) -> None:
    """What was submitted to a Ray cluster, the oldest first."""
    from services.dashboard import dashboard_at
    from services.listing import jobs_table

    show_table(jobs_table, dashboard_at(address).jobs(), json)


@app.command()
def logs(
    name: JobArgument,
    address: AddressOption = None,
    follow: Annotated[bool, typer.Option("--follow", help="Until the job is over; exits with its code.")] = False,
) -> None:
    """What a job has printed."""
    from services import jobs
    from services.dashboard import dashboard_at

    dashboard = dashboard_at(address)
    job = jobs.find(dashboard, name)
    if follow:
        with _goes_on(job.id, dashboard.address):
            _end(jobs.follow(dashboard, job.id, _print, _say))
    else:
        _print(dashboard.log(job.id) or "")


@app.command()
def stop(name: JobArgument, address: AddressOption = None) -> None:
    """End a job at its next checkpoint, and wait for it."""
    from services import jobs
    from services.dashboard import dashboard_at

    dashboard = dashboard_at(address)
    typer.echo(jobs.stop(dashboard, jobs.find(dashboard, name), _print, _say))


def _submission(recipe: "Recipe", name: str, stage: str | None, runs: str | None) -> "Submission":
    """All that a job needs; every mistake that can be seen here is refused here."""
    from services.jobs import Submission
    from services.packing import pack
    from training.config import ConfigError
    from training.inputs import local_inputs
    from training.pipeline import derived

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", recipe.name):
        raise ConfigError(f"name={recipe.name!r}: a job's name is made of it: letters, digits, '.', '_' or '-'")
    if stage and stage not in recipe.stages:
        raise ConfigError(f"stage {stage!r} is not in recipe {recipe.name!r}, which has: {', '.join(recipe.stages)}")
    for stage_name in recipe.stages:
        derived(recipe, stage_name)
    env_vars = {"CHATFORGE_RUNS": _where_runs_live(runs), **_secrets(recipe)}
    file = f"{recipe.name}.yaml"
    command = ["python", "-m", "services.cli", "train", file, "--run", recipe.name]
    command += ["--stage", stage] if stage else []
    package = pack((file, resolved(recipe)), local_inputs(recipe))
    return Submission(recipe.name, name, shlex.join(command), package, env_vars)


def resolved(recipe: "Recipe") -> str:
    """One YAML file that needs no other."""
    import yaml

    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


def _where_runs_live(runs: str | None) -> str:
    """A job's own folder goes when the job does."""
    said = runs or os.environ.get("CHATFORGE_RUNS") or ""
    if "://" in said or Path(said).is_absolute():
        return said
    raise ValueError(
        f"--runs {said or 'is not given'}: name a folder that every node of the cluster has by an absolute path, or a "
        "URI such as s3://BUCKET/PREFIX; or set CHATFORGE_RUNS"
    )


def _secrets(recipe: "Recipe") -> dict[str, str]:
    from training.config import ConfigError

    if unset := [name for name in recipe.env if not os.environ.get(name)]:
        raise ConfigError(f"env: {', '.join(unset)}: not set here; export it, since the job gets its value from here")
    return {name: os.environ[name] for name in recipe.env}


def _end(job: "Job") -> None:
    """Says how the job ended and exits as it did."""
    from services import jobs

    code = jobs.exit_code(job)
    hint = f"; {jobs.GOES_ON}" if jobs.goes_on(job) else ""
    _say(f"{'error: ' if code else ''}{jobs.describe(job)}{hint}")
    raise typer.Exit(code)


@contextmanager
def _goes_on(job_id: str, address: str) -> Iterator[None]:
    """Ctrl-C ends the following, and not the job."""
    try:
        yield
    except KeyboardInterrupt:
        _say(f"\njob {job_id} goes on; follow it: chatforge logs {job_id} --follow --address {address}")
        _say(f"stop it: chatforge stop {job_id} --address {address}")
        raise


def _print(text: str) -> None:
    typer.echo(text, nl=False)


def _say(text: str) -> None:
    typer.echo(text, err=True)
