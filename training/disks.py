"""What workers do together where they do not all have one disk: one acts for each, and all learn of its failure."""

import atexit
import functools
import shutil
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from training import mirror
from training.run import Run, StageError
from training.store import StoreError

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # Ray sees by itself when a worker is dead


def is_first_on_disk(run: Run) -> bool:
    """Whether this rank is the lowest of those that share its disk: rank 0 alone where the run has no store.

    All ranks call it.
    """
    return run.rank == 0 if run.store is None or run.workers == 1 else _is_first_here(run)


@functools.cache
def _is_first_here(run: Run) -> bool:
    """Each leaves a mark in the run's folder, and looks whose are there."""
    name = [f".ranks-{uuid.uuid4().hex[:8]}"]
    dist.broadcast_object_list(name, 0)
    marks = run.root / name[0]
    marks.mkdir(parents=True, exist_ok=True)
    (marks / str(run.rank)).touch()
    dist.barrier()
    first = min(int(mark.name) for mark in marks.iterdir())
    dist.barrier()
    if first == run.rank:
        shutil.rmtree(marks)
    return first == run.rank


def once_per_disk(run: Run, make: Callable[[], T]) -> list[T]:
    """What `make` returns on one rank of every disk; all ranks call it, and what it raises is raised on every one.

    Only StageError and StoreError travel so: without it the others would wait for a rank that has given up.
    """
    made: list[T] = []
    failed: ValueError | None = None
    _patient()
    if is_first_on_disk(run):
        try:
            made.append(make())
        except (StageError, StoreError) as error:
            failed = error
    told = _of_all_ranks((made, failed))
    if failures := [error for _, error in told if error]:
        raise failures[0]
    return [one for part, _ in told for one in part]


def on_rank_0(run: Run, make: Callable[[], T]) -> T | None:
    """What `make` returns on rank 0, None elsewhere; for the rest as `once_per_disk`."""
    made: T | None = None
    told: list[ValueError | None] = [None]
    _patient()
    if run.rank == 0:
        try:
            made = make()
        except (StageError, StoreError) as error:
            told = [error]
    dist.broadcast_object_list(told, 0, group=_patient())
    if told[0]:
        raise told[0]
    return made


def store_checkpoint(run: Run, step: int, written: Path) -> None:
    """Every disk sends its part; when all are there rank 0 makes them the newest checkpoint. All ranks call it."""
    parts = once_per_disk(run, lambda: mirror.upload_checkpoint(run, step, written))
    index = {path: entry for part in parts for path, entry in part.items()}
    assert len(index) == sum(map(len, parts)), "two disks have parts of one name"
    on_rank_0(run, lambda: mirror.commit_checkpoint(run, step, index))


def _of_all_ranks(mine: T) -> list[T]:
    if not dist.is_initialized():
        return [mine]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine, group=_patient())
    return gathered


def _patient() -> Any:
    """All ranks, for work that one of them does for the others: millions of pictures take longer than a collective may.

    All ranks call it before that work, too. None without a process group. Not kept by callers: the frames of an
    exception would keep its threads.
    """
    return _patient_beside(dist.group.WORLD) if dist.is_initialized() else None


@functools.cache
def _patient_beside(world: Any) -> Any:
    """One for the group that there is."""
    assert world is dist.group.WORLD
    return dist.new_group(backend="gloo", timeout=PATIENCE)


@atexit.register
def _leave_groups() -> None:
    """At a process's end: a thread of gloo that still ends a collective then aborts it (some 3 in 100 did).

    A group of NCCL's is not left: that would wait for ranks that may be gone.
    """
    if dist.is_initialized() and _patient_beside.cache_info().currsize:
        dist.destroy_process_group(_patient())
    _patient_beside.cache_clear()  # what holds a group holds its threads
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()
