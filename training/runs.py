"""What runs there are, and what each holds: read from a folder, or from what a store has."""

import json
from pathlib import Path
from typing import Any

from training import mirror
from training.run import StageError

RUNS = Path("runs")


def list_runs(runs: str | Path = RUNS) -> list[dict[str, Any]]:
    """Name, stages done and time of every run, in a folder or at a URI."""
    return [describe_run(run_folder(runs, name)) for name in mirror.names(runs)]


def run_folder(runs: str | Path, name: str, samples: bool = False) -> Path:
    """Where a run's small files are on this disk, to be looked at: fetched, if `runs` is a URI, with its `samples`."""
    root, store = mirror.locate(runs, name, mirror.SEEN)
    mirror.pull_files(root, store)
    if samples:
        mirror.pull_samples(root, store)
    return root


def describe_run(root: Path) -> dict[str, Any]:
    """A run's recipe, and its stages' manifests by name. Raises StageError where there is no such run."""
    recipe = read_json(root / "run.json")
    if recipe is None:
        raise StageError(f"run {root.name!r} not found in {root.parent}; `chatforge runs` lists what there is")
    stages = {p.parent.name: read_json(p) for p in sorted(root.glob("*/manifest.json"))}
    return {"name": root.name, "recipe": recipe, "stages": stages}


def read_json(path: Path) -> dict[str, Any] | None:
    """None where there is no such file."""
    return json.loads(path.read_text("utf-8")) if path.exists() else None
