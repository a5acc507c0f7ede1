"""The services over real Ray Serve and gRPC: answers, refusals, cancellation, overload, and a replica that dies."""

import json
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2, health_pb2_grpc
from services_world import LIMITS, Server, eventually, run_command, serving, that_never_ends

from chatforge.v1 import chat_pb2, chat_pb2_grpc
from services.app import free_port
from services.client import AsyncClient, CallError, Client
from services.console import CUT
from services.transport import DETAILS_KEY

pytestmark = pytest.mark.timeout(180)

LONG = 12_000  # tokens: many seconds of work
SLOTS, WAITING = 2, 2


@pytest.fixture(scope="module")
def server(tiny_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    long = that_never_ends(tiny_world.llama, folder / "long")
    models: dict[str, dict[str, object]] = {
        "tiny": {"model": str(tiny_world.llama), **LIMITS},
        "long": {
            "model": str(long), "max_num_seqs": SLOTS, "max_waiting": WAITING,
            "context_tokens": LONG + 1000, "max_new_tokens": LONG,
        },
    }  # fmt: skip
    with serving(folder, {"port": free_port(), "chat": models, "metrics_port": free_port()}) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.address, timeout=60, retries=0) as client:
        yield client


# ---- answers


def test_a_streamed_answer_is_the_whole_answer(client: Client) -> None:
    whole = client.chat("What is tea?", model="tiny", seed=7, max_new_tokens=24, logprobs=True)
    stream = client.stream_chat("What is tea?", model="tiny", seed=7, max_new_tokens=24, logprobs=True)
    pieces = list(stream)
    assert "".join(pieces) == whole.text != ""
    assert replace(stream.reply, id=whole.id) == whole
    assert whole.completion_tokens == len(whole.logprobs) <= 24
    said = b"".join(entry.token for entry in whole.logprobs).decode(errors="ignore")  # random weights say halves, too
    assert said.startswith(whole.text.replace("\ufffd", ""))
    assert whole.finish_reason in ("stop", "length") and whole.seed == 7 and whole.model == "tiny"


def test_an_answer_without_a_seed_names_the_one_that_makes_it_again(client: Client) -> None:
    first = client.chat("What is rain?", model="tiny", max_new_tokens=12)
    again = client.chat("What is rain?", model="tiny", max_new_tokens=12, seed=first.seed)
    assert again.text == first.text


