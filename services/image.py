"""The servicer of ImageService: one Serve deployment, whose replicas each hold every image model.

A stream sends a message a step, far fewer than Serve's proxy forwards: nothing is coalesced as chat's tokens are.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np

from chatforge.v1.image_pb2 import (
    EditImageRequest,
    EditImageResponse,
    GenerateImageRequest,
    GenerateImageResponse,
    Image,
    StreamGenerateImageRequest,
    StreamGenerateImageResponse,
)
from services import convert
from services.choice import choose_name
from services.config import ImageModelConfig
from services.errors import answers, invalid
from services.image_model import ImageModel, Order, Prompts
from services.metrics import ImageMetrics
from services.servicer import Servicer
from serving.image.api import Progress


class ImageService(Servicer[ImageModel, ImageMetrics]):
    """Draws; its methods are the RPCs of chatforge.v1.ImageService."""

    def __init__(self, models: dict[str, ImageModelConfig], device: str = "cpu") -> None:
        """Loads every model. Raises ValueError where a folder cannot be served."""
        super().__init__(models, device, ImageModel, ImageMetrics)

    @answers(GenerateImageResponse)
    async def GenerateImage(
        self, request: GenerateImageRequest, grpc_context: Any, request_id: str
    ) -> GenerateImageResponse:
        model = self._model(request)
        order = model.prepare(request)
        model.check_fits(order, "use StreamGenerateImage, or ask for fewer or smaller ones")
        return GenerateImageResponse(id=request_id, model=model.name, images=await self._drawn(model, order))

    @answers(StreamGenerateImageResponse)
    async def StreamGenerateImage(
        self, request: StreamGenerateImageRequest, grpc_context: Any, request_id: str
    ) -> AsyncIterator[StreamGenerateImageResponse]:
        model = self._model(request)
        if request.preview_every < 0:
            raise invalid("preview_every", f"{request.preview_every} must be 0 (never) or more")
        order = model.prepare(request)
        started = time.perf_counter()
        images: Sequence[np.ndarray] = ()
        async with aclosing(model.painter.stream(order.request, request.preview_every)) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, Progress):
                    progress = await asyncio.to_thread(convert.step_progress, event)
                    yield StreamGenerateImageResponse(id=request_id, model=model.name, progress=progress)
                else:
                    images = event
        for i, pixels in enumerate(images):
            (image,) = await asyncio.to_thread(model.write, order, [pixels], i)
            last = i == len(images) - 1
            yield StreamGenerateImageResponse(id=request_id, model=model.name, image=image, last=last)
        self._metrics[model.name].answered(started, len(images))

    @answers(EditImageResponse)
    async def EditImage(self, request: EditImageRequest, grpc_context: Any, request_id: str) -> EditImageResponse:
        model = self._model(request)
        order = await model.prepare_edit(request)
        model.check_fits(order, "ask for fewer or smaller ones")
        return EditImageResponse(id=request_id, model=model.name, images=await self._drawn(model, order))

    def _model(self, request: Prompts) -> ImageModel:
        return self._models[choose_name("model", request.model, self._models)]

    async def _drawn(self, model: ImageModel, order: Order) -> list[Image]:
        started = time.perf_counter()
        images = await asyncio.to_thread(model.write, order, await model.painter.draw(order.request))
        self._metrics[model.name].answered(started, len(images))
        return images
