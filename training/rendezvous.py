"""How the workers of one group find one another: Ray Train's own way, over the network that Ray's nodes use.

Gloo alone would take the address that the host's name stands for, which is loopback on many machines.
"""

import os
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


class Rendezvous(TorchConfig):
    """A TorchConfig whose workers talk over the interface that has their node's address in Ray."""

    @property
    def backend_cls(self) -> type:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_choose_interface)
        super().on_start(worker_group, backend_config)


def _choose_interface() -> None:
    """In a worker: what the environment says already counts, as on clusters with a network of their own for this."""
    name = _interface_of(ray.util.get_node_ip_address())
    if name:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def _interface_of(address: str) -> str | None:
    found = (name for name, held in psutil.net_if_addrs().items() if any(a.address == address for a in held))
    return next(found, None)