def test_the_answer_is_the_engines(client: Client, tiny_world: Any) -> None:
    """Template, sampling and limits of the wire come to the same as the engine asked directly."""
    from transformers import AutoTokenizer

    from serving.engine.api import SamplingParams
    from serving.engine.torch_engine import TorchEngine

    tokenizer = AutoTokenizer.from_pretrained(tiny_world.llama)
    turns = [{"role": "user", "content": "Was ist „Öl“? 🙂"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    params = SamplingParams(max_new_tokens=16, temperature=0.5, top_p=0.9, top_k=20, repetition_penalty=1.5, seed=3)
    expected = TorchEngine.from_folder(tiny_world.llama).generate_all([prompt], params)[0]
    reply = client.chat(
        turns, model="tiny", max_new_tokens=16, temperature=0.5, top_p=0.9, top_k=20, repetition_penalty=1.5, seed=3
    )
    assert reply.text == expected.text and reply.prompt_tokens == len(prompt)
    assert reply.completion_tokens == len(expected.token_ids)


def test_a_stop_string_is_cut_and_ends_the_answer(client: Client) -> None:
    whole = client.chat("What is snow?", model="tiny", seed=1, max_new_tokens=30)
    stop = whole.text[5:8]
    cut = client.chat("What is snow?", model="tiny", seed=1, max_new_tokens=30, stop=stop)
    assert cut.text == whole.text[: whole.text.index(stop)] and cut.finish_reason == "stop"


async def test_the_async_client_speaks_the_same(server: Server) -> None:
    async with AsyncClient(server.address, timeout=60, retries=0) as client:
        whole = await client.chat("Hello", model="tiny", seed=2, max_new_tokens=10)
        stream = client.stream_chat("Hello", model="tiny", seed=2, max_new_tokens=10)
        assert "".join([piece async for piece in stream]) == whole.text == stream.reply.text
        assert [m.name for m in await client.list_models()] == ["long", "tiny"]
        assert (await client.get_model("tiny")).name == "tiny"
        assert await client.health() == "SERVING"
        with pytest.raises(CallError, match="NOT_FOUND: name: 'x' is not served here; there are: long, tiny"):
            await client.get_model("x")


def test_models_are_described(client: Client, tiny_world: Any) -> None:
    from serving.model_folder import describe

    tiny = client.get_model("tiny")
    assert (tiny.kind, tiny.state) == ("causal-lm", "ready")
    assert tiny.revision == describe(tiny_world.llama).revision
    assert (tiny.run, tiny.stage) == ("tiny", "llama")
    assert tiny.limits == LIMITS
    assert [m.name for m in client.list_models()] == ["long", "tiny"]


def test_health_is_known_by_service(server: Server, client: Client) -> None:
    assert client.health() == client.health("chatforge.v1.ModelService") == "SERVING"
    stub = health_pb2_grpc.HealthStub(grpc.insecure_channel(server.address))
    assert stub.Check(health_pb2.HealthCheckRequest(service="chatforge.v1.ChatService")).status == 1
    watch = stub.Watch(health_pb2.HealthCheckRequest())
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()
    with pytest.raises(CallError, match="NOT_FOUND"):
        client.health("chatforge.v1.Nonsense")


def test_metrics_have_vllms_names(server: Server, client: Client) -> None:
    client.chat("Hello", model="tiny", max_new_tokens=4)
    with pytest.raises(CallError, match="NOT_FOUND"):
        client.chat("Hello", model="x")

    def published() -> bool:
        page = server.metrics()
        refused = re.search(
            r'^ray_request_errors_total\{.*application="chat".*code="NOT_FOUND".*method="Chat"', page, re.M
        )
        return all(f"ray_{name}" in page for name in METRICS) and 'model_name="tiny"' in page and refused is not None

    eventually(published, 60)


METRICS = (
    "time_to_first_token_seconds", "inter_token_latency_seconds", "request_queue_time_seconds", "prompt_tokens",
    "generation_tokens", "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
    "e2e_request_latency_seconds", "request_success_total",
)  # fmt: skip


# ---- refusals


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


ANSWERED = {"role": "assistant", "content": "Yes."}
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no messages": ({"messages": []}, "messages", "is empty"),
    "too many messages": ({"messages": [user("a")] * 5}, "messages", "has 5 messages, above the limit of 4"),
    "too many characters": ({"messages": [user("é" * 201)]}, "messages", "has 201 characters, above the limit of 200"),
    "too many tokens": ({"messages": [user("ß1" * 100)]}, "messages", "tokens, above the limit of 127"),
    "last is not the user's": ({"messages": [user("a"), ANSWERED]}, "messages", "the last message must be the user's"),
    "late system": ({"messages": [user("a"), {"role": "system", "content": "b"}, user("c")]}, "messages[1].role", ""),
    "empty content": ({"messages": [user(" ")]}, "messages[0].content", "is empty"),
    "control token": ({"messages": [user("a<|im_end|>b")]}, "messages[0].content", "control token"),
    "no tokens asked": ({"max_new_tokens": 0}, "config.max_new_tokens", "0 must be at least 1"),
    "too many asked": ({"max_new_tokens": 41}, "config.max_new_tokens", "41 is above the limit of 40"),
    "no room": ({"messages": [user("x" * 90)], "max_new_tokens": 40}, "config.max_new_tokens", "leaves of the context"),
    "temperature": ({"temperature": -0.5}, "config.temperature", "-0.5 must be between 0 and 100"),
    "not a number": ({"temperature": float("nan")}, "config.temperature", "nan must be"),
    "top_p": ({"top_p": 0.0}, "config.top_p", "must be above 0"),
    "top_k": ({"top_k": -1}, "config.top_k", "-1 must be 0"),
    "repetition_penalty": ({"repetition_penalty": 0.0}, "config.repetition_penalty", "must be above 0"),
    "seed": ({"seed": -1}, "config.seed", "-1 must be between 0 and"),
    "empty stop": ({"stop": [""]}, "config.stop[0]", "must have 1 to 256 characters, not 0"),
    "too many stops": ({"stop": ["x"] * 17}, "config.stop", "has 17 strings, above the limit of 16"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("method", ["Chat", "StreamChat"])
def test_a_request_outside_of_the_limits_is_refused_by_field(server: Server, case: str, method: str) -> None:
    request, field, why = REFUSED[case]
    error = call_error(server, method, **request)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details().startswith(f"{field}: ") and why in error.details()
    info, bad = details_of(error, ErrorInfo), details_of(error, BadRequest)
    assert info.reason == "INVALID_ARGUMENT" and info.domain == "chatforge"
    assert [(v.field, v.description) for v in bad.field_violations] == [(field, error.details())]


def test_a_role_that_is_not_set_is_refused(server: Server) -> None:
    stub = chat_pb2_grpc.ChatServiceStub(grpc.insecure_channel(server.address))
    request = chat_pb2.ChatRequest(model="tiny", messages=[chat_pb2.Message(content="hi")])
    with pytest.raises(grpc.RpcError, match=r"messages\[0\]\.role: is not set"):
        stub.Chat(request)


@pytest.mark.parametrize("method", ["Chat", "StreamChat"])
@pytest.mark.parametrize(("model", "said"), [("x", "'x' is not served here"), ("", "is empty, and there is more than")])
def test_an_unknown_model_is_told_which_there_are(server: Server, method: str, model: str, said: str) -> None:
    error = call_error(server, method, model=model)
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert error.details().startswith(f"model: {said}") and error.details().endswith("there are: long, tiny")


@pytest.mark.parametrize("method", ["Translate", "StreamTranslate", "Nonsense"])
def test_a_service_that_this_server_does_not_have_is_unimplemented(server: Server, method: str) -> None:
    assert server.replicas().keys() == {"chat", "models"}
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(channel.unary_stream(f"/chatforge.v1.TranslationService/{method}", None, None)(b"", timeout=10))
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert error.details() == (
        "this server has no chatforge.v1.TranslationService; it has: chatforge.v1.ChatService, "
        "chatforge.v1.ModelService"
    )
    assert details_of(error, ErrorInfo).reason == "UNIMPLEMENTED"


def test_health_knows_only_the_services_of_this_server(client: Client) -> None:
    with pytest.raises(CallError, match=r"NOT_FOUND: service: 'chatforge\.v1\.TranslationService' is not"):
        client.health("chatforge.v1.TranslationService")


@pytest.mark.parametrize("method", ["Chat", "StreamChat"])
def test_bytes_that_are_not_utf8_are_refused(server: Server, method: str) -> None:
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(channel.unary_stream(f"/chatforge.v1.ChatService/{method}", None, None)(b"\x0a\x01\xff", timeout=10))
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == f"{method}Request: cannot be parsed; its strings must be UTF-8"


def test_a_message_above_4_mib_is_refused(server: Server, client: Client) -> None:
    large = chat_pb2.ChatRequest(model="tiny", messages=[chat_pb2.Message(content="x" * (5 << 20))])
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        chat_pb2_grpc.ChatServiceStub(channel).Chat(large)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert client.chat("still there?", model="tiny", max_new_tokens=2).completion_tokens <= 2


# ---- slots


def test_cancelling_frees_the_slot(client: Client) -> None:
    """More long answers than there are slots, one after another: each gets its first token only in a free slot."""
    for _ in range(20):
        stream = client.stream_chat("What is bread?", model="long", max_new_tokens=LONG, timeout=20)
        assert next(stream)
        stream.close()


def test_leaving_a_loop_and_missing_a_deadline_free_the_slot(client: Client) -> None:
    for _ in range(SLOTS):
        for _piece in client.stream_chat("What is bread?", model="long", max_new_tokens=LONG):
            break
    for _ in range(SLOTS):
        with pytest.raises(CallError, match="DEADLINE_EXCEEDED"):
            client.chat("What is bread?", model="long", max_new_tokens=LONG, timeout=1)
    assert client.chat("What is bread?", model="long", max_new_tokens=2, timeout=20).completion_tokens <= 2


def test_a_client_that_stopped_reading_frees_the_slot_when_it_goes(server: Server, client: Client) -> None:
    """The proxy is then in the middle of a write, and not waiting for the replica's next message."""
    request = chat_pb2.StreamChatRequest(
        model="long",
        messages=[chat_pb2.Message(role=chat_pb2.ROLE_USER, content="What is bread?")],
        config=chat_pb2.GenerationConfig(max_new_tokens=LONG, logprobs=True),
    )
    small_window = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16))
    with grpc.insecure_channel(server.address, small_window) as channel:
        calls = [chat_pb2_grpc.ChatServiceStub(channel).StreamChat(request) for _ in range(SLOTS)]
        for call in calls:
            next(call)
        time.sleep(3)  # until the flow-control window is full
        for call in calls:
            call.cancel()
        assert client.chat("What is bread?", model="long", max_new_tokens=2, timeout=10).completion_tokens == 2


def test_overload_is_refused_at_once_and_ends(server: Server, client: Client) -> None:
    """SLOTS answer and WAITING wait; the next is RESOURCE_EXHAUSTED, and a client with patience gets through."""
    streams = [client.stream_chat("a", model="long", max_new_tokens=LONG, seed=5) for _ in range(SLOTS)]
    for stream in streams:
        next(stream)
    with ThreadPoolExecutor(WAITING) as pool, Client(server.address, timeout=60, retries=60) as patient:
        waiting = [pool.submit(patient.chat, "a", model="long", max_new_tokens=2) for _ in range(WAITING)]
        refused = first_refusal(server)
        assert "too many requests wait for this model" in refused.details()
        assert details_of(refused, RetryInfo).retry_delay.seconds == 1
        for stream in streams:
            stream.close()
        assert [call.result().completion_tokens for call in waiting] == [2] * WAITING


def first_refusal(server: Server) -> Any:
    """Asks, with short deadlines, until the queue is full: the calls before take their places one by one."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        error = call_error(server, "Chat", model="long", timeout=0.3)
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return error
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    raise AssertionError("the queue never filled")


# ---- the command's clients


def test_the_command_talks(server: Server, tmp_path: Path, client: Client) -> None:
    options = ["--server", server.address]
    said = ["--model", "tiny", "--seed", "4", "--max-new-tokens", "12"]
    expected = client.chat("What is tea?", model="tiny", seed=4, max_new_tokens=12)
    told = run_command(["chat", *options, *said, "What", "is", "tea?"], tmp_path)
    assert (told.returncode, told.stdout) == (0, expected.text + "\n")
    assert told.stderr == ("" if expected.finish_reason == "stop" else f"{CUT}\n")
    piped = run_command(["chat", *options, *said], tmp_path, stdin="What is tea?\n")
    assert (piped.returncode, piped.stdout) == (0, expected.text + "\n")
    shaped = run_command(["chat", *options, *said, "--top-k", "1", "--stop", "a", "--stop", "e", "Hello"], tmp_path)
    expected = client.chat("Hello", model="tiny", max_new_tokens=12, top_k=1, stop=["a", "e"])
    assert shaped.stdout == expected.text.replace("\r", "\n") + "\n"  # as a pipe that is read as text has it
    listed = run_command(["models", *options], tmp_path)
    cards = json.loads(run_command(["models", *options, "--json"], tmp_path).stdout)
    assert cards == [asdict(card) for card in client.list_models()]
    assert listed.returncode == 0 and "tiny" in listed.stdout and "run tiny, llama" in listed.stdout
    assert run_command(["health", *options], tmp_path).stdout == "SERVING\n"


def test_the_command_says_what_is_wrong_in_one_line(server: Server, tmp_path: Path) -> None:
    told = run_command(["chat", "--server", server.address, "--model", "x", "hi"], tmp_path)
    assert told.returncode == 2 and told.stderr == (
        "error: NOT_FOUND: model: 'x' is not served here; there are: long, tiny\n"
    )


def test_the_server_says_how_to_reach_it(server: Server) -> None:
    assert f"chatforge chat --server {server.address} --model " in server.greeting
    assert all(f"  {name:<24} " in server.greeting for name in ("tiny", "long"))
    assert server.greeting.count(", on cpu\n") == 2


# ---- a replica dies, and the end; these come last


INSIDE = ("Traceback", "actor", "Actor", "ray", "pid", "127.0.0.1", ".py", "node")


def test_a_killed_replica_comes_back_and_shows_nothing_of_the_inside(server: Server, client: Client) -> None:
    stream = client.stream_chat("a", model="long", max_new_tokens=LONG)
    next(stream)
    killed = server.replicas()["chat"]
    killed.send_signal(signal.SIGKILL)
    with pytest.raises(CallError) as caught:
        list(stream)
    assert caught.value.code == "UNAVAILABLE" and caught.value.request_id
    assert not [word for word in INSIDE if word in caught.value.details]
    with Client(server.address, timeout=60) as patient:
        assert patient.chat("Hello", model="tiny", max_new_tokens=3).completion_tokens <= 3
    eventually(lambda: client.health() == "SERVING")
    assert client.get_model("tiny").state == "ready"
    assert server.replicas()["chat"].pid != killed.pid


def test_ctrl_c_ends_every_process_and_leaves_no_file(server: Server) -> None:
    family = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    arguments = " ".join(argument for process in family for argument in process.cmdline())
    scratch = Path(re.search(r"temp_dir=(\S+)", arguments)[1])  # type: ignore[index]
    assert scratch.is_dir()
    server.process.send_signal(signal.SIGINT)
    out, err = server.process.communicate(timeout=60)
    assert (server.process.returncode, err) == (130, "") and "Traceback" not in out
    assert psutil.wait_procs(family, timeout=20)[1] == []
    assert not scratch.exists()


# ---- helpers


def call_error(server: Server, method: str, timeout: float = 30, **wanted: Any) -> Any:
    """The raw error of a call to "tiny" that has to fail, as any gRPC client sees it; no `application` is sent."""
    from services.replies import chat_request

    kind = {"Chat": chat_pb2.ChatRequest, "StreamChat": chat_pb2.StreamChatRequest}[method]
    request = chat_request(kind, wanted.pop("messages", "hello"), wanted.pop("model", "tiny"), wanted)
    with grpc.insecure_channel(server.address) as channel:
        call = getattr(chat_pb2_grpc.ChatServiceStub(channel), method)
        with pytest.raises(grpc.RpcError) as caught:
            answer = call(request, timeout=timeout)
            if method == "StreamChat":
                list(answer)
    return caught.value


def details_of(error: Any, kind: type) -> Any:
    """The detail of type `kind` in the error's google.rpc.Status, whose code and text must be the call's."""
    status = Status.FromString(dict(error.trailing_metadata())[DETAILS_KEY])
    assert (status.code, status.message) == (error.code().value[0], error.details())
    found = kind()
    assert any(detail.Unpack(found) for detail in status.details)
    return found
