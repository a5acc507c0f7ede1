"""Which images are drawn together, and what a request on its way tells of itself."""

import ast
from pathlib import Path

import numpy as np
import pytest

import serving.image.batching
from serving.image.api import ImageParams, ImageRequest, Progress
from serving.image.batching import Call, Waiting, pick

SMALL = ImageParams(8, 8, num_inference_steps=4)
OTHER = ImageParams(8, 8, num_inference_steps=5)
IMAGE = np.zeros((8, 8, 3), np.uint8)
MASK = np.zeros((8, 8), np.uint8)


def waiting(images: int, params: ImageParams = SMALL, *given: np.ndarray) -> list[Waiting]:
    call = Call(ImageRequest("", params, tuple(range(images)), "", *given))
    return [Waiting(call, i) for i in range(images)]


def test_a_batch_is_the_oldest_image_and_the_oldest_of_its_kind() -> None:
    first, others, more = waiting(2), waiting(2, OTHER), waiting(3)
    queue = [*first, *others, *more]
    assert pick(queue, 8) == [*first, *more]
    assert pick(queue[2:], 8) == others
    assert pick(queue, 1) == first[:1]


def test_a_request_that_does_not_fit_in_is_split() -> None:
    first, second = waiting(3), waiting(4)
    assert pick([*first, *second], 4) == [*first, second[0]]
    assert pick(second[1:], 4) == second[1:]
    big = waiting(9)
    assert [len(pick(big[start:], 4)) for start in (0, 4, 8)] == [4, 4, 1]


def test_edits_and_masks_are_kinds_of_their_own() -> None:
    new, edit, mask = waiting(1), waiting(1, SMALL, IMAGE), waiting(1, SMALL, IMAGE, MASK)
    queue = [*new, *edit, *mask, *waiting(1, SMALL, IMAGE + 1)]
    assert pick(queue, 8) == new
    assert pick(queue[1:], 8) == [queue[1], queue[3]]
    assert pick(queue[2:], 8) == mask


def test_a_request_is_as_far_as_all_of_its_images() -> None:
    whole = waiting(2)[0].call
    assert [whole.advance(2, 4) for _ in range(4)] == [1, 2, 3, 4]
    split = waiting(3)[0].call
    assert [split.advance(2, 4) for _ in range(4)] == [None, 1, 2, None]
    assert [split.advance(1, 4) for _ in range(4)] == [3, None, None, 4]


def test_only_the_newest_previews_wait_for_a_slow_reader() -> None:
    call = waiting(1)[0].call
    for step in (1, 2, 3):
        call.tell(Progress(step, 4, (IMAGE,) if step < 3 else ()))
    assert [(p.step, len(p.previews)) for p in call.take()] == [(1, 0), (2, 1), (3, 0)]
    assert call.take() == []


def test_a_call_is_done_with_its_images_or_an_error() -> None:
    call = waiting(2)[0].call
    call.images[1] = IMAGE
    assert not call.done
    call.images[0] = IMAGE
    assert call.done
    failed = waiting(2)[0].call
    failed.error = ValueError()
    assert failed.done


def test_the_policy_needs_no_torch() -> None:
    tree = ast.parse(Path(serving.image.batching.__file__).read_text("utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules == {"collections", "collections.abc", "dataclasses", "serving.image.api"}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"width": -3}, "width=-3 must be at least 8"),
        ({"height": 0}, "height=0 must be at least 8"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be between 1 and 1000"),
        ({"num_inference_steps": 1001}, "num_inference_steps=1001 must be between 1 and 1000"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan must be between 1"),
        ({"guidance_scale": float("inf")}, "guidance_scale=inf must be between 1"),
        ({"guidance_scale": 0.0}, r"guidance_scale=0\.0 must be between 1 \(no guidance\) and 100"),
        ({"guidance_scale": 100.5}, r"guidance_scale=100\.5"),
        ({"sampler": "magic"}, r"sampler='magic' must be one of ddim, dpm\+\+, euler"),
        ({"strength": 0.0}, r"strength=0\.0 must be above 0 and at most 1"),
        ({"strength": float("nan")}, "strength=nan"),
        ({"strength": 1.1}, r"strength=1\.1"),
    ],
)
def test_params_out_of_range_name_the_field(fields: dict, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}"):
        ImageParams(**fields)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"seeds": ()}, r"seeds=\(\) must be at least one"),
        ({"seeds": (1, -1)}, r"seeds=\(1, -1\) must be .* between 0 and 2\^63 - 1"),
        ({"seeds": (2**63,)}, "seeds="),
        ({"image": MASK}, r"image=uint8 \[8, 8\] must be uint8 \[height=8, width=8, 3\]"),
        ({"image": IMAGE.astype(np.float32)}, r"image=float32 \[8, 8, 3\] must be uint8"),
        ({"image": IMAGE[:4]}, r"image=uint8 \[4, 8, 3\]"),
        ({"mask": MASK}, r"mask=uint8 \[8, 8\] must come with an image"),
        ({"image": IMAGE, "mask": IMAGE}, r"mask=uint8 \[8, 8, 3\] must be uint8 \[height=8, width=8\]"),
    ],
)
def test_requests_that_make_no_sense_name_the_field(fields: dict, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}"):
        ImageRequest(**{"prompt": "", "params": SMALL, "seeds": (0,)} | fields)
