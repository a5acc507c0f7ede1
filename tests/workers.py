"""A stage on two workers, as processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

from services.app import free_port

ROOT = Path(__file__).parents[1]
WORKER = """
import sys
from importlib import import_module
from pathlib import Path
from training import config
from training.run import Run
root, stage, kind, settings, val_fraction = sys.argv[1:]
run = Run(Path(root), stage, seed=3, workers=2, val_fraction=float(val_fraction))
run.folder.mkdir(parents=True, exist_ok=True)
import_module(f"training.{stage}").run(getattr(config, kind).model_validate_json(settings), run)
"""


def two_workers(stage, config, root, val_fraction=0.05):
    """The exit codes and last words of two workers that train together."""
    given = [str(root), stage, type(config).__name__, config.model_dump_json(), str(val_fraction)]
    return two_processes(WORKER, given)


def two_processes(code, given):
    """The same of two processes that run `code`, each with its RANK."""
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, *given],
            env=shared | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    told = [worker.communicate(timeout=240)[1] for worker in workers]
    return [worker.returncode for worker in workers], [words[-2000:] for words in told]
