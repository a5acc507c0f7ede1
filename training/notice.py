"""What a running stage is told from outside: to make a checkpoint and leave, and why.

Two things can ask for it. The driver, when it gets SIGTERM (`chatforge stop`, a pod that is evicted): it tells the
workers through Ray's key-value store, which reaches every node. And Ray, when a node is about to be taken away: Ray
Train tells every worker. A stage asks `heard` between its steps; where it runs without Ray nobody tells it anything.
"""

import functools
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from training.run import Run

NOTHING, PREEMPTED, STOP = range(3)  # the greater one counts, where workers have heard different things
_EVERY = 1.0  # seconds between two looks into the store
_NAMESPACE = "chatforge"


@contextmanager
def stopped_by_sigterm(run: Run) -> Iterator[threading.Event]:
    """Inside, SIGTERM asks the stage's workers to leave after a checkpoint; a second one ends this process at once.

    Yields what is set once it was asked: a stage in its last step makes no checkpoint any more, and ends instead.
    """
    asked, over = threading.Event(), threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.getsignal(signal.SIGTERM)

    def on_terminate(*_: object) -> None:
        if asked.is_set():
            raise SystemExit(128 + signal.SIGTERM)
        asked.set()

    def tell() -> None:  # not from the handler, which may have interrupted Ray in mid-call
        while not asked.wait(0.2):
            if over.is_set():
                return
        print(f"{run.stage}: stops after a checkpoint; once more to stop now", flush=True)
        _store()._internal_kv_put(_key(run), b"stop", namespace=_NAMESPACE)

    _store()._internal_kv_del(_key(run), namespace=_NAMESPACE)
    signal.signal(signal.SIGTERM, on_terminate)
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield asked
    finally:
        over.set()
        teller.join()
        signal.signal(signal.SIGTERM, before)


def heard(run: Run) -> int:
    """NOTHING, PREEMPTED or STOP, as far as this worker knows; rank 0 alone looks into the store."""
    if "ray" not in sys.modules or not sys.modules["ray"].is_initialized():
        return NOTHING
    if run.rank == 0 and _stop_is_asked(_key(run), int(time.monotonic() / _EVERY)):
        return STOP
    return PREEMPTED if _preempted() else NOTHING


@functools.lru_cache(maxsize=1)
def _stop_is_asked(key: str, moment: int) -> bool:
    """Cached, so that the store is asked once in `moment` and not at every step."""
    return _store()._internal_kv_exists(key, namespace=_NAMESPACE)


def _preempted() -> bool:
    """Whether Ray Train has told this worker that a node of its group will go.

    Its public function waits for all workers through an actor, at every call: milliseconds that a step may not have.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    try:
        return get_train_context().preemption_context.preemption_info is not None
    except RuntimeError:  # this process is no worker of Ray Train's
        return False


def _store() -> Any:
    from ray.experimental import internal_kv

    return internal_kv


def _key(run: Run) -> str:
    return f"stop:{run.root}:{run.stage}"
