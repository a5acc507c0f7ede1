"""What a running stage is told from outside: to make a checkpoint and leave, and why.

Two can ask for it. The driver, when it gets SIGTERM (`chatforge stop`, a pod that is evicted) or sees room for more
workers: it tells them through Ray's key-value store, which reaches every node. And Ray, when a node is about to be
taken away: Ray Train tells every worker. A stage asks `heard` between its steps; where it runs without Ray nobody tells
it anything.
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

NOTHING, START_AGAIN, STOP = range(3)  # the greater one counts, where workers have heard different things
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
        _store()._internal_kv_put(_key("stop", run), b"", namespace=_NAMESPACE)

    _store()._internal_kv_del(_key("stop", run), namespace=_NAMESPACE)
    signal.signal(signal.SIGTERM, on_terminate)
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield asked
    finally:
        over.set()
        teller.join()
        signal.signal(signal.SIGTERM, before)


def ask_to_start_again(run: Run) -> None:
    """The stage's workers leave after a checkpoint, to be started anew."""
    _store()._internal_kv_put(_key("again", run), b"", namespace=_NAMESPACE)


def forget_to_start_again(run: Run) -> None:
    """Before workers start: what was asked of those before them."""
    _store()._internal_kv_del(_key("again", run), namespace=_NAMESPACE)


def heard(run: Run) -> int:
    """NOTHING, START_AGAIN or STOP, as far as this worker knows; rank 0 alone looks into the store."""
    if "ray" not in sys.modules or not sys.modules["ray"].is_initialized():
        return NOTHING
    if run.rank == 0:
        moment = int(time.monotonic() / _EVERY)
        for what, notice in (("stop", STOP), ("again", START_AGAIN)):
            if _is_asked(_key(what, run), moment):
                return notice
    return START_AGAIN if _preempted() else NOTHING


@functools.lru_cache(maxsize=2)
def _is_asked(key: str, moment: int) -> bool:
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


def _key(what: str, run: Run) -> str:
    return f"{what}:{run.root}:{run.stage}"
