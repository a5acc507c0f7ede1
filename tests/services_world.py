"""A real server for the tests of services: the `chatforge serve` command, with tiny models, on loopback."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
import yaml

ROOT = Path(__file__).parent.parent
LIMITS = {"max_messages": 4, "max_characters": 200, "context_tokens": 128, "max_new_tokens": 40}
LONG_CONTEXT = 20_000


@dataclass(frozen=True)
class Server:
    """A running `chatforge serve`."""

    address: str
    metrics_port: int
    process: "subprocess.Popen[str]"
    greeting: str  # what it printed until it was ready

    def replicas(self) -> dict[str, psutil.Process]:
        """The process of each application's replica."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        names = {p: re.search(r"ServeReplica:(\w+)", " ".join(p.cmdline())) for p in family}
        return {name[1]: process for process, name in names.items() if name}

    def metrics(self) -> str:
        """The page that Prometheus reads; empty while nobody answers there."""
        with suppress(OSError):
            return urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=5).read().decode()
        return ""


@contextmanager
def serving(folder: Path, config: dict[str, Any]) -> Iterator[Server]:
    """A server whose working folder is `folder`; whatever happens, all of its processes are gone afterwards."""
    (folder / "server.yaml").write_text(yaml.safe_dump(config), "utf-8")
    process = start_command(["serve", "server.yaml"], folder)
    family: list[psutil.Process] = []
    try:
        greeting = _until_ready(process, len(config.keys() & {"chat", "translation", "image"}))
        family = psutil.Process(process.pid).children(recursive=True)
        yield Server(f"127.0.0.1:{config['port']}", config["metrics_port"], process, greeting)
    finally:
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        for survivor in psutil.wait_procs(family, timeout=10)[1]:
            survivor.kill()


def start_command(arguments: list[str], folder: Path) -> "subprocess.Popen[str]":
    """`chatforge ARGUMENTS` in `folder`."""
    return subprocess.Popen(
        [sys.executable, "-m", "services.cli", *arguments],
        cwd=folder, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run_command(
    arguments: list[str], folder: Path, stdin: str = "", timeout: float = 60
) -> "subprocess.CompletedProcess[str]":
    process = start_command(arguments, folder)
    out, err = process.communicate(stdin, timeout=timeout)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "proto"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "TERM": "dumb", "COLUMNS": "200"}


def that_never_ends(model: Path, out: Path) -> Path:
    """A copy of a Llama folder whose answers end by their length alone, and whose positions go on.

    Rotary embeddings have no weights, so the config alone says how far they go.
    """
    shutil.copytree(model, out)
    for name, change in (("config", {"max_position_embeddings": LONG_CONTEXT}), ("generation_config", {})):
        file = out / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | change | {"eos_token_id": 1 << 30}), "utf-8")
    return out


def eventually(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Waits until `condition()` holds; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def _until_ready(process: "subprocess.Popen[str]", services: int) -> str:
    """What it prints up to the last of its hints, one a service, at how to reach it."""
    assert process.stdout and process.stderr
    lines = []
    for line in process.stdout:
        lines.append(line)
        if sum("--server" in line for line in lines) == services:
            return "".join(lines)
    raise AssertionError("".join(lines) + process.stderr.read())
