"""Tables for the terminal: runs, their stages, models, measures."""

import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

from rich.table import Table

from services.dashboard import Job
from services.replies import ModelCard


def runs_table(runs: Iterable[dict[str, Any]]) -> Table:
    table = Table("run", "stages done", "of", box=None)
    for run in runs:
        stages = [name for name, value in run["recipe"].items() if isinstance(value, dict)]
        table.add_row(run["name"], ", ".join(s for s in stages if s in run["stages"]), str(len(stages)))
    return table


def stages_table(run: dict[str, Any]) -> Table:
    """A run's stages with what each ended at."""
    table = Table("stage", "finished", "seconds", "made from", "metrics", title=f"run {run['name']}", box=None)
    for name, value in run["recipe"].items():
        if not isinstance(value, dict):
            continue
        manifest = run["stages"].get(name)
        if manifest is None:
            table.add_row(name, "not yet")
            continue
        metrics = "  ".join(f"{k} {v:.4g}" for k, v in manifest["metrics"].items())
        parents = ", ".join(manifest["identity"]["parents"])
        table.add_row(name, manifest["finished"], f"{manifest['seconds']:.0f}", parents, metrics)
    return table


def models_table(models: Iterable[ModelCard]) -> Table:
    table = Table("model", "state", "kind", "revision", "context", "from", box=None)
    for model in models:
        made = f"run {model.run}, {model.stage}" if model.run else model.source
        languages = f", {model.source_language} to {model.target_language}" if model.source_language else ""
        context = str(model.limits.get("context_tokens", ""))
        table.add_row(model.name, model.state, model.kind + languages, model.revision, context, made)
    return table


def jobs_table(jobs: Iterable[Job]) -> Table:
    table = Table("job", "run", "recipe", "state", "started", "took", box=None)
    for job in jobs:
        state = job.status.lower() + (f", exit code {job.exit_code}" if job.exit_code else "")
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.started))
        took = timedelta(seconds=round((job.ended or time.time()) - job.started))
        table.add_row(job.id, job.run, job.recipe, state, started, str(took))
    return table


def measures_table(measures: Mapping[str, Any]) -> Table:
    """Numbers by name; an estimate is shown with its standard error."""
    table = Table("measure", "value", box=None)
    for name, value in measures.items():
        table.add_row(name, _shown(value))
    return table


def _shown(value: Any) -> str:
    if isinstance(value, Mapping) and "mean" in value and "stderr" in value:
        return f"{value['mean']:.4g} ± {value['stderr']:.2g}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
