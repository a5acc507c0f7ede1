"""Painter: what it promises to many callers at once."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_world import SIZE, tiny_folder

from serving.api import EngineClosed, QueueFull
from serving.image import painter as painter_module
from serving.image.api import ImageParams, ImageRequest, Progress
from serving.image.painter import Painter
from serving.image.sampling import Drawing, draw

PARAMS = ImageParams(SIZE, SIZE, num_inference_steps=4, guidance_scale=3.0, sampler="dpm++")
FOREVER = replace(PARAMS, num_inference_steps=900)
IMAGE = np.full((SIZE, SIZE, 3), 200, np.uint8)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("image"), prediction="v_prediction", num_inference_steps=4)


@pytest.fixture
def painter(folder: Path) -> Iterator[Painter]:
    painter = Painter(folder, max_batch=4, max_waiting=6)
    yield painter
    painter.close()


def request(*seeds: int, params: ImageParams = PARAMS, **fields: Any) -> ImageRequest:
    return ImageRequest(**{"prompt": "a red apple", "params": params, "seeds": seeds} | fields)


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "did not happen within a minute"
        await asyncio.sleep(0.001)


def idle(painter: Painter) -> bool:
    stats = painter.stats()
    return stats.num_requests_running == stats.num_requests_waiting == 0


def assert_as_alone(painter: Painter, wanted: ImageRequest, images: list[np.ndarray]) -> None:
    """One level of 255 at most: sums of floats are rounded otherwise in batches of another size."""
    (alone,) = draw(painter.components, [wanted])
    assert len(images) == len(wanted.seeds)
    for image, want in zip(images, alone, strict=True):
        assert image.dtype == np.uint8 and image.shape == (wanted.params.height, wanted.params.width, 3)
        assert np.abs(image.astype(int) - want).max() <= 1


class Watched(Drawing):
    """Stands still before its step `at` until it may go on; knows when rows left it."""

    at = 3

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.paused, self.go, self.left = threading.Event(), threading.Event(), list[tuple[int, list[int]]]()

    def advance(self) -> None:
        if self.step + 1 == self.at:
            self.paused.set()
            assert self.go.wait(60)
        super().advance()

    def keep(self, rows: Any) -> None:
        self.left.append((self.step, list(rows)))
        super().keep(rows)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Watched]:
    """The batches that are drawn."""
    made: list[Watched] = []

    def make(*given: Any) -> Watched:
        made.append(Watched(*given))
        return made[-1]

    monkeypatch.setattr(painter_module, "Drawing", make)
    return made


async def test_requests_that_come_together_are_drawn_together_and_as_alone(painter: Painter) -> None:
    requests = [request(1, 2), request(3, prompt="a cat", negative_prompt="blue"), request(1, prompt="The sea!")]
    drawn = await asyncio.gather(*(painter.draw(each) for each in requests))
    for wanted, images in zip(requests, drawn, strict=True):
        assert_as_alone(painter, wanted, images)
    stats = painter.stats()
    assert (stats.images, stats.steps) == (4, 4)
    assert idle(painter)


async def test_a_batch_waits_for_company_until_it_is_full(painter: Painter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(painter_module, "_COMPANY", 600.0)
    first = asyncio.create_task(painter.draw(request(1)))
    await asyncio.sleep(0.05)
    assert (painter.stats().num_requests_running, painter.stats().num_requests_waiting) == (0, 1)
    await asyncio.gather(first, painter.draw(request(2, 3, 4)))
    assert painter.stats().steps == 4


async def test_a_request_alone_is_drawn_to_the_last_bit_as_by_draw(painter: Painter) -> None:
    edit = request(7, image=IMAGE, mask=np.eye(SIZE, dtype=np.uint8) * 255)
    for wanted in (request(5, 6), edit, request(1, params=replace(PARAMS, width=48, height=16))):
        for image, want in zip(await painter.draw(wanted), draw(painter.components, [wanted])[0], strict=True):
            assert np.array_equal(image, want)


async def test_different_kinds_are_drawn_one_after_the_other(painter: Painter) -> None:
    requests = [request(1), request(2, params=replace(PARAMS, sampler="euler")), request(3, image=IMAGE), request(4)]
    drawn = await asyncio.gather(*(painter.draw(each) for each in requests))
    for wanted, images in zip(requests, drawn, strict=True):
        assert_as_alone(painter, wanted, images)
    assert painter.stats().steps == 12


async def test_a_request_of_more_images_than_a_batch_is_split(painter: Painter) -> None:
    wanted = request(*range(9))  # of which six may wait
    events = [event async for event in painter.stream(wanted)]
    *progress, images = events
    assert isinstance(images, list)
    assert_as_alone(painter, wanted, images)
    assert [p.step for p in progress if isinstance(p, Progress)] == [1, 2, 3, 4]
    assert painter.stats().steps == 12


async def test_a_stream_tells_each_step_and_shows_what_is_asked(painter: Painter) -> None:
    wanted = request(1, 2)
    *progress, images = [event async for event in painter.stream(wanted, preview_every=2)]
    assert isinstance(images, list) and all(isinstance(p, Progress) and p.total == 4 for p in progress)
    assert [(p.step, len(p.previews)) for p in progress] in (
        [(1, 0), (2, 2), (3, 0), (4, 2)],
        [(1, 0), (2, 0), (3, 0), (4, 2)],  # told late: only the newest previews are kept
    )
    for preview, image in zip(progress[-1].previews, images, strict=True):
        assert np.abs(preview.astype(int) - image).max() <= 1  # the last step's expectation is the image
    assert not any(p.previews for p in [event async for event in painter.stream(wanted)][:-1])


async def test_previews_are_of_the_request_itself(painter: Painter) -> None:
    async def last(stream: AsyncIterator[Any]) -> Any:
        *_, progress, images = [event async for event in stream]
        return progress.previews, images

    both = await asyncio.gather(*(last(painter.stream(request(s), preview_every=4)) for s in (1, 2)))
    for (preview,), (image,) in both:
        assert np.abs(preview.astype(int) - image).max() <= 1
    assert painter.stats().steps == 4


@pytest.mark.parametrize("how", ["closed", "cancelled"])
async def test_a_cancelled_request_leaves_its_batch_and_its_mates_images_stay(
    painter: Painter, watched: list[Watched], how: str
) -> None:
    """In DPM-Solver++'s second order, that remembers a step of each image."""
    params = replace(PARAMS, num_inference_steps=7)
    mates = [request(1, params=params), request(3, params=params, prompt="a cat")]
    gone = request(2, 4, params=params, prompt="The sea!")
    stream = painter.stream(gone)
    first = asyncio.create_task(painter.draw(mates[0]))
    await asyncio.sleep(0)
    second = asyncio.create_task(_read(stream) if how == "closed" else painter.draw(gone))
    await asyncio.sleep(0)
    third = asyncio.create_task(painter.draw(mates[1]))
    await until(lambda: bool(watched) and watched[0].paused.is_set())
    assert painter.stats().num_requests_running == 3
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    watched[0].go.set()
    for wanted, images in zip(mates, await asyncio.gather(first, third), strict=True):
        assert_as_alone(painter, wanted, images)
    assert len(watched) == 1
    assert watched[0].left == [(3, [0, 3])]  # after the step that ran, before the next
    assert painter.stats().images == 2


