"""The client against a real gRPC server that does as it is told: retries, timeouts, cancellation, what it imports."""

import gc
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from services_world import environment

from chatforge.v1 import (
    chat_pb2,
    chat_pb2_grpc,
    common_pb2,
    image_pb2,
    image_pb2_grpc,
    translation_pb2,
    translation_pb2_grpc,
)
from services.address import target_of
from services.client import AsyncClient, CallError, Client, ImageReply, LanguagePair, StepProgress, TokenLogprob
from services.transport import DETAILS_KEY, connect

UNAVAILABLE, EXHAUSTED, INTERNAL = (
    getattr(grpc.StatusCode, name) for name in ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "INTERNAL")
)


IMAGES = [image_pb2.Image(data=bytes([i]), mime_type="image/png", seed=7 + i, width=4, height=2) for i in range(2)]
PICTURES = [ImageReply(bytes([i]), "image/png", 7 + i, 4, 2, "r", "m") for i in range(2)]


class Scripted(
    chat_pb2_grpc.ChatServiceServicer,
    translation_pb2_grpc.TranslationServiceServicer,
    image_pb2_grpc.ImageServiceServicer,
):
    """Fails with each of `errors` in turn, after `delivered` messages; then answers."""

    def __init__(self) -> None:
        self.errors: list[grpc.StatusCode] = []
        self.metadata_of_errors: dict[str, Any] | None = {}  # beside what comes with every error of our servers
        self.delivered = 0
        self.requests: list[Any] = []
        self.metadata: dict[str, str] = {}
        self.cancelled = threading.Event()

    def Chat(self, request: Any, context: Any) -> Any:
        self._note(request, context)
        if self.errors:
            self._fail(context)
        return chat_pb2.ChatResponse(
            id="r", model="m", message=chat_pb2.Message(content="hello"), finish_reason=common_pb2.FINISH_REASON_STOP,
            logprobs=[common_pb2.TokenLogprob(token_id=7, token=b"hello", logprob=-0.5)],
        )  # fmt: skip

    def StreamChat(self, request: Any, context: Any) -> Iterator[Any]:
        self._note(request, context)
        context.add_callback(self.cancelled.set)
        for _ in range(self.delivered):
            yield chat_pb2.StreamChatResponse(id="r", model="m", delta="he")
        if self.errors:
            yield chat_pb2.StreamChatResponse()  # the empty message that comes with a status
            self._fail(context)
        if request.model == "endless":
            yield chat_pb2.StreamChatResponse(id="r", model="m", delta="he")
            self.cancelled.wait(30)
        reason = common_pb2.FINISH_REASON_STOP
        yield chat_pb2.StreamChatResponse(id="r", model="m", delta="llo", finish_reason=reason, seed=5)

    def Translate(self, request: Any, context: Any) -> Any:
        self._note(request, context)
        if self.errors:
            self._fail(context)
        hypotheses = [
            translation_pb2.Hypothesis(text=text, score=-0.5, finish_reason=common_pb2.FINISH_REASON_LENGTH)
            for text in ("best", "next")
        ]
        return translation_pb2.TranslateResponse(
            id="r",
            model="m",
            source_language="de",
            target_language="en",
            translations=[translation_pb2.Translation(hypotheses=hypotheses) for _ in request.texts],
        )

    def StreamTranslate(self, request: Any, context: Any) -> Iterator[Any]:
        self._note(request, context)
        context.add_callback(self.cancelled.set)
        if self.errors:
            yield translation_pb2.StreamTranslateResponse()
            self._fail(context)
        yield translation_pb2.StreamTranslateResponse(id="r", model="m", delta="One. ")
        if request.model == "endless":
            self.cancelled.wait(30)
        yield translation_pb2.StreamTranslateResponse(id="r", model="m", delta="Two.")
        usage = common_pb2.Usage(prompt_tokens=4, completion_tokens=6)
        reason = common_pb2.FINISH_REASON_STOP
        yield translation_pb2.StreamTranslateResponse(id="r", model="m", finish_reason=reason, usage=usage)

    def ListLanguages(self, request: Any, context: Any) -> Any:
        pair = translation_pb2.LanguagePair(source_language="de", target_language="en", models=["m"])
        return translation_pb2.ListLanguagesResponse(pairs=[pair])

    def GenerateImage(self, request: Any, context: Any) -> Any:
        self._note(request, context)
        if self.errors:
            self._fail(context)
        return image_pb2.GenerateImageResponse(id="r", model="m", images=IMAGES)

    def StreamGenerateImage(self, request: Any, context: Any) -> Iterator[Any]:
        self._note(request, context)
        context.add_callback(self.cancelled.set)
        if self.errors:
            yield image_pb2.StreamGenerateImageResponse()
            self._fail(context)
        progress = image_pb2.StepProgress(step=1, total=2, previews=[image_pb2.Image(data=b"small")])
        yield image_pb2.StreamGenerateImageResponse(id="r", model="m", progress=progress)
        if request.model == "endless":
            self.cancelled.wait(30)
        for image in IMAGES:
            yield image_pb2.StreamGenerateImageResponse(id="r", model="m", image=image, last=image is IMAGES[-1])

    def EditImage(self, request: Any, context: Any) -> Any:
        self._note(request, context)
        return image_pb2.EditImageResponse(id="r", model="m", images=IMAGES[:1])

    def _fail(self, context: Any) -> None:
        if self.metadata_of_errors is not None:
            context.set_trailing_metadata([("request_id", "r"), (DETAILS_KEY, b""), *self.metadata_of_errors.items()])
        context.abort(self.errors.pop(0), "said the script")

    def _note(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        self.metadata = dict(context.invocation_metadata())


@pytest.fixture
def script() -> Scripted:
    return Scripted()


@pytest.fixture
def secure(script: Scripted, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a server that speaks TLS alone, and the certificate that it made itself."""
    key, certificate = tmp_path / "tls.key", tmp_path / "tls.crt"
    made = f"req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -keyout {key} -out {certificate}"
    names = ["-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(["openssl", *made.split(), *names], capture_output=True, check=True)
    pair = (key.read_bytes(), certificate.read_bytes())
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool)
        chat_pb2_grpc.add_ChatServiceServicer_to_server(script, server)
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
        server.start()
        yield f"localhost:{port}", certificate
        server.stop(0).wait()


@pytest.fixture
def address(script: Scripted) -> Iterator[str]:
    with ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool)
        chat_pb2_grpc.add_ChatServiceServicer_to_server(script, server)
        translation_pb2_grpc.add_TranslationServiceServicer_to_server(script, server)
        image_pb2_grpc.add_ImageServiceServicer_to_server(script, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        script.cancelled.set()
        server.stop(0).wait()


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address, timeout=20) as client:
        yield client


def test_the_request_holds_what_was_said(client: Client, script: Scripted) -> None:
    turns = [{"role": r, "content": c} for r, c in (("system", "a"), ("user", "b"), ("assistant", "c"), ("user", "d"))]
    client.chat(turns, model="m", temperature=0, stop="x", seed=None)
    message = chat_pb2.Message
    assert script.requests == [
        chat_pb2.ChatRequest(
            model="m",
            messages=[
                message(role=chat_pb2.ROLE_SYSTEM, content="a"), message(role=chat_pb2.ROLE_USER, content="b"),
                message(role=chat_pb2.ROLE_ASSISTANT, content="c"), message(role=chat_pb2.ROLE_USER, content="d"),
            ],
            config=chat_pb2.GenerationConfig(temperature=0, stop=["x"]),
        )
    ]  # fmt: skip
    assert script.metadata["application"] == "chat"


@pytest.mark.parametrize("code", [UNAVAILABLE, EXHAUSTED])
def test_what_was_refused_before_anything_came_is_tried_again(
    client: Client, script: Scripted, code: grpc.StatusCode
) -> None:
    script.errors = [code, code]
    assert client.chat("hi").logprobs == (TokenLogprob(7, b"hello", -0.5),)
    script.errors = [code]
    assert "".join(client.stream_chat("hi")) == "llo"
    assert len(script.requests) == 5


def test_other_errors_are_not_tried_again(client: Client, script: Scripted) -> None:
    script.errors = [INTERNAL]
    with pytest.raises(CallError, match="INTERNAL: said the script"):
        client.chat("hi")
    assert len(script.requests) == 1


@pytest.mark.parametrize(("code", "tries"), [(EXHAUSTED, 1), (UNAVAILABLE, 2)])
def test_a_full_server_says_so_itself(address: str, script: Scripted, code: grpc.StatusCode, tries: int) -> None:
    """RESOURCE_EXHAUSTED of gRPC's own is a message above its limit, as large the next time."""
    script.errors, script.metadata_of_errors = [code] * (tries + 1), None
    with Client(address, retries=1) as client, pytest.raises(CallError) as caught:
        client.chat("hi")
    assert caught.value.retryable is (code is UNAVAILABLE) and not caught.value.by_server
    assert len(script.requests) == tries


def test_a_stream_that_has_delivered_is_not_tried_again(client: Client, script: Scripted) -> None:
    script.errors, script.delivered = [UNAVAILABLE], 1
    stream = client.stream_chat("hi")
    assert next(stream) == "he"
    with pytest.raises(CallError, match="UNAVAILABLE"):
        next(stream)
    assert len(script.requests) == 1
    with pytest.raises(RuntimeError, match="has not ended"):
        _ = stream.reply


def test_it_gives_up_after_its_retries(address: str, script: Scripted) -> None:
    script.errors = [UNAVAILABLE] * 9
    with Client(address, retries=2) as client, pytest.raises(CallError, match="UNAVAILABLE"):
        client.chat("hi")
    assert len(script.requests) == 3


def test_it_does_not_wait_past_its_timeout(address: str, script: Scripted) -> None:
    script.errors = [EXHAUSTED] * 99
    with Client(address, retries=99) as client, pytest.raises(CallError, match="EXHAUSTED"):
        client.chat("hi", timeout=1.0)
    assert 1 < len(script.requests) < 8


def test_closing_a_stream_cancels_the_call(client: Client, script: Scripted) -> None:
    stream = client.stream_chat("hi", model="endless")
    next(stream)
    stream.close()
    assert script.cancelled.wait(10)


def test_leaving_a_loop_cancels_the_call_at_once(client: Client, script: Scripted) -> None:
    """Without the garbage collector's help: nothing in a stream may refer to itself."""
    gc.disable()
    try:
        for _ in client.stream_chat("hi", model="endless"):
            break
        assert script.cancelled.wait(10)
    finally:
        gc.enable()


async def test_the_async_client_retries_and_cancels_likewise(address: str, script: Scripted) -> None:
    script.errors = [UNAVAILABLE, EXHAUSTED]
    async with AsyncClient(address, timeout=20) as client:
        assert (await client.chat("hi")).text == "hello"
        script.errors = [EXHAUSTED]
        stream = client.stream_chat("hi")
        assert [piece async for piece in stream] == ["llo"]
        assert stream.reply.seed == 5
        assert len(script.requests) == 5
        script.errors = [INTERNAL]
        with pytest.raises(CallError, match="INTERNAL"):
            await client.chat("hi")
        async with client.stream_chat("hi", model="endless") as endless:
            async for _ in endless:
                break
        assert script.cancelled.wait(10)


def test_a_text_gives_its_translation_and_a_sequence_gives_a_list(client: Client, script: Scripted) -> None:
    one = client.translate("eins", source="de", target="en", num_beams=2, num_hypotheses=None)
    many = client.translate(("eins", "zwei"), model="m")
    assert many == [one, one] and (one.text, one.finish_reason) == ("best", "length")
    assert [(h.text, h.score) for h in one.hypotheses] == [("best", -0.5), ("next", -0.5)]
    config = translation_pb2.TranslationConfig(num_beams=2)
    assert script.requests == [
        translation_pb2.TranslateRequest(texts=["eins"], source_language="de", target_language="en", config=config),
        translation_pb2.TranslateRequest(model="m", texts=["eins", "zwei"], config={}),
    ]
    assert script.metadata["application"] == "translation"
    assert client.list_languages() == [LanguagePair("de", "en", ("m",))]


def test_translation_is_tried_again_and_cancelled_as_chat_is(client: Client, script: Scripted) -> None:
    script.errors = [EXHAUSTED]
    assert client.translate("eins").text == "best"
    script.errors = [UNAVAILABLE]
    stream = client.stream_translate("eins", source="de")
    assert list(stream) == ["One. ", "Two."]
    assert (stream.reply.text, stream.reply.finish_reason, stream.reply.completion_tokens) == ("One. Two.", "stop", 6)
    assert len(script.requests) == 4 and stream.reply.hypotheses == ()
    script.cancelled.clear()
    for _ in client.stream_translate("eins", model="endless"):
        break
    assert script.cancelled.wait(10)
    with pytest.raises(ValueError, match="temperature: no such field of TranslationConfig; there are: num_beams"):
        client.stream_translate("eins", temperature=1)


async def test_the_async_client_translates_likewise(address: str, script: Scripted) -> None:
    async with AsyncClient(address, timeout=20) as client:
        script.errors = [EXHAUSTED]
        assert [reply.text for reply in await client.translate(["eins"])] == ["best"]
        assert (await client.translate("eins")).text == "best"
        stream = client.stream_translate("eins")
        assert [piece async for piece in stream] == ["One. ", "Two."]
        assert stream.reply.text == "One. Two."
        assert await client.list_languages() == [LanguagePair("de", "en", ("m",))]


def test_images_are_asked_for_by_name(client: Client, script: Scripted) -> None:
    config: dict[str, Any] = {"sampler": "dpm++", "format": "webp", "num_images": 2, "seed": None}
    assert client.generate_image("a cat", negative_prompt="a dog", model="m", **config) == PICTURES
    wire = image_pb2.ImageConfig(
        sampler=image_pb2.SAMPLER_DPM_SOLVER_PP, format=image_pb2.IMAGE_FORMAT_WEBP, num_images=2
    )
    wanted: dict[str, Any] = {"model": "m", "prompt": "a cat", "negative_prompt": "a dog", "config": wire}
    assert script.requests == [image_pb2.GenerateImageRequest(**wanted)]
    assert script.metadata["application"] == "image"
    assert (
        client.edit_image("a cat", b"old", strength=0.5, negative_prompt="a dog", model="m", **config) == PICTURES[:1]
    )
    assert script.requests[1] == image_pb2.EditImageRequest(**wanted, image=b"old", strength=0.5)
    assert not script.requests[1].HasField("mask")
    client.edit_image("", b"old", mask=b"", width=64)
    assert script.requests[2].HasField("mask") and script.requests[2].config.width == 64


def test_streamed_images_come_after_their_steps(client: Client, script: Scripted) -> None:
    script.errors = [EXHAUSTED]
    stream = client.stream_generate_image("a cat", preview_every=3)
    assert list(stream) == [StepProgress(1, 2, (b"small",)), *PICTURES]
    assert stream.reply == PICTURES
    assert len(script.requests) == 2 and script.requests[0].preview_every == 3
    script.cancelled.clear()
    left = client.stream_generate_image("a cat", model="endless")
    assert next(left) == StepProgress(1, 2, (b"small",))
    with pytest.raises(RuntimeError, match="has not ended"):
        _ = left.reply
    left.close()
    assert script.cancelled.wait(10)


async def test_the_async_client_draws_likewise(address: str, script: Scripted) -> None:
    async with AsyncClient(address, timeout=20) as client:
        script.errors = [UNAVAILABLE]
        assert await client.generate_image("a cat") == PICTURES
        stream = client.stream_generate_image("a cat")
        assert [event async for event in stream] == [StepProgress(1, 2, (b"small",)), *PICTURES]
        assert stream.reply == PICTURES
        assert await client.edit_image("a cat", b"old") == PICTURES[:1]


def test_an_image_is_saved(client: Client, tmp_path: Path) -> None:
    assert client.generate_image("a cat")[1].save(tmp_path / "a.png").read_bytes() == b"\x01"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"sampler": "dpm"}, r"sampler: 'dpm' is none of ddim, dpm\+\+, euler"),
        ({"format": "gif"}, "format: 'gif' is none of png, jpeg, webp"),
        ({"steps": 3}, "steps: no such field of ImageConfig; there are: num_inference_steps"),
    ],
)
def test_an_image_that_the_protos_cannot_ask_for_is_refused_here(
    client: Client, script: Scripted, call: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        client.generate_image("a cat", **call)
    assert script.requests == []


async def test_a_request_that_is_too_large_is_not_sent(client: Client, address: str, script: Scripted) -> None:
    large, said = "x" * (4 << 20), r"request: 41943\d\d bytes, above 4194304; send less at once"
    for call in (client.chat, client.stream_chat, client.translate, client.stream_translate, client.generate_image):
        with pytest.raises(ValueError, match=said):
            call(large)
    with pytest.raises(ValueError, match=said):
        client.edit_image("a cat", large[1:].encode(), mask=b"x")
    async with AsyncClient(address) as later:
        with pytest.raises(ValueError, match=said):
            await later.chat(large)
        with pytest.raises(ValueError, match=said):
            later.stream_chat(large)
    assert script.requests == []


def test_an_error_tells_its_field_and_its_request(client: Client, script: Scripted) -> None:
    script.errors, script.metadata_of_errors = [grpc.StatusCode.INVALID_ARGUMENT], {"field": "config.top_p"}
    with pytest.raises(CallError) as caught:
        client.chat("hi")
    assert (caught.value.field, caught.value.request_id, caught.value.by_server) == ("config.top_p", "r", True)
    script.errors, script.metadata_of_errors = [INTERNAL], {}
    with pytest.raises(CallError) as caught:
        list(client.stream_chat("hi"))
    assert caught.value.field == ""


def test_it_comes_back_no_sooner_than_the_server_asks(client: Client, script: Scripted) -> None:
    script.errors, script.metadata_of_errors = [EXHAUSTED], {"retry_after_s": "0.7"}
    started = time.monotonic()
    assert client.chat("hi").text == "hello"
    assert 0.7 < time.monotonic() - started < 5


ADDRESSES = (
    "localhost:9000", "10.0.0.3:9000", "[::1]:9000", "ipv4:10.0.0.3:9000,10.0.0.4:9000", "dns:chat.example:9000",
    "dns://10.0.0.9:53/chat.example:9000", "unix:/run/chat.sock", "https://chat.example", "https://chat.example:8443/",
    "https://[::1]",
)  # fmt: skip


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_taken(address: str) -> None:
    connect(address).close()


def test_tls_has_a_port_of_its_own() -> None:
    assert [target_of(address) for address in ADDRESSES[-3:]] == [
        ("chat.example:443", True),
        ("chat.example:8443", True),
        ("[::1]:443", True),
    ]


@pytest.mark.parametrize(
    "address",
    ["", "localhost", "http://127.0.0.1:9000", "127.0.0.1:", ":9000", "::1:9000", "https://", "a b:9000", "a:x"],
)
def test_an_address_that_is_none_is_refused_with_the_fix(address: str) -> None:
    with pytest.raises(ValueError, match=r"address='.*': write HOST:PORT, or https://HOST for TLS"):
        Client(address)


def test_a_server_that_is_not_there() -> None:
    with Client("127.0.0.1:1", retries=1) as client, pytest.raises(CallError, match="UNAVAILABLE"):
        client.chat("hi")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            {"messages": "hi", "temprature": 1},
            "temprature: no such field of GenerationConfig; there are: max_new_tokens",
        ),
        ({"messages": [{"role": "bot", "content": "hi"}]}, "a role out of system, user, assistant"),
        ({"messages": [{"role": "user"}]}, "must have a content"),
    ],
)
def test_what_the_protos_cannot_hold_is_refused_here(client: Client, call: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        client.chat(**call)


def test_it_imports_nothing_heavy() -> None:
    code = "import sys, services.client; print([m for m in %r if m in sys.modules])"
    heavy = [
        "torch",
        "ray",
        "transformers",
        "pydantic",
        "numpy",
        "PIL",
        "yaml",
        "typer",
        "services.app",
        "serving",
        "training",
    ]
    told = subprocess.run([sys.executable, "-c", code % heavy], env=environment(), capture_output=True, text=True)
    assert (told.stdout, told.stderr) == ("[]\n", "")


ASK = """
import asyncio, sys
from services.address import target_of
from services.client import AsyncClient, CallError, Client
with Client(sys.argv[1], timeout=10, retries=0) as client:
    try:
        print(client.chat("hi").text)
    except CallError as error:
        print(error.code)
async def ask():
    async with AsyncClient(sys.argv[1], timeout=10, retries=0) as client:
        print((await client.chat("hi")).text)
if len(sys.argv) > 2:
    asyncio.run(ask())
"""


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed: there is no certificate")
def test_an_https_address_goes_by_tls(secure: tuple[str, Path]) -> None:
    """Roots are read once in a process: each client has one of its own."""
    address, certificate = secure

    def said(*words: str, **settings: str) -> list[str]:
        command = [sys.executable, "-c", ASK, *words]
        done = subprocess.run(command, env=environment() | settings, capture_output=True, text=True, timeout=60)
        return done.stdout.split()

    trusted = {"GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(certificate)}
    assert said(f"https://{address}", "async", **trusted) == ["hello", "hello"]
    assert said(f"https://{address}") == ["UNAVAILABLE"]  # nobody vouches for the certificate
    assert said(address, **trusted) == ["UNAVAILABLE"]  # plain text to a server that speaks TLS
