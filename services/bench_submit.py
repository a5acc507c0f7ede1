"""`chatforge bench submit`: from the command to the first step, and a step's time, by three ways into one stage.

A bare process that calls the stage, `chatforge train` on a Ray of its own, and `chatforge submit` to a Ray that runs
already; the same small pretraining, its tokenizer made beforehand, in turns.
"""

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.app import ENVIRONMENT, HOST, free_port

ROUNDS = 3
STEPS = 150
WARMUP = 10  # steps that are not timed
WAIT = 300  # seconds until a Ray must be there
_BARE = """
import sys
from pathlib import Path
from training import pretrain
from training.recipe import load_recipe
from training.run import Run
recipe = load_recipe(sys.argv[1], [])
run = Run(Path(sys.argv[2]), "pretrain", recipe.seed, val_fraction=recipe.val_fraction)
run.folder.mkdir(parents=True)
pretrain.run(recipe.pretrain, run)
"""


@dataclass(frozen=True)
class Way:
    """One way into the stage, over all rounds."""

    name: str
    first: float  # seconds from the command to the end of the first step
    step: float  # seconds, the median
    whole: float  # seconds until the command has ended


def bench_submission(show: Callable[[Any], None]) -> list[Way]:
    """Measures, shows a table and returns its rows. Raises RuntimeError with the last words of a way that failed."""
    with tempfile.TemporaryDirectory(prefix="cfb-") as scratch:  # Ray's sockets live there: the path must stay short
        folder = Path(scratch)
        _write_recipe(folder)
        _run(folder, {}, ["-m", "services.cli", "train", "bench.yaml", "--stage", "tokenizer", "--run", "made"])
        with _ray(folder / "ray") as settings:
            ways: dict[str, tuple[dict[str, str], list[str]]] = {
                "a bare process": ({}, ["-c", _BARE, "bench.yaml", "runs/{run}"]),
                "chatforge train": ({}, ["-m", "services.cli", "train", "bench.yaml", "--run", "{run}"]),
                "chatforge submit": (
                    settings,
                    ["-m", "services.cli", "submit", "bench.yaml", "--run", "{run}", "--runs", f"{folder}/runs"],
                ),
            }
            taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
            for turn in range(ROUNDS):
                for number, (name, (env, words)) in enumerate(ways.items()):
                    run = f"run-{turn}-{number}"
                    shutil.copytree(folder / "runs/made/tokenizer", folder / "runs" / run / "tokenizer")
                    taken[name].append(_timed(folder, run, env, [word.format(run=run) for word in words]))
    rows = [Way(name, *map(statistics.median, zip(*times, strict=True))) for name, times in taken.items()]
    show(_table(rows))
    return rows


def _write_recipe(folder: Path) -> None:
    """A model so small that a step is mostly what surrounds it; JSON is YAML too."""
    words = ["the", "a", "sea", "ship", "wind", "goes", "sings", "over", "under", "home", "bright", "slow"]
    chance = random.Random(0)
    documents = (" ".join(chance.choices(words, k=60)) for _ in range(800))
    (folder / "corpus.txt").write_text("\n\n".join(documents), "utf-8")
    text, size = ["corpus.txt"], {"num_layers": 2, "num_heads": 2, "hidden_size": 64, "seq_len": 128}
    often = {"checkpoint_every": 10**6, "eval_every": 10**6}
    pretrain = {"text": text, "tokens": STEPS * 8 * 128, "batch_size": 8, "micro_batch_size": 8, **size, **often}
    recipe = {"name": "bench", "tokenizer": {"text": text, "vocab_size": 512}, "pretrain": pretrain}
    (folder / "bench.yaml").write_text(json.dumps(recipe), "utf-8")


def _timed(folder: Path, run: str, env: dict[str, str], words: list[str]) -> tuple[float, float, float]:
    """One run: seconds to the first step, of the median step, and altogether."""
    from training.run import Run

    began = time.time()
    _run(folder, env, words)
    ended = time.time()
    times = [line["time"] for line in Run(folder / "runs" / run, "pretrain").metrics() if "loss" in line]
    steps = [after - before for before, after in zip(times[WARMUP:], times[WARMUP + 1 :], strict=False)]
    return times[0] - began, statistics.median(steps), ended - began


def _run(folder: Path, env: dict[str, str], words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=_environment() | env, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {(done.stdout + done.stderr)[-2000:]}")


def _environment() -> dict[str, str]:
    """Ours, without what would send a run elsewhere."""
    return {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "CHATFORGE_RUNS")}


@contextmanager
def _ray(scratch: Path) -> Iterator[dict[str, str]]:
    """A Ray head with a dashboard on loopback; what a client's environment needs to find it."""
    from services.dashboard import ClusterError, JobError, dashboard_at

    ports = {name: free_port() for name in ("port", "dashboard-port", "ray-client-server-port")}
    settings = ports | {"dashboard-agent-listen-port": free_port(), "dashboard-host": HOST, "node-ip-address": HOST}
    options = [f"--{name}={value}" for name, value in settings.items()]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # a job's python is what PATH says
    address = f"http://{HOST}:{ports['dashboard-port']}"
    head = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--temp-dir={scratch}", *options],
        env=_environment() | ENVIRONMENT | {"PATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + WAIT
        while True:
            try:
                dashboard_at(address).check()
                break
            except (ClusterError, JobError):
                if head.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
        yield {"RAY_API_SERVER_ADDRESS": address}
    finally:
        head.terminate()
        head.wait()


def _table(rows: list[Way]) -> Any:
    from rich.table import Table

    table = Table(
        "way into pretraining", "first step after", "a step", "whole command", title=f"{STEPS} steps", box=None
    )
    bare = rows[0]
    for row in rows:
        cells = ((row.first, bare.first, "s"), (row.step * 1e3, bare.step * 1e3, "ms"), (row.whole, bare.whole, "s"))
        table.add_row(row.name, *(f"{value:,.1f} {unit} × {value / base:.2f}" for value, base, unit in cells))
    return table
