"""ImageService over real Ray Serve and gRPC, on a server that translates too."""

import io
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from image_world import tiny_folder
from malformed_images import LIMITS, MODEL, ROOMY, malformed, picture, request_of
from PIL import Image
from services_world import Server, eventually, run_command, serving

from chatforge.v1 import image_pb2_grpc
from services.app import free_port
from services.client import AsyncClient, CallError, Client, ImageReply, StepProgress
from services.transport import DETAILS_KEY

pytestmark = pytest.mark.timeout(180)

MIB = 1 << 20
LONG: dict[str, Any] = {"model": "slow", "num_inference_steps": 900, "width": 128, "height": 128}  # many seconds
SHORT: dict[str, Any] = {"model": "slow", "num_inference_steps": 1}
PROMPT, OTHER = "ein roter Apfel", "a blue house"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / MODEL
    manifest: dict[str, Any] = {"run": "pictures", "stage": "image", "num_inference_steps": 3, "guidance_scale": 2.5}
    return tiny_folder(made, **manifest)


@pytest.fixture(scope="module")
def server(tiny_world: Any, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """ "tiny" draws within narrow limits, "roomy" within the widest, "slow" one image after another at length."""
    model = {"model": str(folder)}
    slow = {"max_batch": 1, "max_waiting": 1, "max_num_inference_steps": 1000}
    config = {
        "port": free_port(),
        "metrics_port": free_port(),
        "translation": {"de-en": {"model": str(tiny_world.translation), "max_new_tokens": 4}},
        "image": {MODEL: model | LIMITS, ROOMY: model | {"max_images": 64}, "slow": model | slow},
    }
    with serving(tmp_path_factory.mktemp("server"), config) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.address, timeout=60, retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def stub(server: Server) -> Iterator[Any]:
    """As any gRPC client has it; no `application` is sent."""
    with grpc.insecure_channel(server.address) as channel:
        yield image_pb2_grpc.ImageServiceStub(channel)


# ---- images


async def test_the_images_are_the_painters(client: Client, folder: Path) -> None:
    from serving.image.api import ImageParams, ImageRequest
    from serving.image.painter import Painter

    knobs: dict[str, Any] = {"width": 24, "height": 40, "num_inference_steps": 4, "guidance_scale": 3.0}
    painter = Painter(folder)
    request = ImageRequest("a cat", ImageParams(**knobs, sampler="euler"), (2**62, 2**62 + 1), "a dog")
    expected = await painter.draw(request)
    painter.close()
    replies = client.generate_image(
        "a cat", negative_prompt="a dog", model=MODEL, seed=2**62, num_images=2, sampler="euler", **knobs
    )
    assert [reply.seed for reply in replies] == [2**62, 2**62 + 1]
    for reply, image in zip(replies, expected, strict=True):
        assert (reply.mime_type, reply.width, reply.height, reply.model) == ("image/png", 24, 40, MODEL)
        assert abs(pixels(reply).astype(int) - image).max() <= 1  # of 255: sums are rounded by the number of threads


def test_a_streamed_image_is_the_whole_one(client: Client) -> None:
    options: dict[str, Any] = {"model": MODEL, "seed": 3, "num_images": 2, "format": "webp"}
    whole = client.generate_image("a cat", **options)
    stream = client.stream_generate_image("a cat", preview_every=2, **options)
    steps = [event for event in stream if isinstance(event, StepProgress)]
    assert [(step.step, step.total, len(step.previews)) for step in steps] == [(1, 3, 0), (2, 3, 2), (3, 3, 0)]
    assert Image.open(io.BytesIO(steps[1].previews[0])).format == "JPEG"
    assert [(reply.data, reply.seed) for reply in stream.reply] == [(reply.data, reply.seed) for reply in whole]


def test_an_edit_has_the_pictures_size_and_keeps_what_is_black(client: Client) -> None:
    options: dict[str, Any] = {"image": picture(size=(50, 33)), "model": MODEL, "seed": 1}
    (edited,) = client.edit_image("a cat", **options)
    assert (edited.width, edited.height, edited.seed) == (48, 32, 1)
    nothing = io.BytesIO()
    Image.new("L", (50, 33)).save(nothing, "PNG")
    (kept,) = client.edit_image("a cat", mask=nothing.getvalue(), **options)
    (other,) = client.edit_image("a dog", mask=nothing.getvalue(), **options)
    assert kept.data == other.data != edited.data


async def test_the_async_client_speaks_the_same(server: Server, client: Client) -> None:
    async with AsyncClient(server.address, timeout=60, retries=0) as asynchronous:
        (image,) = await asynchronous.generate_image("a cat", model=MODEL, seed=9)
        assert image.data == client.generate_image("a cat", model=MODEL, seed=9)[0].data
        stream = asynchronous.stream_generate_image("a cat", model=MODEL, seed=9)
        assert len([event async for event in stream]) == 4 and stream.reply[0].data == image.data
        (edited,) = await asynchronous.edit_image("a cat", picture(), model=MODEL, seed=9)
        assert edited.data == client.edit_image("a cat", picture(), model=MODEL, seed=9)[0].data


def test_what_one_message_cannot_hold_comes_one_image_a_message(client: Client) -> None:
    many: dict[str, Any] = {"model": ROOMY, "num_images": 64, "width": 148, "height": 148, "num_inference_steps": 1}
    many["guidance_scale"] = 1
    with pytest.raises(CallError, match=r"config\.num_images: 64 images of 148 × 148 pixels may not fit"):
        client.generate_image("a cat", **many)
    images = [event for event in client.stream_generate_image("a cat", **many) if isinstance(event, ImageReply)]
    assert len(images) == 64 and {pixels(image).shape for image in images} == {(148, 148, 3)}


def test_models_of_both_kinds_are_listed(server: Server, client: Client, folder: Path, tmp_path: Path) -> None:
    from serving.model_folder import describe

    kinds = {model.name: model.kind for model in client.list_models()}
    assert kinds == {name: "text-to-image" for name in (MODEL, ROOMY, "slow")} | {"de-en": "translation"}
    model = client.get_model(MODEL)
    assert model.limits == LIMITS
    assert model.revision == describe(folder).revision
    assert (model.run, model.stage) == ("pictures", "image")
    assert "text-to-image" in run_command(["models", "--server", server.address], tmp_path).stdout


def test_the_server_says_how_to_reach_it(server: Server) -> None:
    assert f'chatforge draw --server {server.address} --model {ROOMY} "a red apple"' in server.greeting
    assert server.replicas().keys() == {"image", "translation", "models"}


# ---- refusals


def test_every_malformed_request_is_refused_and_the_service_stays_well(
    server: Server, client: Client, stub: Any
) -> None:
    replica = server.replicas()["image"]
    cases = malformed()
    assert len(cases) >= 200
    for case in cases[::4]:
        call_error(stub, case.method, case.request)  # what allocators and decoders keep, they keep once
    before = replica.memory_info().rss
    for number, case in enumerate(cases):
        error = call_error(stub, case.method, case.request)
        told = f"{case.method}, {case.what}: {error.code()} {error.details()}"
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, told
        assert error.details().startswith(f"{case.field}: "), told
        assert [violation.field for violation in details_of(error, BadRequest).field_violations] == [case.field], told
        if number % 50 == 0:
            assert client.health("chatforge.v1.ImageService") == "SERVING"
            assert client.generate_image("a cat", model=MODEL)[0].data
    assert replica.memory_info().rss - before < 32 * MIB
    assert server.replicas()["image"].pid == replica.pid


def test_an_upload_above_a_message_is_refused(server: Server, client: Client, stub: Any) -> None:
    error = call_error(stub, "EditImage", request_of("EditImage", image=bytes(5 * MIB)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert client.generate_image("a cat", model=MODEL)[0].data


@pytest.mark.parametrize("method", ["GenerateImage", "StreamGenerateImage", "EditImage"])
def test_an_unknown_model_is_not_found(stub: Any, method: str) -> None:
    error = call_error(stub, method, request_of(method, model="other"))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert error.details() == "model: 'other' is not served here; there are: roomy, slow, tiny"


@pytest.mark.parametrize("method", ["GenerateImage", "StreamGenerateImage", "EditImage"])
@pytest.mark.parametrize("sent", [b"\x12\x04\xff\xfe\xff\xfe", b"\xff\xff\xff"], ids=["not UTF-8", "no protobuf"])
def test_bytes_that_are_no_request_are_refused(server: Server, method: str, sent: bytes) -> None:
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        call: Any = channel.unary_stream(f"/chatforge.v1.ImageService/{method}", None, None)
        list(call(sent, timeout=10))
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == f"{method}Request: cannot be parsed; its strings must be UTF-8"
    assert details_of(error, ErrorInfo).metadata["request_id"]


# ---- load


def test_cancelling_leaving_and_missing_a_deadline_free_the_painter(server: Server, client: Client) -> None:
    """Each of them leaves many seconds of work, and the next would wait for it, unless it has gone."""
    for _ in range(2):
        stream = client.stream_generate_image("a cat", **LONG)
        assert isinstance(next(stream), StepProgress)
        stream.close()
        for _event in client.stream_generate_image("a cat", **LONG):
            break
        with pytest.raises(CallError, match="DEADLINE_EXCEEDED"):
            client.generate_image("a cat", **LONG, timeout=1)
        assert client.generate_image("a cat", **SHORT, timeout=5)


def test_overload_is_refused_at_once_and_ends(client: Client, stub: Any) -> None:
    request = request_of("GenerateImage", {"num_inference_steps": 1}, model="slow")
    with client.stream_generate_image("a cat", **LONG) as stream:
        next(stream)
        waiting = stub.GenerateImage.future(request, timeout=60)
        time.sleep(1)  # until it does
        refused = call_error(stub, "GenerateImage", request)
        assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused.details() == "too many requests wait for this model; try again later"
        assert details_of(refused, RetryInfo).retry_delay.seconds == 1
        stream.close()
        assert len(waiting.result().images) == 1


def test_metrics_have_vllms_names(server: Server, client: Client) -> None:
    client.generate_image("a cat", model=MODEL)
    names = (
        "e2e_request_latency_seconds",
        "request_success_total",
        "generated_images",
        "num_requests_running",
        "num_requests_waiting",
    )

    def published() -> bool:
        lines = [line for line in server.metrics().splitlines() if f'model_name="{MODEL}"' in line]
        return all(any(line.startswith(f"ray_{name}") for line in lines) for name in names)

    eventually(published, 60)


# ---- the command


def test_the_command_draws(server: Server, client: Client, tmp_path: Path) -> None:
    options = ["draw", "--server", server.address, "--model", MODEL, "--seed", "5", "--steps", "2"]
    expected = client.generate_image(OTHER, model=MODEL, seed=5, num_inference_steps=2, num_images=2, width=24)
    told = run_command([*options, "-o", "house.png", "--width", "24", "--n", "2", *OTHER.split()], tmp_path)
    said = "house-1.png  24 × 32, seed 5\nhouse-2.png  24 × 32, seed 6\n"
    assert (told.returncode, told.stdout, told.stderr) == (0, said, "")
    assert [(tmp_path / f"house-{i}.png").read_bytes() for i in (1, 2)] == [image.data for image in expected]
    grid = run_command([*options, "-o", "sheet.jpg", "--n", "3", "--grid", OTHER], tmp_path)
    assert (grid.stdout, grid.stderr) == ("sheet.jpg  32 × 32 each, seed 5, 6, 7\n", "")
    assert Image.open(tmp_path / "sheet.jpg").size == (64, 64)


def test_the_command_redraws_a_picture(server: Server, client: Client, tmp_path: Path) -> None:
    (tmp_path / "old.png").write_bytes(picture())
    options = ["draw", "--server", server.address, "--model", MODEL, "--seed", "5", "--image", "old.png"]
    told = run_command([*options, "--strength", "0.7", OTHER], tmp_path)
    (expected,) = client.edit_image(OTHER, picture(), strength=0.7, model=MODEL, seed=5)
    assert (told.returncode, told.stdout) == (0, "drawing.png  24 × 24, seed 5\n")
    assert (tmp_path / "drawing.png").read_bytes() == expected.data
    (tmp_path / "old.png").write_bytes(picture()[:-40])
    refused = run_command([*options, OTHER], tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "error: INVALID_ARGUMENT: image: is damaged or cut off\n"


def test_a_prompt_in_another_language_is_translated_first(server: Server, client: Client, tmp_path: Path) -> None:
    english = client.translate(PROMPT, source="de", target="en").text
    told = run_command(
        ["draw", "--server", server.address, "--model", MODEL, "--seed", "5", "--from", "de", *PROMPT.split()], tmp_path
    )
    assert told.stderr == "" and told.stdout.startswith(f"prompt: {english}\n")
    assert (tmp_path / "drawing.png").read_bytes() == client.generate_image(english, model=MODEL, seed=5)[0].data


# ---- a replica dies; this comes last


def test_a_killed_replica_comes_back_and_the_other_service_does_not_notice(server: Server, client: Client) -> None:
    stream = client.stream_generate_image("a cat", **LONG)
    next(stream)
    killed = server.replicas()["image"]
    killed.send_signal(signal.SIGKILL)
    with pytest.raises(CallError, match="UNAVAILABLE"):
        list(stream)
    assert client.translate("Haus").model == "de-en"
    eventually(lambda: client.health("chatforge.v1.ImageService") == "NOT_SERVING", 10)
    with Client(server.address, timeout=60, retries=20) as patient:
        assert patient.generate_image("a cat", model=MODEL)[0].data
    eventually(lambda: client.health() == client.health("chatforge.v1.ImageService") == "SERVING")
    assert server.replicas()["image"].pid != killed.pid


# ---- helpers


def pixels(image: ImageReply) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image.data)))


def call_error(stub: Any, method: str, request: Any, timeout: float = 30) -> Any:
    """The raw error of a call that has to fail."""
    with pytest.raises(grpc.RpcError) as caught:
        answer = getattr(stub, method)(request, timeout=timeout)
        if method.startswith("Stream"):
            list(answer)
    return caught.value


def details_of(error: Any, kind: type) -> Any:
    """The detail of type `kind` in the error's google.rpc.Status, whose code and text must be the call's."""
    status = Status.FromString(dict(error.trailing_metadata())[DETAILS_KEY])
    assert (status.code, status.message) == (error.code().value[0], error.details())
    found = kind()
    assert any(detail.Unpack(found) for detail in status.details)
    return found
