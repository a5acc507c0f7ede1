"""Where workers can run: what the nodes of a cluster have, against what one worker needs.

Pure functions of what Ray says of its nodes: {"CPU": 8.0, "GPU": 1.0, "memory": bytes}, by address.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from training.config import ConfigError

Nodes = Mapping[str, Mapping[str, float]]


def seconds_from(variable: str, default: float) -> float:
    """What the environment says; raises ConfigError where that is no number."""
    said = os.environ.get(variable) or str(default)
    try:
        return float(said)
    except ValueError:
        raise ConfigError(f"{variable}={said}: is no number of seconds") from None


WAIT = seconds_from("CHATFORGE_PLACEMENT_TIMEOUT_S", 60.0)  # for nodes that an autoscaler may be starting


@dataclass(frozen=True)
class Need:
    """What one worker takes of its node."""

    cpus: int = 1
    gpus: int = 0
    memory: int = 0  # bytes of main memory; 0 where it is not known
    engines: int = 0  # rollout engines beside it, each of which takes as much again

    @property
    def parts(self) -> int:
        """What is placed for one worker, each part wherever it fits."""
        return 1 + self.engines

    @property
    def resources(self) -> dict[str, float]:
        """As Ray names them."""
        named = {"CPU": float(self.cpus), "GPU": float(self.gpus), "memory": float(self.memory)}
        return {name: amount for name, amount in named.items() if amount}

    def __str__(self) -> str:
        parts = [f"{self.gpus} GPU"] if self.gpus else []
        parts += [f"{self.cpus} CPU"]
        parts += [f"{self.memory / 2**30:.1f} GiB of memory"] if self.memory else []
        beside = f" with {self.engines} rollout engine{'s' * (self.engines > 1)} of as much beside each"
        return ", ".join(parts) + (beside if self.engines else "")


def capacity(nodes: Nodes, need: Need) -> int:
    """How many workers the nodes hold together; one cannot be spread over two, but its engines may be elsewhere."""
    return sum(_fits(node, need) for node in nodes.values()) // need.parts


def with_all_cpus(nodes: Nodes, workers: int, need: Need) -> Need:
    """The same need with as many CPUs for each of `workers` as the nodes have: threads that would else be idle."""
    most = int(max((node.get("CPU", 0.0) for node in nodes.values()), default=1))
    for cpus in range(most, need.cpus, -1):
        more = replace(need, cpus=cpus)
        if capacity(nodes, more) >= workers:
            return more
    return need


def most_workers(nodes: Nodes, counts: Sequence[int], need: Need) -> int | None:
    """The greatest of `counts` that the nodes hold; None where they hold none of them."""
    held = capacity(nodes, need)
    return max((count for count in counts if count <= held), default=None)


def shortage(stage: str, nodes: Nodes, counts: Sequence[int], need: Need) -> str:
    """In words: what is asked, what there is, and how much of what is missing."""
    least = min(counts)
    missing = ", ".join(f"{amount:g} more {name}" for name, amount in _missing(nodes, least, need).items())
    has = "; ".join(f"{address}: {_listed(node)}" for address, node in nodes.items()) or "no living node"
    return (
        f"{stage}: needs {least} worker{'s' * (least > 1)} of {need}; the cluster holds {capacity(nodes, need)} "
        f"({has}). Missing: {missing or 'nodes that are large enough for one worker'}; "
        f"add nodes, or give fewer workers{' or ppo.rollout_engines' if need.engines else ''}"
    )


def _fits(node: Mapping[str, float], need: Need) -> int:
    return min(int(node.get(name, 0.0) // amount) for name, amount in need.resources.items())


def _missing(nodes: Nodes, workers: int, need: Need) -> dict[str, float]:
    """Over all nodes; what is there in parts too small for a worker is not told apart here."""
    units = {"CPU": 1.0, "GPU": 1.0, "memory": 2.0**30}
    found = {}
    for name, amount in need.resources.items():
        short = amount * workers * need.parts - sum(node.get(name, 0.0) for node in nodes.values())
        if short > 0:
            found["GiB of memory" if name == "memory" else name] = round(short / units[name], 1)
    return found


def _listed(node: Mapping[str, float]) -> str:
    memory = f", {node['memory'] / 2**30:.1f} GiB" if "memory" in node else ""
    return f"{node.get('GPU', 0):g} GPU, {node.get('CPU', 0):g} CPU{memory}"
