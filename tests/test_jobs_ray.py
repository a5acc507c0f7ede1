"""Jobs on a real Ray head: followed over a connection that is cut, stopped, killed, submitted again, refused."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nodes
import psutil
import pytest
import yaml
from services_world import eventually, run_command, start_command

from training.run import Run

WAIT = 400  # seconds for one thing to happen, on a busy machine
STEPS = 1500
pytestmark = pytest.mark.timeout(4 * WAIT)


class Proxy:
    """A loopback port that leads to an address, until it is cut."""

    def __init__(self, host: str, port: int) -> None:
        self._to = (host, port)
        self._open: list[socket.socket] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._serve()

    def cut(self) -> None:
        """Ends every connection and takes no new one."""
        for end in (self._listening, *self._open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._open.clear()

    def mend(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", self.port))
        self._serve()

    def _serve(self) -> None:
        threading.Thread(target=self._accept, args=(self._listening,), daemon=True).start()

    def _accept(self, listening: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, far = listening.accept()[0], socket.create_connection(self._to)
                self._open += [near, far]
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=ends, daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def head() -> Iterator[nodes.Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        # As in an image: what a job's `python` is, PATH says.
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        with nodes.cluster(nodes=1, cpus=2, dashboard=True) as cluster:
            patch.setenv("RAY_AUTH_TOKEN", cluster.token)
            patch.setenv("RAY_API_SERVER_ADDRESS", cluster.dashboard)
            eventually(lambda: run_command(["jobs"], cluster.scratch).returncode == 0, WAIT)
            yield cluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_world: Any) -> Path:
    """What somebody submits from: a recipe, and data beside it that only the upload can bring to the job."""
    folder = tmp_path_factory.mktemp("submitted")
    (folder / "data").mkdir()
    (folder / "data" / "corpus.txt").write_bytes(tiny_world.corpus.read_bytes())
    text = ["data/corpus.txt"]
    size = {"num_layers": 2, "num_heads": 2, "hidden_size": 32, "seq_len": 128, "batch_size": 8, "dtype": "fp32"}
    pretrain = {"text": text, "tokens": 8 * 128 * STEPS, "checkpoint_every": 25, "eval_every": STEPS, **size}
    recipe = {"name": "nano", "val_fraction": 0.2, "tokenizer": {"text": text, "vocab_size": 512}, "pretrain": pretrain}
    (folder / "nano.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    return folder


def submit(folder: Path, *more: str) -> list[str]:
    return ["submit", "nano.yaml", "--runs", str(folder / "shared"), *more]


def wait_for_step(folder: Path, step: int, client: "subprocess.Popen[str]") -> None:
    def taken() -> bool:
        assert client.poll() is None, client.communicate()
        return any(line["step"] >= step for line in Run(folder / "shared" / "nano", "pretrain").metrics())

    eventually(taken, WAIT)


def last_step(folder: Path) -> int:
    return Run(folder / "shared" / "nano", "pretrain").metrics()[-1]["step"]


def drivers(folder: Path) -> list[psutil.Process]:
    """Of this file's jobs: other tests train recipes of that name too."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            ours = process.environ().get("CHATFORGE_RUNS") == str(folder / "shared")
            if ours and "train nano.yaml" in " ".join(process.cmdline()):
                found.append(process)
    return found


@dataclass(frozen=True)
class Told:
    """What the commands of the first job said."""

    client: "subprocess.CompletedProcess[str]"
    again: "subprocess.CompletedProcess[str]"
    listed: "subprocess.CompletedProcess[str]"
    follower: "subprocess.CompletedProcess[str]"
    stopped: "subprocess.CompletedProcess[str]"
    log: "subprocess.CompletedProcess[str]"


@pytest.fixture(scope="module")
def told(head: nodes.Cluster, folder: Path) -> Told:
    """One job: followed over a connection that is cut, followed by others, stopped."""
    proxy = Proxy(head.node_ip(0), int(head.dashboard.rpartition(":")[2]))
    client = start_command(submit(folder, "--address", f"127.0.0.1:{proxy.port}"), folder)
    wait_for_step(folder, 10, client)
    proxy.cut()
    time.sleep(3)
    proxy.mend()
    again = run_command(submit(folder, "--detach"), folder)
    listed = run_command(["jobs"], folder)
    follower = start_command(["logs", "nano", "--follow"], folder)
    assert follower.stdout and "Runtime env" in follower.stdout.readline()
    follower.send_signal(signal.SIGINT)
    out, err = follower.communicate(timeout=WAIT)
    left = subprocess.CompletedProcess([], follower.returncode, out, err)
    stopped = run_command(["stop", "nano"], folder, timeout=WAIT)
    out, err = client.communicate(timeout=WAIT)
    followed = subprocess.CompletedProcess([], client.returncode, out, err)
    return Told(followed, again, listed, left, stopped, run_command(["logs", "nano-000001"], folder))


