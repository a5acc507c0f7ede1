"""Several Ray nodes on one machine: each in a network namespace with an address of its own where the machine allows
it, else as plain processes that share loopback."""

import itertools
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from services.app import free_port

ROOT = Path(__file__).parents[1]
NETNS = Path("/etc/netns")  # what `ip netns exec` puts in the place of files in /etc
GCS_PORT, DASHBOARD_PORT = 6379, 8265
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",  # a dead node is noticed within seconds
    "RAY_health_check_failure_threshold": "5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "OMP_NUM_THREADS": "1",
}


@dataclass
class Node:
    ip: str
    namespace: str | None
    process: "subprocess.Popen[bytes]"

    def family(self) -> list[psutil.Process]:
        """Every process of this node."""
        if self.namespace:
            out = _ip("netns", "pids", self.namespace)
            return [psutil.Process(int(pid)) for pid in out.split() if psutil.pid_exists(int(pid))]
        with suppress(psutil.Error):
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        return []


@dataclass
class Cluster:
    """Running nodes; the first is the head."""

    scratch: Path
    dashboard: str
    token: str
    nodes: list[Node] = field(default_factory=list)
    subnet: str | None = None  # "10.77.3" where nodes have namespaces
    disk: Path | None = None  # a folder that each node has for itself alone

    @property
    def address(self) -> str:
        """Of the head's control service: what RAY_ADDRESS takes."""
        return f"{self.nodes[0].ip}:{GCS_PORT if self.subnet else self._port}"

    @property
    def env(self) -> dict[str, str]:
        """What a driver needs in its environment; to be started with `command(i)` before it."""
        path = f"{ROOT}:{ROOT / 'proto'}"
        return {**_clean(), **_ENVIRONMENT, **self._auth, "RAY_ADDRESS": self.address, "PYTHONPATH": path}

    @property
    def _auth(self) -> dict[str, str]:
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def node_ip(self, index: int) -> str:
        return self.nodes[index].ip

    def command(self, index: int) -> list[str]:
        """Words to put before a command so that it runs on node `index`."""
        return self._enter(self.nodes[index].namespace, index)

    def _enter(self, namespace: str | None, index: int) -> list[str]:
        enter = ["ip", "netns", "exec", namespace] if namespace else []
        if self.disk:
            own = self.scratch / f"disk-{index}"
            own.mkdir(exist_ok=True)
            mount = 'mount --bind "$0" "$1"; shift; exec "$@"'  # seen by this command and what it starts
            enter += ["sh", "-ec", mount, str(own), str(self.disk)]
        return enter

    def add(self, cpus: int = 1) -> int:
        """Join one more node; returns its index when the head has seen it."""
        self.nodes.append(self._start(len(self.nodes), cpus))
        self._wait(self.nodes[-1])
        return len(self.nodes) - 1

    def kill(self, index: int) -> None:
        """SIGKILL to every process of a node at once."""
        node = self.nodes[index]
        family = node.family()
        for process in family:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(family, timeout=20)
        node.process.wait(20)

    def drain(self, index: int) -> None:
        """Tell Ray that a node will go, as a cloud's notice of preemption does."""
        told = self._ask(
            "from ray.core.generated.autoscaler_pb2 import DrainNodeReason\n"
            "(node,) = [n for n in nodes if n.node_manager_address == sys.argv[2] and not n.state]\n"
            "reason = DrainNodeReason.Value('DRAIN_NODE_REASON_PREEMPTION')\n"
            "done, why = gcs.drain_node(node.node_id.hex(), reason, 'a test', int((time.time() + 600) * 1000))\n"
            "assert done, why\n",
            self.node_ip(index),
        )
        assert told.returncode == 0, told.stderr

    def restart_head(self, cpus: int = 1) -> None:
        """Kill the head and start it anew at the same address: it remembers nothing."""
        self.kill(0)
        self._rename_session()
        self.nodes[0] = self._start(0, cpus)
        self._wait(self.nodes[0])

    def _rename_session(self) -> None:
        with suppress(OSError):
            (self.scratch / "session_latest").unlink()

    def _start(self, index: int, cpus: int) -> Node:
        namespace, ip = self._place(index)
        settings = {"node-ip-address": ip, "num-cpus": cpus, "object-store-memory": 100_000_000}
        if index == 0:
            settings |= {"port": GCS_PORT if self.subnet else self._port, "temp-dir": self.scratch}
            settings |= {"include-dashboard": "true" if self.dashboard else "false", "dashboard-host": ip}
            settings |= {"dashboard-port": self.dashboard.rpartition(":")[2] or DASHBOARD_PORT}
            settings |= {"ray-client-server-port": free_port()}
        else:
            settings |= {"address": self.address}
        if not self.subnet:
            settings |= {"dashboard-agent-listen-port": free_port()}
        words = [f"--{key}={value}" for key, value in settings.items()]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *words]
        enter = self._enter(namespace, index)
        path = f"{ROOT}:{ROOT / 'proto'}"
        environment = {**_clean(), **_ENVIRONMENT, **self._auth, "PYTHONPATH": path}
        log = (self.scratch / f"node-{index}.log").open("ab")
        head = ["--head"] if index == 0 else []
        return Node(
            ip,
            namespace,
            subprocess.Popen([*enter, *command, *head], env=environment, stdout=log, stderr=log, cwd=self.scratch),
        )

    def _place(self, index: int) -> tuple[str | None, str]:
        """The namespace and address of a node, made where they are not there yet."""
        if not self.subnet:
            return None, "127.0.0.1"
        namespace, ip = f"{self._name}-{index}", f"{self.subnet}.{index + 2}"
        if namespace not in _ip("netns", "list").split():
            outside, inside = f"{self._name}v{index}", "eth0"
            (NETNS / namespace).mkdir(parents=True, exist_ok=True)
            # torch asks for the name of every address; a name server that cannot be reached costs it ten seconds.
            (NETNS / namespace / "resolv.conf").write_text("nameserver 127.0.0.1\n")
            _ip("netns", "add", namespace)
            _ip("link", "add", outside, "type", "veth", "peer", "name", inside, "netns", namespace)
            _ip("link", "set", outside, "master", self._name)
            _ip("link", "set", outside, "up")
            _ip("-n", namespace, "link", "set", "lo", "up")
            _ip("-n", namespace, "address", "add", f"{ip}/24", "dev", inside)
            _ip("-n", namespace, "link", "set", inside, "up")
            _ip("-n", namespace, "route", "add", "default", "via", f"{self.subnet}.1")
        return namespace, ip

    @property
    def _name(self) -> str:
        assert self.subnet
        return f"cf{self.subnet.rpartition('.')[2]}"

    @property
    def _port(self) -> int:
        return int((self.scratch / "port").read_text())

    def _wait(self, new: Node) -> None:
        """Until the head knows `new`; it counts nodes where they have one address, as they do without namespaces."""
        deadline, said = time.monotonic() + 120, ""
        while time.monotonic() < deadline:
            assert new.process.poll() is None, self._log()
            asked = self._ask("print(*(n.node_manager_address for n in nodes if not n.state))")
            said = asked.stdout + asked.stderr
            there = [node for node in self.nodes if node.ip == new.ip and node.process.poll() is None]
            if asked.returncode == 0 and asked.stdout.split().count(new.ip) >= len(there):
                return
            time.sleep(0.3)
        raise AssertionError(f"{new.ip} never came up: {said[-1000:]} {self._log()}")

    def _ask(self, code: str, *words: str) -> "subprocess.CompletedProcess[str]":
        """What a program says that has `gcs`, a client of the head's control service, and `nodes`: no driver starts."""
        client = "gcs = ray._raylet.GcsClient(address=sys.argv[1])\nnodes = gcs.get_all_node_info().values()\n"
        code = f"import ray, sys, time\n{client}{code}"
        command = [*self.command(0), sys.executable, "-c", code, self.address, *words]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, check=False)

    def _log(self) -> str:
        return "\n".join(path.read_text()[-2000:] for path in sorted(self.scratch.glob("node-*.log")))

    def close(self) -> None:
        for index in reversed(range(len(self.nodes))):
            self.kill(index)
        for node in self.nodes:
            if node.namespace:
                _ip("netns", "delete", node.namespace)
                shutil.rmtree(NETNS / node.namespace)
        if self.subnet:
            _ip("link", "delete", self._name)
            with suppress(OSError):  # others are there
                NETNS.rmdir()


