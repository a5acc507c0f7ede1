import pytest

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
