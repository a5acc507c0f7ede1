"""The servicer of ModelService: which models there are, what they are, and whether they answer now."""

import asyncio
import operator
from collections.abc import Collection
from contextlib import suppress
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from chatforge.v1.models_pb2 import (
    GetModelRequest,
    GetModelResponse,
    ListModelsRequest,
    ListModelsResponse,
    Model,
)
from services.choice import choose_name
from services.errors import answers
from services.names import STATES
from services.state import State, application_states

_DESCRIBE_TIMEOUT_S = 10


class ModelService:
    """Knows the models' names from the server's config, and the rest from the services that hold them."""

    def __init__(self, models: dict[str, list[str]]) -> None:
        """`models` has the names of each application's models."""
        self._models = models
        self._cards: dict[str, Model] = {}  # by name, as its service has told last

    @answers(ListModelsResponse)
    async def ListModels(self, request: ListModelsRequest, grpc_context: Any, request_id: str) -> ListModelsResponse:
        found = await self._of(self._models)
        return ListModelsResponse(models=sorted(found, key=operator.attrgetter("name")))

    @answers(GetModelResponse)
    async def GetModel(self, request: GetModelRequest, grpc_context: Any, request_id: str) -> GetModelResponse:
        applications = {name: application for application, names in self._models.items() for name in names}
        wanted = choose_name("name", request.name, applications)
        found = await self._of([applications[wanted]])
        return GetModelResponse(model=next(model for model in found if model.name == wanted))

    async def _of(self, applications: Collection[str]) -> list[Model]:
        states = await application_states(applications)
        await asyncio.gather(*(self._ask(name) for name in applications if states[name] is State.READY))
        return [self._with_state(model, states[name]) for name in applications for model in self._models[name]]

    async def _ask(self, application: str) -> None:
        """One that is busy, or gone a moment ago, leaves what is known as it is."""
        with suppress(TimeoutError, RayError, RayServeException):
            handle = serve.get_app_handle(application)
            cards = await asyncio.wait_for(handle.describe.remote(), _DESCRIBE_TIMEOUT_S)
            self._cards.update({card.name: card for card in cards})

    def _with_state(self, name: str, state: State) -> Model:
        model = Model(name=name)
        if name in self._cards:
            model.CopyFrom(self._cards[name])
        model.state = STATES[state.value]
        return model
