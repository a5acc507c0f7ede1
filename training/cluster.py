"""Run one stage on N Ray Train workers; a worker that dies is restarted, and the stage goes on from its checkpoint.

Ray Train starts the processes and watches them. What a stage goes on from is in its run folder alone, so a restart of
a worker, of the driver and of the whole of Ray are one case.
"""

import importlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from training import notice, placement
from training.config import ConfigError, OptimizerConfig, PPOConfig, StageConfig
from training.device import ENVIRONMENT, backend, choose_device
from training.notice import stopped_by_sigterm
from training.progress import Progress
from training.run import Run, StageCrashed, StageError, StageInterrupted
from training.store import StoreError

RESTARTS = 3  # of the workers, before a stage is given up
_FULL = 1 << 20  # bytes: with less a disk is full
_LOOK_EVERY = placement.seconds_from("CHATFORGE_GROW_EVERY_S", 15.0)  # for nodes that have come

_RAY = {
    "RAY_worker_niceness": "0",  # by default 15: any other program on the machine would starve the workers
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a recipe's relative paths are those of where the command was given
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # so late is a stage seen to be done
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
}


@contextmanager
def ray_session() -> Iterator[None]:
    """The cluster that RAY_ADDRESS names, or one of our own on loopback that ends with the block and leaves no file."""
    joins = bool(os.environ.get("RAY_ADDRESS"))
    os.environ.update(_RAY)
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = str(int(joins))  # nobody takes this machine away
    import ray

    if ray.is_initialized():
        yield
        return
    scratch = None
    on_terminate = signal.getsignal(signal.SIGTERM)
    if joins:
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
    """`choose_device` asked of the cluster we are connected to; GPUs that are asked for may come to one we join."""
    import ray

    if requested == "cuda" and os.environ.get("RAY_ADDRESS"):
        return "cuda"  # _place waits for them, and says what is missing
    return choose_device(requested, int(ray.cluster_resources().get("GPU", 0)), workers)


def run_stage(config: StageConfig, run: Run, counts: Sequence[int], state_bytes: int = 0) -> bool:
    """Runs `training.STAGE.run(config, run)` on the most of `counts` workers that there is room for; shows progress.

    After a crash, and when nodes go or come, it goes on from its checkpoint on what there is.
    `state_bytes` is what weights and optimiser take together. Raises StageError or ConfigError as the stage did,
    StageError where the cluster has no room, StageCrashed when workers died more than RESTARTS times,
    StageInterrupted after SIGTERM. Returns whether SIGTERM came too late for that: the stage is done, and no other
    should start. A stage that makes no checkpoints ends with its process, at once.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    done = threading.Event()
    leaving = stopped_by_sigterm(run) if isinstance(config, OptimizerConfig) else nullcontext(threading.Event())
    with Progress(run, done), leaving as asked:
        try:
            _until_done(config, run, counts, state_bytes)
        finally:
            done.set()
    return asked.is_set()


def _until_done(config: StageConfig, run: Run, counts: Sequence[int], state_bytes: int) -> None:
    import ray
    from ray.train import TrainingFailedError

    least = placement.Need(
        gpus=int(run.device == "cuda"),
        # ZeRO-0 keeps the whole state in every worker; what the other levels save is not counted on here.
        memory=0 if run.device == "cuda" else state_bytes,
        engines=config.rollout_engines if isinstance(config, PPOConfig) else 0,
    )
    crashes, end, began = 0, "", False
    while end != _DONE:
        try:
            workers, need = _place(run, counts, least, again=began)
            began = True
            if len(counts) > 1:
                print(f"{run.stage}: {workers} workers of {need}", flush=True)
            with _growing(run, workers, [count for count in counts if count > workers], least):
                end, message = _fit(config, replace(run, workers=workers), need)
        except TrainingFailedError as error:
            crashes += 1
            if crashes > RESTARTS:
                log = run.folder / "worker-0.log"
                raise StageCrashed(
                    f"{run.stage} failed after {RESTARTS} restarts: {_cause(error)}; see {log}"
                ) from error
            print(f"{run.stage}: a worker died ({_cause(error)}); starts again", flush=True)
            continue
        except ray.exceptions.RayError as error:
            raise StageCrashed(f"{run.stage}: Ray went away ({_cause(error)}); run the same command again") from error
        if end in _MISTAKES:
            raise _MISTAKES[end](message)
        if end == _STOPPED:
            raise StageInterrupted(stopped=True)
        if end == _AGAIN:
            print(f"{run.stage}: nodes come or go; starts again from its checkpoint", flush=True)


@contextmanager
def _growing(run: Run, workers: int, counts: Sequence[int], need: placement.Need) -> Iterator[None]:
    """Inside, `workers` are asked to start again once there is free room for one of `counts`, all of them more."""
    import ray

    notice.forget_to_start_again(run)
    over = threading.Event()

    def there_is_room() -> bool:
        """For the new ones beside those that run, and for all of them where _place will look."""
        try:
            nodes, free = _nodes(only_answering=True), ray._private.state.available_resources_per_node()
        except Exception:  # Ray is away for a moment, or for good, which the stage will tell
            return False
        room, more = placement.capacity(nodes, need), placement.capacity(free, need)
        return any(count <= room and count - workers <= more for count in counts)

    def watch() -> None:
        seen = 0  # times in a row: a node that has just come may go again
        while not over.wait(_LOOK_EVERY):
            seen = seen + 1 if there_is_room() else 0
            if seen == 2:
                notice.ask_to_start_again(run)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    if counts:
        watcher.start()
    try:
        yield
    finally:
        over.set()
        if counts:
            watcher.join()


def _place(run: Run, counts: Sequence[int], need: placement.Need, again: bool) -> tuple[int, placement.Need]:
    """How many workers, and what each gets: at least `need`. Waits for nodes, up to a minute; then raises what is
    missing."""
    from ray.autoscaler.sdk import request_resources

    deadline = time.monotonic() + placement.WAIT
    told = False
    try:
        while True:
            nodes = _nodes(only_answering=again)
            workers = placement.most_workers(nodes, counts, need)
            if workers is not None:
                return workers, placement.with_all_cpus(nodes, workers, need)
            shortage = placement.shortage(run.stage, nodes, counts, need)
            if time.monotonic() > deadline:
                raise (StageCrashed if again else StageError)(shortage)
            if not told:
                print(f"{shortage}. Waits {placement.WAIT:.0f} s for them", flush=True)
                # Of an autoscaler, where there is one.
                request_resources(bundles=[need.resources] * (min(counts) * need.parts))
                told = True
            time.sleep(1.0)
    finally:
        if told:
            request_resources(bundles=[])


def _nodes(only_answering: bool) -> placement.Nodes:
    """What every living node has. Ray takes some seconds to see that one has died: then it is asked itself."""
    import ray

    leaving = ray._private.state.state.get_draining_nodes()  # Ray has no public way to ask
    alive = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    if only_answering:
        alive = [node for node in alive if _answers(node["NodeManagerAddress"], node["NodeManagerPort"])]
    return {f"{node['NodeManagerAddress']}#{node['NodeID'][:6]}": node["Resources"] for node in alive}


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=2).close()
    except OSError:
        return False
    return True


def _fit(config: StageConfig, run: Run, need: placement.Need) -> tuple[str, str]:
    """One life of a group of workers: how it ended, and what was said. Raises TrainingFailedError when one died."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    from training.rendezvous import Rendezvous

    storage = _scratch()
    trainer = TorchTrainer(
        _worker,  # type: ignore[arg-type]
        train_loop_config={"config": config, "run": run},
        torch_config=Rendezvous(backend=backend(run.device)),
        scaling_config=ScalingConfig(
            num_workers=run.workers, use_gpu=run.device == "cuda", resources_per_worker=need.resources
        ),
        # A name that Ray knows would resume that run's state silently: ours is in the run folder, so it gets a new one.
        run_config=RunConfig(
            name=Path(storage).name,
            storage_path=storage,
            # We start it again ourselves, on what room there is then.
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=0, max_preemption_failures=0, controller_failure_limit=0
            ),
        ),
    )
    # Ray's own Ctrl-C handler ends the process with 0 or 1, as it happens; Python's raises KeyboardInterrupt.
    trainer._register_sigint_handler = lambda controller: None  # type: ignore[attr-defined]
    # Processes of their own, at every start: Ray's datasets, of which we have none, and one that tidies up after a
    # controller that died, which a Ray of our own does by its end.
    unneeded = (
        (DatasetsCallback,) if os.environ.get("RAY_ADDRESS") else (DatasetsCallback, PlacementGroupCleanerCallback)
    )
    callbacks = [c for c in trainer._create_default_callbacks() if not isinstance(c, unneeded)]  # type: ignore[attr-defined]
    trainer._create_default_callbacks = lambda: callbacks  # type: ignore[attr-defined]
    try:
        return trainer.fit().return_value  # type: ignore[attr-defined]  # rank 0's
    finally:
        shutil.rmtree(storage, ignore_errors=True)