def test_what_is_sent_is_said(told: Told) -> None:
    assert told.client.stderr.startswith("job nano-000001: ") and " to send)\n" in told.client.stderr


def test_every_line_comes_once_over_a_connection_that_is_cut(told: Told) -> None:
    assert told.log.stdout == told.client.stdout and "pretrain: starts on 1 × cpu" in told.log.stdout
    assert "; trying again\n" in told.client.stderr and "\nconnected again after " in told.client.stderr


def test_the_same_command_finds_the_job_that_runs(told: Told) -> None:
    assert told.again.stdout == "nano-000001\n"
    assert told.again.stderr == "run nano: job nano-000001 is RUNNING already; nothing is submitted\n"
    assert told.listed.stdout.splitlines()[1].split()[:4] == ["nano-000001", "nano", "nano.yaml", "running"]


def test_ctrl_c_leaves_the_job_running(told: Told) -> None:
    assert told.follower.returncode == 130
    assert "job nano-000001 goes on; follow it: chatforge logs nano-000001 --follow" in told.follower.stderr


def test_a_stop_is_clean_and_told_to_everybody(told: Told, folder: Path) -> None:
    assert told.stopped.returncode == 0
    assert told.stopped.stdout.endswith(" s; submitted again, the run goes on\n")
    assert told.client.returncode == 143
    assert told.client.stderr.endswith("error: job nano-000001 was stopped; submitted again, the run goes on\n")
    latest = Run(folder / "shared" / "nano", "pretrain").latest_checkpoint()
    assert latest and latest[0] < STEPS and not drivers(folder)


def test_the_same_command_goes_on_when_its_driver_dies_and_when_the_head_does(
    told: Told, head: nodes.Cluster, folder: Path
) -> None:
    """A head that starts anew knows of no job: the run is submitted to it as its first."""
    client = start_command(submit(folder, "--retries", "2"), folder)
    wait_for_step(folder, last_step(folder) + 5, client)
    killed = drivers(folder)
    assert killed
    for driver in killed:
        driver.kill()
    eventually(lambda: set(drivers(folder)) - set(killed), WAIT)
    wait_for_step(folder, last_step(folder) + 5, client)
    head.restart_head(cpus=2)
    out, err = client.communicate(timeout=2 * WAIT)
    assert client.returncode == 0, out + err
    assert out.count("pretrain: goes on from step ") == 3 and "tokenizer: starts" not in out
    assert "job nano-000002 failed: its driver was killed by signal 9; retry 1 of 2" in err
    assert "job nano-000003 failed: the cluster does not know it; was its head restarted?; retry 2 of 2" in err
    assert err.endswith("job nano-000001 is done\n")
    steps = [line["step"] for line in Run(folder / "shared" / "nano", "pretrain").metrics()]
    assert steps == sorted(steps) and steps[-1] == STEPS


def test_a_users_mistake_is_not_tried_again(head: nodes.Cluster, folder: Path) -> None:
    mistaken = submit(folder, "--run", "wrong", "--set", "pretrain.text=[/nowhere/a.txt]", "--retries", "3")
    told = run_command(mistaken, folder, timeout=WAIT)
    assert told.returncode == 2 and "retry" not in told.stderr
    assert "error: job wrong-000001 failed with exit code 2: /nowhere/a.txt: matches no file" in told.stderr


def test_ports_and_tokens_that_are_wrong_are_named(
    head: nodes.Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = run_command(["jobs", "--address", head.address], folder)
    assert told.returncode != 0 and "is not a Ray dashboard" in told.stderr and told.stderr.count("\n") == 1
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 32)
    told = run_command(["jobs"], folder)
    assert told.returncode == 2 and "the cluster does not take this token" in told.stderr
