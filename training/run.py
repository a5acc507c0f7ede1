"""The run folder: what a stage reads, writes and can go on from.

    runs/NAME/run.json                       the resolved recipe
    runs/NAME/STAGE/manifest.json            inputs, parents, config, versions, metrics; written last: done
    runs/NAME/STAGE/metrics.jsonl            one line a logged step
    runs/NAME/STAGE/checkpoints/step-000100  complete or absent
    runs/NAME/STAGE/model                    complete or absent

Everything that is read later is written to a temporary name, flushed, then renamed: a kill at any instant leaves the
last good state. Imports no torch.
"""

import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


class StageError(ValueError):
    """A stage that cannot succeed, whatever is retried: wrong data, or a gate that its result did not pass."""


class StageCrashed(RuntimeError):
    """A stage whose workers died too often, or that lost Ray under it; the same command goes on."""


class StageInterrupted(RuntimeError):
    """A stage that was told to leave and has lost nothing; `stopped` by its user, or else to be started again."""

    def __init__(self, stopped: bool) -> None:
        super().__init__(f"{'stopped' if stopped else 'told to start again'}; the same command goes on")
        self.stopped = stopped


NOTES = "notes.txt"  # in a stage's folder: what whoever started it should know


@dataclass(frozen=True)
class Run:
    """One stage inside one run, as every worker of the stage sees it."""

    root: Path
    stage: str
    seed: int = 1
    workers: int = 1
    device: str = "cpu"  # resolved: cpu or cuda
    val_fraction: float = 0.05
    store: str | None = None  # the URI that `root` mirrors (mirror.py)

    @property
    def folder(self) -> Path:
        return self.root / self.stage

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def rank(self) -> int:
        return int(os.environ.get("RANK", "0"))

    def of(self, stage: str) -> "Run":
        """The same run seen from another stage, to read what that one left."""
        return replace(self, stage=stage)

    def log(self, step: int, total: int, **metrics: float) -> None:
        """One line of metrics.jsonl and one TensorBoard step; rank 0 alone writes.

        `total` is the number of steps the stage will take; the driver's progress bar reads both.
        """
        if self.rank:
            return
        line = {"step": step, "total": total, "time": time.time(), **metrics}
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        writer = _tensorboard(self.folder / "tensorboard")
        for name, value in metrics.items():
            writer.add_scalar(f"{self.stage}/{name}", value, step)
        writer.flush()

    def note(self, text: str) -> None:
        """Something that whoever started the stage should know: told when it is done, and in the report.

        Rank 0 alone keeps it; the same one again is kept once.
        """
        print(text, flush=True)
        line = " ".join(text.split())
        if not self.rank and line not in self.notes():
            with (self.folder / NOTES).open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")

    def notes(self) -> list[str]:
        path = self.folder / NOTES
        return path.read_text("utf-8").splitlines() if path.exists() else []

    def metrics(self) -> list[dict[str, Any]]:
        return read_jsonl(self._metrics)

    def final_metrics(self) -> dict[str, float]:
        """The last value of every metric."""
        lines = self.metrics()
        return {k: v for line in lines for k, v in line.items() if k not in ("step", "total", "time")}

    def rewind(self, step: int) -> None:
        """Forget the metrics after `step`: the steps that a resumed stage is about to take again."""
        if self.rank or not self._metrics.exists():
            return
        kept = [line for line in self.metrics() if line["step"] <= step]
        write_atomic(self._metrics, "".join(json.dumps(line) + "\n" for line in kept))

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """Step and folder of the newest complete checkpoint."""
        found = sorted(p for p in self.checkpoints.glob("step-*") if p.suffix != ".tmp")
        return (int(found[-1].name.removeprefix("step-")), found[-1]) if found else None

    def checkpoint_path(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    @property
    def _metrics(self) -> Path:
        return self.folder / "metrics.jsonl"


@functools.cache
def _tensorboard(folder: Path) -> Any:
    """One event file for as long as the process lives."""
    from torch.utils.tensorboard.writer import SummaryWriter

    return SummaryWriter(str(folder))


def write_atomic(path: Path, content: str | bytes) -> None:
    """The old content or the new one, never a part."""
    with file_atomic(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def file_atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path; the file there, flushed, takes `path`'s place when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    yield temporary
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def folder_atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that takes `path`'s place when the block ends without an error."""
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    commit_folder(temporary, path)


def commit_folder(temporary: Path, path: Path) -> None:
    """Flush what `temporary` holds, then let it take `path`'s place."""
    for file in temporary.rglob("*"):
        if file.is_file():
            file.chmod(0o644)  # safetensors makes files that no other user can read
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    if path.exists():
        old = path.with_name(path.name + ".old.tmp")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.rename(path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every complete line; a last line that a kill cut short is left out."""
    return parse_jsonl(path.read_text("utf-8")) if path.exists() else []


def parse_jsonl(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.split("\n")[:-1]]  # what follows the last newline is not whole


def save_model(run: Run, write: Callable[[Path], None], kind: str, **about: Any) -> None:
    """The stage's model folder: `write` fills it, `chatforge.json` says what it is and which run made it."""
    with folder_atomic(run.model) as folder:
        write(folder)
        card = {"kind": kind, "run": run.root.name, "stage": run.stage, **about}
        (folder / "chatforge.json").write_text(json.dumps(card, indent=2) + "\n", "utf-8")
