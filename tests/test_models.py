"""Which models there are: one question to the controller, and no service that waits for another."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.serve.schema import ApplicationStatus, ReplicaState

from chatforge.v1.models_pb2 import ListModelsRequest, Model
from services import models
from services.health import HealthServicer
from services.models import ModelService
from services.replies import ModelCard, model_card

SERVICES = {"chat": ["tiny"], "translation": ["de-en"], "image": ["painter"]}


class Context:
    def trailing_metadata(self) -> list[tuple[str, str]]:
        return []


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When the controller was asked: chat and translation run, image has failed."""
    moments: list[float] = []
    running = {"D": SimpleNamespace(replica_states={ReplicaState.RUNNING: 1})}
    up = SimpleNamespace(status=ApplicationStatus.RUNNING, deployments=running)
    failed = SimpleNamespace(status=ApplicationStatus.DEPLOY_FAILED, deployments={})

    def status() -> Any:
        moments.append(time.monotonic())
        return SimpleNamespace(applications={"chat": up, "translation": up, "image": failed})

    monkeypatch.setattr(serve, "status", status)
    return moments


async def test_services_are_asked_side_by_side(asked: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is busy costs its patience once, and keeps nobody's card back."""

    async def describe(application: str) -> list[Model]:
        if application == "translation":
            await asyncio.sleep(30)
        return [Model(name=name, revision="r") for name in SERVICES[application]]

    def handle(application: str) -> Any:
        return SimpleNamespace(describe=SimpleNamespace(remote=lambda: describe(application)))

    monkeypatch.setattr(serve, "get_app_handle", handle)
    monkeypatch.setattr(models, "_DESCRIBE_TIMEOUT_S", 0.2)
    response = await ModelService(SERVICES).ListModels(ListModelsRequest(), Context())
    assert [model_card(model) for model in response.models] == [
        ModelCard("de-en", state="ready"),
        ModelCard("painter", state="failed"),
        ModelCard("tiny", state="ready", revision="r"),
    ]
    assert len(asked) == 1


async def test_the_health_of_the_whole_is_one_question(asked: list[float]) -> None:
    servicer = HealthServicer({"chatforge.v1.ChatService": "chat", "chatforge.v1.ImageService": "image"})
    said = [await servicer._status(name) for name in ("", "chatforge.v1.ChatService", "chatforge.v1.ImageService")]
    assert said == [2, 1, 2] and len(asked) == 3  # NOT_SERVING, SERVING, NOT_SERVING
