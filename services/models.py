"""The servicer of ModelService: which models there are, what they are, and whether they answer now."""

import asyncio
import operator
from typing import Any

from ray import serve

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
from services.errors import answers, not_found
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
        self._cards: dict[str, Model] = {}  # by name; a service is asked once, since what it holds does not change

    @answers(ListModelsResponse)
    async def ListModels(self, request: ListModelsRequest, grpc_context: Any, request_id: str) -> ListModelsResponse:
        found = [model for application in self._models for model in await self._of(application)]
        return ListModelsResponse(models=sorted(found, key=operator.attrgetter("name")))

    @answers(GetModelResponse)
    async def GetModel(self, request: GetModelRequest, grpc_context: Any, request_id: str) -> GetModelResponse:
        names = sorted(name for names in self._models.values() for name in names)
        wanted = request.name or (names[0] if len(names) == 1 else "")
        for application, served in self._models.items():
            if wanted in served:
                return GetModelResponse(model=next(m for m in await self._of(application) if m.name == wanted))
        said = f"{wanted!r} is not served here" if wanted else "is empty, and there is more than one"
        raise not_found("name", f"{said}; there are: {', '.join(names)}")

    async def _of(self, application: str) -> list[Model]:
        state = await application_state(application)
        names = self._models[application]
        if state is State.READY and not all(name in self._cards for name in names):
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
