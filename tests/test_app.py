"""A server that does not start: a config's fault is told as such, of all else the logs are kept."""

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve

from services import app
from services.cli import _exit_code
from services.config import ServerConfig
from services.strict import ServerConfigError

OUT_OF_MEMORY = """Traceback (most recent call last):
  File "replica.py", line 3, in __init__
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 3.05 GiB."""
NO_FOLDER = """Traceback (most recent call last):
  File "replica.py", line 3, in __init__
services.config.ServerConfigError: model 'x': its folder cannot be served"""


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Starts a server whose replica says this and dies."""

    def start(said: str, tell: list[str]) -> None:
        def run_many(targets: Any) -> None:
            raise RuntimeError("Deploying application chat failed")

        deployment = SimpleNamespace(message=said)
        status = SimpleNamespace(
            applications={"chat": SimpleNamespace(message="", deployments={"ChatService": deployment})}
        )
        monkeypatch.setattr(serve, "status", lambda: status)
        monkeypatch.setattr(serve, "start", lambda **options: None)
        monkeypatch.setattr(serve, "run_many", run_many)
        config = ServerConfig.model_construct(port=app.free_port())
        with app.running(config, tell.append):
            raise AssertionError("it runs")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(app, "ENVIRONMENT", {})

    def start_ray(config: ServerConfig, scratch: str) -> ServerConfig:
        Path(scratch, "session_latest/logs").mkdir(parents=True)
        return config

    monkeypatch.setattr(app, "_start_ray", start_ray)
    monkeypatch.setattr(app, "applications", lambda config: {})
    return start


def test_the_logs_of_a_start_that_failed_are_kept_and_named(start: Any) -> None:
    told: list[str] = []
    with pytest.raises(app.ServerStartError) as caught:
        start(OUT_OF_MEMORY, told)
    reason, _, kept = str(caught.value).partition("; the logs are kept in ")
    assert reason == "no replica could start: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 3.05 GiB."
    assert _exit_code(caught.value) == 1
    assert Path(kept).is_dir() and told == [f"logs, until the server ends: {kept}"]


def test_what_ray_says_is_told_where_no_replica_says_anything(start: Any) -> None:
    with pytest.raises(app.ServerStartError, match="no replica could start: Deploying application chat failed; the l"):
        start("", [])


def test_a_fault_of_the_config_leaves_no_file(start: Any, tmp_path: Path) -> None:
    with pytest.raises(ServerConfigError, match=r"^model 'x': its folder cannot be served$"):
        start(NO_FOLDER, [])
    assert list(tmp_path.iterdir()) == []