@contextmanager
def cluster(nodes: int = 2, cpus: int = 1, dashboard: bool = False, disk: Path | None = None) -> Iterator[Cluster]:
    """`nodes` Ray nodes with `cpus` each; afterwards no process, namespace or file of theirs is left.

    With `disk`, what they write below that folder each sees alone: needs namespaces.
    """
    scratch = Path(tempfile.mkdtemp(prefix="cf"))  # Ray's sockets live there: the path must stay short
    (scratch / "port").write_text(str(free_port()))
    subnet = _bridge()
    made = Cluster(scratch, "", secrets.token_hex(16), subnet=subnet, disk=disk)
    if dashboard:
        made.dashboard = f"http://{subnet}.2:{DASHBOARD_PORT}" if subnet else f"http://127.0.0.1:{free_port()}"
    try:
        for _ in range(nodes):
            made.add(cpus)
        yield made
    finally:
        made.close()
        shutil.rmtree(scratch, ignore_errors=True)


def can_have_namespaces() -> bool:
    """Whether nodes get addresses of their own here."""
    if os.geteuid() or not shutil.which("ip"):
        return False
    name = f"cfprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    return made and subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False).returncode == 0


def _bridge() -> str | None:
    """A bridge on a subnet that nobody uses, its address ending in .1; None where the machine does not allow it."""
    if not can_have_namespaces():
        return None
    taken = set(re.findall(r"10\.77\.(\d+)\.", _ip("-4", "address")))
    number = next(str(n) for n in itertools.count(os.getpid() % 200 + 1) if str(n) not in taken)
    name = f"cf{number}"
    try:
        _ip("link", "add", name, "type", "bridge")
    except RuntimeError:
        return None
    _ip("address", "add", f"10.77.{number}.1/24", "dev", name)
    _ip("link", "set", name, "up")
    return f"10.77.{number}"


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def _clean() -> dict[str, str]:
    """Our environment without what an outer Ray or launcher has set."""
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k not in ("RANK", "WORLD_SIZE")}
