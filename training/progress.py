"""How a stage's progress looks: a bar with rate and ETA on a terminal, plain lines in a log."""

import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any, Self

from training import mirror
from training.run import Run
from training.store import StoreError

HEADLINE = (
    "loss",
    "val_chrf",
    "reward",
    "kl",
    "tokens_per_second",
    "episodes_per_second",
)  # what a bar of 80 columns has room for
LINE_EVERY = 15.0  # seconds between two lines where there is no terminal


class Progress:
    """Follows a stage's metrics.jsonl while the stage runs in other processes."""

    def __init__(self, run: Run, done: threading.Event) -> None:
        self._run = run
        self._done = done
        self._started = time.time()
        self._elsewhere: list[dict[str, Any]] = []
        self._look_again = 0.0
        self._thread = threading.Thread(target=self._terminal if sys.stdout.isatty() else self._lines, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _terminal(self) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bar

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:>9}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[metrics]}"),
        )
        with Bar(*columns, refresh_per_second=4) as bar:
            task = bar.add_task(self._run.stage, total=None, metrics="starting workers")
            while not self._done.wait(0.5):
                self._advance(bar, task)
            self._advance(bar, task)

    def _advance(self, bar: Any, task: Any) -> None:
        latest = self._latest()
        if latest:
            shown = {name: latest[name] for name in HEADLINE if name in latest}
            bar.update(task, completed=latest["step"], total=latest["total"], metrics=_metrics(shown))

    def _lines(self) -> None:
        shown = None
        while True:
            finished = self._done.wait(LINE_EVERY)
            latest = self._latest()
            if latest and latest["step"] != shown:
                shown = latest["step"]
                print(
                    f"{self._run.stage:>9}  {shown}/{latest['total']}  {self._left(latest)}{_metrics(latest)}",
                    flush=True,
                )
            if finished:
                return

    def _left(self, latest: dict[str, Any]) -> str:
        lines = self._fresh()
        if len(lines) < 2 or latest["step"] >= latest["total"]:
            return ""
        taken = latest["step"] - lines[0]["step"]
        seconds = (latest["time"] - lines[0]["time"]) / max(taken, 1) * (latest["total"] - latest["step"])
        return f"{timedelta(seconds=round(seconds))} left  "

    def _fresh(self) -> list[dict[str, Any]]:
        """The lines since the stage was started, from this disk or, where they are newer, from the run's store."""
        lines = max(self._run.metrics(), self._stored(), key=lambda lines: lines[-1]["time"] if lines else 0.0)
        return [line for line in lines if line["time"] >= self._started]

    def _stored(self) -> list[dict[str, Any]]:
        if self._run.store and time.monotonic() >= self._look_again:
            self._look_again = time.monotonic() + mirror.FILES_EVERY
            with suppress(StoreError):  # a bar can wait; the workers will say it
                self._elsewhere = mirror.stored_metrics(self._run)
        return self._elsewhere

    def _latest(self) -> dict[str, Any] | None:
        """The last value of every metric since the stage was started, with the last line's step."""
        merged: dict[str, Any] = {}
        for line in self._fresh():
            merged.update(line)
        return merged or None


def _metrics(latest: dict[str, Any]) -> str:
    named = ((k.replace("tokens_per_second", "tok/s").replace("_per_second", "/s"), v) for k, v in latest.items())
    return "  ".join(f"{k} {_short(v)}" for k, v in named if k not in ("step", "total", "time"))


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
