import pytest

from training.cluster import resolve_device
from training.config import ConfigError
from training.device import backend, choose_device


@pytest.mark.parametrize(
    ("requested", "gpus", "workers", "device"),
    [
        ("auto", 0, 1, "cpu"),
        ("auto", 1, 1, "cuda"),
        ("auto", 8, 8, "cuda"),
        ("auto", 1, 2, "cpu"),
        ("cpu", 8, 1, "cpu"),
        ("cuda", 2, 2, "cuda"),
    ],
)
def test_cuda_where_every_worker_has_a_gpu(requested, gpus, workers, device):
    assert choose_device(requested, gpus, workers) == device


def test_a_cuda_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"workers=2; there are 1"):
        choose_device("cuda", 1, 2)


def test_each_device_has_its_backend():
    assert (backend("cpu"), backend("cuda")) == ("gloo", "nccl")


def test_on_a_cluster_gpus_that_are_asked_for_are_waited_for(monkeypatch):
    """There are none until an autoscaler has been asked for them; a laptop will not get any."""
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="device=cuda needs a GPU"):
        resolve_device("cuda", 2)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert resolve_device("cuda", 2) == "cuda" and resolve_device("auto", 2) == "cpu"