async def _read(stream: AsyncIterator[Any]) -> None:
    async with aclosing(stream) as events:  # type: ignore[type-var]
        async for _ in events:
            pass


async def test_a_batch_that_nobody_waits_for_ends_at_once(painter: Painter) -> None:
    async with aclosing(painter.stream(request(1, 2, params=FOREVER))) as events:  # type: ignore[type-var]
        await anext(events)
    await until(lambda: idle(painter))
    assert painter.stats().steps < FOREVER.num_inference_steps
    assert len(await painter.draw(request(1))) == 1


async def test_a_request_that_waits_is_cancelled_too(painter: Painter) -> None:
    running = asyncio.create_task(painter.draw(request(1, params=FOREVER)))
    await until(lambda: painter.stats().num_requests_running == 1)
    waiting = asyncio.create_task(painter.draw(request(2)))
    await until(lambda: painter.stats().num_requests_waiting == 1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert (painter.stats().num_requests_running, painter.stats().num_requests_waiting) == (1, 0)
    running.cancel()
    await until(lambda: idle(painter))


async def test_a_full_queue_refuses_and_takes_again_later(painter: Painter) -> None:
    running = asyncio.create_task(painter.draw(request(1, params=FOREVER)))
    await until(lambda: painter.stats().num_requests_running == 1)
    waiting = asyncio.create_task(painter.draw(request(1, 2, 3, 4)))
    await until(lambda: painter.stats().num_requests_waiting == 1)
    with pytest.raises(QueueFull, match=r"4 images wait already and 3 are new \(max_waiting=6\)"):
        await painter.draw(request(5, 6, 7))
    more = asyncio.create_task(painter.draw(request(5, 6)))
    await until(lambda: painter.stats().num_requests_waiting == 2)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert painter.stats().num_requests_waiting == 1
    again = asyncio.create_task(painter.draw(request(5, 6, 7)))
    running.cancel()
    assert [len(await task) for task in (more, again)] == [2, 3]


async def test_drain_lets_the_open_end_and_takes_no_more(painter: Painter) -> None:
    running = asyncio.create_task(painter.draw(request(*range(6))))
    await until(lambda: painter.stats().num_requests_running == 1)
    await painter.drain()
    assert len(await running) == 6
    with pytest.raises(EngineClosed, match="takes no new requests"):
        await painter.draw(request(1))


async def test_close_ends_what_runs_and_joins_the_thread(painter: Painter) -> None:
    others = set(threading.enumerate())
    running = asyncio.create_task(painter.draw(request(1, params=FOREVER)))
    await until(lambda: painter.stats().num_requests_running == 1)
    waiting = asyncio.create_task(painter.draw(request(2)))
    await until(lambda: painter.stats().num_requests_waiting == 1)
    painter.close()
    for task in (running, waiting):
        with pytest.raises(EngineClosed):
            await task
    assert "painter" not in {thread.name for thread in set(threading.enumerate()) - others}
    painter.close()


async def test_a_failing_batch_ends_its_requests_and_not_the_painter(
    painter: Painter, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(Drawing, "advance", lambda self: 1 / 0)
        results = await asyncio.gather(*(painter.draw(request(s)) for s in (1, 2)), return_exceptions=True)
        assert [type(result) for result in results] == [ZeroDivisionError] * 2
    await until(lambda: idle(painter))
    assert len(await painter.draw(request(1))) == 1


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (request(1, params=replace(PARAMS, width=30)), "width=30 must be a multiple of 4"),
        (request(1, params=replace(PARAMS, num_inference_steps=1000)), "num_inference_steps=1000"),
        (request(1, params=replace(PARAMS, strength=0.2), image=IMAGE), "strength=0.2"),
    ],
)
async def test_what_the_model_cannot_draw_is_refused_before_it_waits(
    painter: Painter, wanted: ImageRequest, text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        await painter.draw(wanted)
    with pytest.raises(ValueError, match=text):
        painter.stream(wanted)
    with pytest.raises(ValueError, match="preview_every=-1"):
        painter.stream(request(1), preview_every=-1)
    assert idle(painter)


def test_the_folder_names_defaults(painter: Painter) -> None:
    assert painter.defaults == ImageParams(SIZE, SIZE, 4, 7.5)
    assert painter.components.multiple == 4


def test_sizes_below_one_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="max_batch=0 must be at least 1"):
        Painter(folder, max_batch=0)
    with pytest.raises(ValueError, match="max_waiting=-1 must be at least 1"):
        Painter(folder, max_waiting=-1)


async def test_the_painters_thread_has_the_threads_that_it_is_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen(*given: Any) -> Drawing:
        raise RuntimeError(f"{torch.get_num_threads()} threads")

    monkeypatch.setattr(painter_module, "Drawing", seen)
    before = torch.get_num_threads()
    painter = Painter(folder, threads=before + 1)
    with pytest.raises(RuntimeError, match=f"{before + 1} threads"):
        await painter.draw(request(1))
    painter.close()
    assert torch.get_num_threads() == before
    torch.set_num_threads(before)  # which threads that come later begin with


async def test_a_denoiser_in_bf16_is_asked_for_by_dtype(folder: Path) -> None:
    painter = Painter(folder, dtype=torch.bfloat16)
    assert painter.components.dtype == torch.bfloat16
    assert_as_alone(painter, request(1), await painter.draw(request(1)))
    painter.close()