_LEAVING = 30.0  # seconds that a worker waits for the others to leave with it
_DONE, _STOPPED, _AGAIN = "done", "stopped", "again"
_MISTAKES = {"StageError": StageError, "ConfigError": ConfigError, "StoreError": StoreError}


def _worker(arguments: dict[str, Any]) -> tuple[str, str]:
    """What each Ray Train worker executes; how it ended, and what is to be said of it."""
    config, run = arguments["config"], arguments["run"]
    os.environ.update(ENVIRONMENT)
    _log_to(run.folder / f"worker-{run.rank}.log")
    from training import zero

    stage = importlib.import_module(f"training.{run.stage}")
    try:
        with zero.mirrored(config, run) as settings:
            stage.run(settings, run)
    except (ConfigError, StageError, StoreError) as error:
        if getattr(error, "may_pass", False):
            raise
        if not _all_leave(run):  # the others wait for this one: Ray ends them with it
            raise RuntimeError(str(error)) from error
        kind = next(name for name, kind in _MISTAKES.items() if isinstance(error, kind))
        return kind, str(error)  # not raised: no restart can mend it
    except StageInterrupted as interrupted:
        return _STOPPED if interrupted.stopped else _AGAIN, ""
    except Exception as error:  # torch says of a full disk that it failed to write, and not why
        if shutil.disk_usage(run.folder).free > _FULL:
            raise
        full = f"{run.stage}: no space is left on the disk of {run.folder}: {error}; free some"
        if run.workers > 1:  # the others wait for this one: Ray ends them with it
            raise RuntimeError(full) from error
        return "StageError", full
    return _DONE, ""


def _all_leave(run: Run) -> bool:
    """Whether every worker of the group comes here within half a minute: of what one alone has met none other knows."""
    if run.workers == 1:
        return True
    import torch.distributed as dist

    store = dist.distributed_c10d._get_default_store()  # in the first worker's process, which stays
    store.add("leaving", 1)
    deadline = time.monotonic() + _LEAVING
    while store.add("leaving", 0) < run.workers:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _log_to(path: Path) -> None:
    """Everything this process prints, native libraries included, goes on in the run folder."""
    sys.stdout.flush()
    sys.stderr.flush()
    path.parent.mkdir(parents=True, exist_ok=True)  # this node's disk may be another than the driver's
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


def _cause(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
