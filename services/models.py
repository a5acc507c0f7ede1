"""The servicer of ModelService: which models there are, what they are, and whether they answer now."""

import asyncio
import operator
from contextlib import suppress
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from chatforge.v1.models_pb2 import (
    MODEL_STATE_FAILED,
    MODEL_STATE_LOADING,
    MODEL_STATE_READY,
    GetModelRequest,
    GetModelResponse,
    ListModelsRequest,
    ListModelsResponse,
    Model,
    ModelState,
)
from services.choice import choose_name
from services.errors import answers
from services.state import State, application_state

_STATES = {
    State.LOADING: MODEL_STATE_LOADING,
    State.READY: MODEL_STATE_READY,
    State.FAILED: MODEL_STATE_FAILED,
}
_DESCRIBE_TIMEOUT_S = 10


class ModelService:
    """Knows the models' names from the server's config, and the rest from the services that hold them."""

    def __init__(self, models: dict[str, list[str]]) -> None:
        """`models` has the names of each application's models."""
        self._models = models
        self._cards: dict[str, Model] = {}  # by name, as its service has told last

    @answers(ListModelsResponse)
    async def ListModels(self, request: ListModelsRequest, grpc_context: Any, request_id: str) -> ListModelsResponse:
        found = [model for application in self._models for model in await self._of(application)]
        return ListModelsResponse(models=sorted(found, key=operator.attrgetter("name")))

    @answers(GetModelResponse)
    async def GetModel(self, request: GetModelRequest, grpc_context: Any, request_id: str) -> GetModelResponse:
        applications = {name: application for application, names in self._models.items() for name in names}
        wanted = choose_name("name", request.name, applications)
        found = await self._of(applications[wanted])
        return GetModelResponse(model=next(model for model in found if model.name == wanted))

    async def _of(self, application: str) -> list[Model]:
        state = await application_state(application)
        names = self._models[application]
        if state is State.READY:
            with suppress(TimeoutError, RayError, RayServeException):  # busy, or gone a moment ago: what is known stays
                await self._ask(application)
        return [self._with_state(name, _STATES[state]) for name in names]

    async def _ask(self, application: str) -> None:
        handle = serve.get_app_handle(application)
        cards = await asyncio.wait_for(handle.describe.remote(), _DESCRIBE_TIMEOUT_S)
        self._cards.update({card.name: card for card in cards})

    def _with_state(self, name: str, state: ModelState) -> Model:
        model = Model(name=name)
        if name in self._cards:
            model.CopyFrom(self._cards[name])
        model.state = state
        return model
