"""Run one stage on N Ray Train workers; a worker that dies is restarted, and the stage goes on from its checkpoint.

Ray Train starts the processes and watches them. What a stage goes on from is in its run folder alone, so a restart of
a worker, of the driver and of the whole of Ray are one case.
"""

import importlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training.config import ConfigError, StageConfig
from training.device import ENVIRONMENT, backend, choose_device
from training.progress import Progress
from training.run import Run, StageCrashed, StageError, write_atomic

RESTARTS = 3  # of the workers, before a stage is given up

_RAY = {
    "RAY_worker_niceness": "0",  # by default 15: any other program on the machine would starve the workers
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
}


@contextmanager
def ray_session() -> Iterator[None]:
    """The cluster that RAY_ADDRESS names, or one of our own on loopback that ends with the block and leaves no file."""
    os.environ.update(_RAY)
    import ray

    if ray.is_initialized():
        yield
        return
    scratch = None
    on_terminate = signal.getsignal(signal.SIGTERM)
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    else:
        _sweep()
        scratch = _scratch()
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=200_000_000,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
            _temp_dir=scratch,
        )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate)  # Ray has put one there that aborts
    try:
        yield
    finally:
        ray.shutdown()
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)


def resolve_device(requested: str, workers: int) -> str:
    """`choose_device` asked of the cluster we are connected to."""
    import ray

    return choose_device(requested, int(ray.cluster_resources().get("GPU", 0)), workers)


def run_stage(config: StageConfig, run: Run) -> None:
    """Runs `training.STAGE.run(config, run)` on `run.workers` workers and shows its progress.

    Raises StageError or ConfigError as the stage did, StageCrashed when workers died more than RESTARTS times.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    _failure(run).unlink(missing_ok=True)
    done = threading.Event()
    with Progress(run, done):
        try:
            _fit(config, run)
        finally:
            done.set()
    if _failure(run).exists():
        failure = json.loads(_failure(run).read_text("utf-8"))
        raise (ConfigError if failure["kind"] == "ConfigError" else StageError)(failure["message"])


def _fit(config: StageConfig, run: Run) -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    cpus = max(1, int(ray.cluster_resources()["CPU"]) // run.workers)
    storage = _scratch()
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"config": config, "run": run},
        torch_config=TorchConfig(backend=backend(run.device)),
        scaling_config=ScalingConfig(
            num_workers=run.workers, use_gpu=run.device == "cuda", resources_per_worker={"CPU": cpus}
        ),
        # A name that Ray knows would resume that run's state silently: ours is in the run folder, so it gets a new one.
        run_config=RunConfig(
            name=Path(storage).name, storage_path=storage, failure_config=FailureConfig(max_failures=RESTARTS)
        ),
    )
    # Ray's own Ctrl-C handler ends the process with 0 or 1, as it happens; Python's raises KeyboardInterrupt.
    trainer._register_sigint_handler = lambda controller: None  # type: ignore[attr-defined]
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        log = run.folder / "worker-0.log"
        raise StageCrashed(f"{run.stage} failed after {RESTARTS} restarts: {_cause(error)}; see {log}") from error
    except ray.exceptions.RayError as error:
        raise StageCrashed(f"{run.stage}: Ray went away ({_cause(error)}); run the same command again") from error
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _worker(arguments: dict[str, Any]) -> None:
    """What each Ray Train worker executes."""
    config, run = arguments["config"], arguments["run"]
    os.environ.update(ENVIRONMENT)
    _log_to(run.folder / f"worker-{run.rank}.log")
    stage = importlib.import_module(f"training.{run.stage}")
    try:
        stage.run(config, run)
    except (StageError, ConfigError) as error:
        # Not raised: no restart can mend it.
        if run.rank == 0:
            write_atomic(_failure(run), json.dumps({"kind": type(error).__name__, "message": str(error)}))


def _log_to(path: Path) -> None:
    """Everything this process prints, native libraries included, goes on in the run folder."""
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def _scratch() -> str:
    """A temporary folder that bears our pid; its path is short, since Ray's sockets live there."""
    return tempfile.mkdtemp(prefix=f"chatforge-{os.getpid()}-")


def _sweep() -> None:
    """Remove the scratch of drivers that were killed and could not."""
    for folder in Path(tempfile.gettempdir()).glob("chatforge-*-*"):
        pid = folder.name.split("-")[1]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _failure(run: Run) -> Path:
    return run.folder / "failure.json"


def _cause(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
