"""Chat on two Ray nodes, deployed as on any cluster: one node is killed under load, and the other goes on alone.

The same document on one machine, where it also grows under load.
"""

import copy
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from nodes import Cluster, can_have_namespaces, cluster
from services_world import LIMITS, eventually, start_command, that_never_ends

from services.app import free_port
from services.client import CallError, Client
from services.serve_config import servicer_functions

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not os.environ.get("SERVE_CLUSTER"), reason="takes long; SERVE_CLUSTER=1 runs it"),
]

LONG, LONGEST = 3000, 10_000  # tokens: many seconds of work
START_S = 240  # until two nodes serve, on a small machine


@pytest.fixture(scope="module")
def document(tiny_world: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """With one CPU a replica, on nodes of one CPU each, every node has a replica and a proxy of its own."""
    long = that_never_ends(tiny_world.llama, tmp_path_factory.mktemp("cluster") / "long")
    held = {
        "tiny": {"model": str(tiny_world.llama), **LIMITS},
        "long": {"model": str(long), "context_tokens": LONGEST + 1000, "max_new_tokens": LONGEST},
    }
    apps = {"models": {"services": {"chat": sorted(held)}}, "chat": {"models": held, "replicas": 2, "cpus": 1}}
    return {
        "proxy_location": "EveryNode",
        "grpc_options": {"grpc_servicer_functions": servicer_functions(["chat"]), "request_timeout_s": 300},
        "logging_config": {"enable_access_log": False},
        "applications": [
            {"name": name, "route_prefix": f"/{name}", "import_path": f"services.app:{name}", "args": args}
            for name, args in apps.items()
        ],
    }


@pytest.fixture(scope="module")
def nodes(document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if not can_have_namespaces():
        pytest.skip("the proxies of two nodes listen on one port: only root with `ip netns` can give each an address")
    with cluster(nodes=2, cpus=1, dashboard=True) as nodes:
        deploy(nodes, document, tmp_path_factory.mktemp("deploy"))
        for index in (0, 1):
            eventually(lambda index=index: serves(nodes, index), START_S)  # type: ignore[misc]
        yield nodes


def deploy(nodes: Cluster, document: dict[str, Any], folder: Path) -> None:
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(document), "utf-8")
    serve(nodes, "deploy", str(file))


def serve(nodes: Cluster, *arguments: str) -> str:
    """What Ray's own `serve` command prints, on the head."""
    command = [*nodes.command(0), str(Path(sys.executable).parent / "serve"), *arguments, "--address", nodes.dashboard]
    told = subprocess.run(command, env=nodes.env, capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stdout + told.stderr
    return told.stdout


def serves(nodes: Cluster, *indexes: int) -> bool:
    """Whether the proxies of these nodes answer, and say that all is well."""
    with Client(address(nodes, *indexes), timeout=5, retries=0) as client, suppress(CallError):
        return client.health() == "SERVING"
    return False


def address(nodes: Cluster, *indexes: int) -> str:
    """As the name of a headless Service would be resolved."""
    return "ipv4:" + ",".join(f"{nodes.node_ip(index)}:9000" for index in indexes)


@dataclass
class Load:
    """A caller that asks without a pause, by unary and by streaming calls; what comes back is counted."""

    client: Client
    over: threading.Event = field(default_factory=threading.Event)
    whole: int = 0
    cut: int = 0  # streams that had begun

    def run(self, expected: str) -> None:
        """Raises what a caller would see of a call that had not begun to answer."""
        while not self.over.is_set():
            reply = self.client.chat("What is tea?", model="tiny", seed=7, max_new_tokens=24)
            assert reply.text == expected
            pieces: list[str] = []
            try:
                pieces.extend(self.client.stream_chat("What is tea?", model="tiny", seed=7, max_new_tokens=24))
            except CallError as error:
                if not pieces or error.code != "UNAVAILABLE":
                    raise
                self.cut += 1
            else:
                assert "".join(pieces) == expected
                self.whole += 1


def test_both_nodes_answer_and_say_the_same(nodes: Cluster) -> None:
    replies = []
    for index in (0, 1):
        with Client(address(nodes, index), timeout=60, retries=0) as client:
            replies.append(client.chat("What is snow?", model="tiny", seed=1, max_new_tokens=12).text)
            assert [m.state for m in client.list_models()] == ["ready"] * 2
    assert replies[0] == replies[1] != ""
    status = yaml.safe_load(serve(nodes, "status"))
    assert status["applications"]["chat"]["deployments"]["ChatService"]["replica_states"] == {"RUNNING": 2}
    assert set(status["proxies"].values()) == {"HEALTHY"} and len(status["proxies"]) == 2


def test_a_folder_that_the_nodes_do_not_have_is_named_in_the_status_and_hurts_nobody_else(
    nodes: Cluster, document: dict[str, Any], tmp_path: Path
) -> None:
    args = {"models": {"de-en": {"model": "/nowhere"}}}
    wrong = {"name": "translation", "route_prefix": "/translation", "import_path": "services.app:translation"}
    deploy(nodes, {**document, "applications": [*document["applications"], {**wrong, "args": args}]}, tmp_path)

    def told() -> Any:
        return yaml.safe_load(serve(nodes, "status"))["applications"]

    eventually(lambda: told()["translation"]["status"] == "DEPLOY_FAILED", START_S)
    (deployment,) = told()["translation"]["deployments"].values()
    assert "model '/nowhere' not found: give a folder with a config.json" in deployment["message"]
    assert serves(nodes, 0, 1) and told()["chat"]["status"] == "RUNNING"
    deploy(nodes, document, tmp_path)
    eventually(lambda: "translation" not in told(), START_S)


def test_a_change_cuts_no_answer(nodes: Cluster, document: dict[str, Any], tmp_path: Path) -> None:
    """A replica that is replaced ends its streams first, while the other takes what is new."""
    changed = copy.deepcopy(document)
    changed["applications"][1]["args"]["models"]["tiny"]["max_messages"] = 3

    def states() -> tuple[str, dict[str, int]]:
        told = yaml.safe_load(serve(nodes, "status"))["applications"]["chat"]
        return told["status"], told["deployments"].get("ChatService", {}).get("replica_states", {})

    with Client(address(nodes, 0, 1), timeout=240, retries=0) as client, ThreadPoolExecutor(8) as callers:
        streams = [client.stream_chat("a", model="long", max_new_tokens=LONGEST) for _ in range(4)]
        for stream in streams:
            next(stream)
        outcomes = [callers.submit(ends, stream) for stream in streams]
        deploy(nodes, changed, tmp_path)
        eventually(lambda: "STOPPING" in states()[1], 120)
        assert not any(outcome.done() for outcome in outcomes), "the change came too late to cut a stream"
        for seed in range(20):
            assert client.chat("What is rain?", model="tiny", seed=seed, max_new_tokens=4).id
        assert [outcome.result() for outcome in outcomes] == [LONGEST] * 4
    eventually(lambda: states() == ("RUNNING", {"RUNNING": 2}), START_S)


def test_a_node_killed_under_load_takes_with_it_only_what_it_had_begun_to_answer(nodes: Cluster) -> None:
    """A proxy prefers the replica of its own node, so it is known which streams a node takes with it."""
    with (
        Client(address(nodes, 0, 1), timeout=120) as client,
        Client(address(nodes, 0), timeout=120) as stays,
        Client(address(nodes, 1), timeout=120) as goes,
        ThreadPoolExecutor(8) as callers,
    ):
        expected = client.chat("What is tea?", model="tiny", seed=7, max_new_tokens=24).text
        loads = [Load(client) for _ in range(4)]
        asking = [callers.submit(load.run, expected) for load in loads]
        try:
            eventually(lambda: all(load.whole > 1 for load in loads), 120)
            asked = (stays, stays, goes, goes)
            streams = [one.stream_chat("a", model="long", max_new_tokens=LONG) for one in asked]
            for stream in streams:
                next(stream)
            nodes.kill(1)
            outcomes = list(callers.map(ends, streams))
            before = [load.whole for load in loads]
            time.sleep(20)  # the head gives a silent node up within these
            eventually(
                lambda: all(call.done() or load.whole > n for call, load, n in zip(asking, loads, before, strict=True)),
                120,
            )
        finally:
            for load in loads:
                load.over.set()
        for call in asking:
            call.result()
    assert outcomes == [LONG, LONG, "UNAVAILABLE", "UNAVAILABLE"]
    assert sum(load.cut for load in loads) <= len(loads)


def ends(stream: Any) -> int | str:
    """How a stream that has begun ends: the tokens of the whole answer, or the error's code."""
    try:
        list(stream)
    except CallError as error:
        return error.code
    return int(stream.reply.completion_tokens)


def test_one_node_is_a_healthy_service(nodes: Cluster) -> None:
    assert serves(nodes, 0)
    with Client(address(nodes, 0, 1), timeout=60, retries=0) as client:  # the lost address is still among them
        assert [m.state for m in client.list_models()] == ["ready"] * 2
        for seed in range(10):
            assert client.chat("What is rain?", model="tiny", seed=seed, max_new_tokens=4).completion_tokens <= 4


def test_a_node_that_joins_takes_the_lost_replica_and_serves(nodes: Cluster) -> None:
    joined = nodes.add(cpus=1)
    eventually(lambda: serves(nodes, joined), START_S)
    with Client(address(nodes, joined), timeout=60, retries=0) as client:
        assert client.chat("What is a book?", model="tiny", seed=1, max_new_tokens=4).text


def test_the_document_serves_on_one_machine_that_has_less_and_grows_under_load(
    document: dict[str, Any], tmp_path: Path
) -> None:
    here = copy.deepcopy(document)
    here["grpc_options"]["port"] = port = free_port()
    chat = here["applications"][1]["args"]
    chat.update(replicas=1, max_replicas=2, cpus=64, threads=1)
    for model in chat["models"].values():
        model["max_num_seqs"] = 1  # two models: a replica is full with two requests
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(here), "utf-8")
    over = threading.Event()

    def ask(client: Client) -> None:
        while not over.is_set():
            client.chat("a", model="long", max_new_tokens=LONG)

    server = start_command(["serve", "serve.yaml"], tmp_path)
    try:
        assert server.stdout and any("--server" in line for line in server.stdout)
        with Client(f"127.0.0.1:{port}", timeout=300) as client, ThreadPoolExecutor(4) as callers:
            assert len(replicas(server.pid)) == 1
            asking = [callers.submit(ask, client) for _ in range(3)]
            try:
                eventually(lambda: len(replicas(server.pid)) == 2, START_S)
            finally:
                over.set()
            for call in asking:
                call.result()
    finally:
        server.terminate()
        server.communicate(timeout=60)
    assert server.returncode == 143


def replicas(server: int) -> list[psutil.Process]:
    """The processes of ChatService below that of `chatforge serve`."""
    family = psutil.Process(server).children(recursive=True)
    return [process for process in family if "ServeReplica:chat" in " ".join(process.cmdline())]
