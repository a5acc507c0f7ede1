"""TranslationService over real Ray Serve and gRPC, on a server that chats too."""

import itertools
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from services_world import LIMITS, Server, environment, eventually, run_command, serving

from chatforge.v1 import common_pb2, translation_pb2, translation_pb2_grpc
from services.app import free_port
from services.client import AsyncClient, CallError, Client, LanguagePair
from services.interpreter import CUT
from services.replies import stream_translate_request, translate_request
from services.transport import DETAILS_KEY

pytestmark = pytest.mark.timeout(180)

TRANSLATION_LIMITS = {"max_new_tokens": 8, "max_characters": 12_000, "max_texts": 40, "max_num_beams": 3}
WAITING = 60  # sentences, each of which keeps "slow" busy for a good part of a second
LONG = "\n".join(f"Frase {i}." for i in range(WAITING))
TEXTS = ["Guten Tag, Welt!", "", "Wie geht es? Gut.\nUnd dir?", "ein Haus am See", " \t\n", "blau", "Guten Tag, Welt!"]
LANGUAGES = "there are: de to en, pt-BR to en"


@pytest.fixture(scope="module")
def server(tiny_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """ "tiny" chats, "de-en" translates a few words of everything, "slow" one sentence after another at length."""
    model = {"model": str(tiny_world.translation)}
    slow = {"max_batch_tokens": 16, "max_waiting": WAITING, "source_language": "pt-BR", "max_new_tokens": 250}
    config = {
        "port": free_port(),
        "metrics_port": free_port(),
        "chat": {"tiny": {"model": str(tiny_world.llama), **LIMITS}},
        "translation": {"de-en": model | TRANSLATION_LIMITS, "slow": model | slow},
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
        yield translation_pb2_grpc.TranslationServiceStub(channel)


# ---- translations


def test_the_translations_are_the_translators_in_the_texts_order(client: Client, tiny_world: Any) -> None:
    from serving.translation.api import TranslationParams
    from serving.translation.translator import Translator

    knobs: dict[str, Any] = {"num_beams": 3, "num_hypotheses": 2, "length_penalty": 0.75, "max_new_tokens": 6}
    translator = Translator(tiny_world.translation)
    expected = translator.translate_all(TEXTS, TranslationParams(**knobs))
    unset = translator.translate_all(TEXTS, replace(translator.defaults, max_new_tokens=8))
    translator.close()
    replies = client.translate(TEXTS, source="de", target="en", **knobs)
    for reply, translation in zip(replies, expected, strict=True):
        assert [(h.text, h.finish_reason) for h in reply.hypotheses] == [
            (h.text, h.finish_reason) for h in translation.hypotheses
        ]
        assert [h.score for h in reply.hypotheses] == pytest.approx([h.score for h in translation.hypotheses], abs=1e-5)
        assert (reply.prompt_tokens, reply.completion_tokens) == (
            translation.prompt_tokens, translation.completion_tokens,
        )  # fmt: skip
        assert (reply.model, reply.source_language, reply.target_language) == ("de-en", "de", "en")
    assert len({reply.text for reply in replies}) == len(set(TEXTS))
    assert [r.text for r in client.translate(TEXTS, model="de-en")] == [t.hypotheses[0].text for t in unset]


def test_a_text_without_words_is_itself(client: Client) -> None:
    for text in ("", " \t\n\n", "🙂\t👍🏽 12 €\r\n", "שלום עולם!\tمرحبا"):
        reply, stream = client.translate(text, model="de-en"), client.stream_translate(text, model="de-en")
        assert (reply.text, reply.finish_reason, reply.completion_tokens) == (text, "stop", 0)
        assert "".join(stream) == text
        assert replace(stream.reply, id=reply.id, hypotheses=reply.hypotheses) == reply


def test_what_stands_around_the_words_survives(client: Client) -> None:
    text = "  Haus\t🙂 \u202bשלום\u202c\n\n\tMaus  👩‍👩‍👧\r\n"
    translated = client.translate(text, model="de-en").text
    assert translated.startswith("  ") and translated.endswith("  👩‍👩‍👧\r\n") and "\t🙂 " in translated
    assert translated.count("\n") == 3 and "\n\n\t" in translated


def test_a_streamed_document_is_the_translated_text(client: Client, stub: Any) -> None:
    document = "Guten Tag, Welt! Wie geht es?\n\n  ein Haus am See\n"
    whole = client.translate(document, source="de")
    stream = client.stream_translate(document, source="de")
    pieces = list(stream)
    assert "".join(pieces) == whole.text and len(pieces) == 3
    assert replace(stream.reply, id=whole.id, hypotheses=whole.hypotheses) == whole
    *before, last = stub.StreamTranslate(translation_pb2.StreamTranslateRequest(model="de-en", text=document))
    told = {"id", "model", "delta", "source_language", "target_language"}
    assert all({field.name for field, _ in message.ListFields()} == told for message in before)
    assert (last.delta, last.finish_reason) == ("", common_pb2.FINISH_REASON_LENGTH)
    assert last.usage.completion_tokens == whole.completion_tokens > 0


def test_ten_thousand_characters_on_one_line(client: Client) -> None:
    text = ("viele Worte ohne Punkt und Komma " * 304)[:10_000]
    translated = client.translate(text, model="de-en", num_beams=1)
    assert translated.text and "\n" not in translated.text and translated.prompt_tokens > 1000
    assert "".join(client.stream_translate(text, model="de-en", num_beams=1)) == translated.text


async def test_the_async_client_speaks_the_same(server: Server, client: Client) -> None:
    async with AsyncClient(server.address, timeout=60, retries=0) as asynchronous:
        replies = await asynchronous.translate(TEXTS, source="de", num_beams=1)
        assert [r.text for r in replies] == [r.text for r in client.translate(TEXTS, source="de", num_beams=1)]
        stream = asynchronous.stream_translate(TEXTS[0], source="de", num_beams=1)
        assert "".join([piece async for piece in stream]) == replies[0].text == stream.reply.text
        assert await asynchronous.list_languages() == client.list_languages()


# ---- which model


@pytest.mark.parametrize(
    ("wanted", "model"),
    [
        ({"source": "de"}, "de-en"),
        ({"source": "DE-at", "target": "EN"}, "de-en"),
        ({"source": "pt", "target": "en-GB"}, "slow"),
        ({"model": "slow", "source": "pt-BR"}, "slow"),
    ],
)
def test_languages_choose_the_model(client: Client, wanted: dict[str, str], model: str) -> None:
    assert client.translate("Um.", **wanted, max_new_tokens=1).model == model


NOT_FOUND = {
    "source": ({"source": "fr", "target": "en"}, f"source_language: 'fr' is not translated here; {LANGUAGES}"),
    "target": (
        {"source": "de", "target": "pt"},
        "target_language: nothing is translated into 'pt' here; there are: de to en",
    ),
    "a variety": ({"source": "pt-PT"}, f"source_language: 'pt-PT' is not translated here; {LANGUAGES}"),
    "not the model's": (
        {"model": "slow", "source": "de"}, "source_language: 'de' is not translated by 'slow'; there are: pt-BR to en",
    ),
    "no choice made": ({}, "model: is empty, and there is more than one; there are: de-en, slow"),
    "half a choice": ({"target": "en"}, f"source_language: is empty, and there is more than one; {LANGUAGES}"),
    "model": ({"model": "tiny"}, "model: 'tiny' is not served here; there are: de-en, slow"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_FOUND)
def test_what_is_not_translated_is_told_by_field(stub: Any, case: str) -> None:
    wanted, said = NOT_FOUND[case]
    for method in ("Translate", "StreamTranslate"):
        error = call_error(stub, method, **wanted)
        assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, said)
        assert details_of(error, BadRequest).field_violations[0].field == said.partition(":")[0]


def test_languages_are_listed(client: Client) -> None:
    assert client.list_languages() == [LanguagePair("de", "en", ("de-en",)), LanguagePair("pt-BR", "en", ("slow",))]


def test_models_of_both_kinds_are_listed(server: Server, client: Client, tiny_world: Any, tmp_path: Path) -> None:
    from serving.model_folder import describe

    kinds = {model.name: model.kind for model in client.list_models()}
    assert kinds == {"de-en": "translation", "slow": "translation", "tiny": "causal-lm"}
    model = client.get_model("de-en")
    assert model.limits == TRANSLATION_LIMITS
    assert (model.source_language, model.target_language) == ("de", "en")
    assert model.revision == describe(tiny_world.translation).revision
    assert (model.run, model.stage) == ("tiny", "translation")
    table = run_command(["models", "--server", server.address], tmp_path).stdout
    assert "translation, de to en" in table and "translation, pt-BR to en" in table and "causal-lm" in table


def test_the_server_says_how_to_reach_both(server: Server) -> None:
    assert f"chatforge chat --server {server.address} --model tiny" in server.greeting
    assert f"chatforge translate --server {server.address} --model de-en" in server.greeting
    assert server.replicas().keys() == {"chat", "translation", "models"}


def test_a_service_without_models_has_no_application(tiny_world: Any) -> None:
    from services.app import applications
    from services.config import load_config

    config = load_config(None, translation={"de-en": {"model": str(tiny_world.translation)}})
    assert applications(config).keys() == {"translation", "models"}


# ---- refusals


NAN, INFINITE = float("nan"), float("inf")
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no texts": ({"texts": []}, "texts", "is empty; send at least one text"),
    "too many texts": ({"texts": ["a"] * 41}, "texts", "has 41 texts, above the limit of 40"),
    "a long text": ({"texts": ["a", "é" * 12_001]}, "texts[1]", "has 12001 characters, above the limit of 12000"),
    "long texts": ({"texts": ["a" * 6000] * 3}, "texts", "has 18000 characters, above the limit of 12000"),
    "many beams": ({"num_beams": 4}, "config.num_beams", "4 is above the limit of 3"),
    "no beams": ({"num_beams": 0}, "config.num_beams", "0 must be between 1 and 32"),
    "hypotheses": ({"num_hypotheses": 3}, "config.num_hypotheses", "3 must be between 1 and num_beams=2"),
    "no hypotheses": ({"num_hypotheses": 0}, "config.num_hypotheses", "0 must be between 1 and num_beams=2"),
    "many tokens": ({"max_new_tokens": 9}, "config.max_new_tokens", "9 is above the limit of 8"),
    "no tokens": ({"max_new_tokens": 0}, "config.max_new_tokens", "0 must be at least 1"),
    "penalty": ({"length_penalty": -10.5}, "config.length_penalty", "-10.5 must be between -10 and 10"),
    "not a number": ({"length_penalty": NAN}, "config.length_penalty", "nan must be between -10 and 10"),
    "infinite": ({"length_penalty": INFINITE}, "config.length_penalty", "inf must be between -10 and 10"),
}


@pytest.mark.parametrize(("method", "case"), itertools.product(["Translate", "StreamTranslate"], REFUSED))
def test_a_request_outside_of_the_limits_is_refused_by_field(stub: Any, method: str, case: str) -> None:
    request, field, why = REFUSED[case]
    if method == "StreamTranslate" and "texts" in request:
        request, field = {"texts": "é" * 12_001}, "text"
        why = "has 12001 characters, above the limit of 12000"
    error = call_error(stub, method, model="de-en", **request)
    assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, f"{field}: {why}")
    assert [v.field for v in details_of(error, BadRequest).field_violations] == [field]


def test_a_stream_has_one_hypothesis(stub: Any) -> None:
    error = call_error(stub, "StreamTranslate", model="de-en", num_hypotheses=2)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "config.num_hypotheses: 2 is above 1, which a stream has"


NOT_UTF8 = b"\x12\x04\xff\xfe\xff\xfe"  # field 2, four bytes
INSIDE = ("Traceback", "actor", "Actor", "ray", "pid", "127.0.0.1", ".py", "node", "Decode", "class")


@pytest.mark.parametrize("method", ["Translate", "StreamTranslate"])
@pytest.mark.parametrize("sent", [NOT_UTF8, b"\xff\xff\xff"], ids=["not UTF-8", "no protobuf"])
def test_bytes_that_are_no_request_are_refused_without_words_of_the_inside(
    server: Server, method: str, sent: bytes
) -> None:
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(channel.unary_stream(f"/chatforge.v1.TranslationService/{method}", None, None)(sent, timeout=10))
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == f"{method}Request: cannot be parsed; its strings must be UTF-8"
    assert details_of(error, ErrorInfo).metadata["request_id"]
    assert not [word for word in INSIDE if word in repr(error.trailing_metadata())]


# ---- load


def test_cancelling_leaving_and_missing_a_deadline_free_the_translator(server: Server, client: Client) -> None:
    """Each of them leaves many seconds of work, and is refused unless that of the one before has gone."""
    with Client(server.address, timeout=5) as patient:  # it has a moment's patience: cancelling takes a step
        for _ in range(2):
            stream = patient.stream_translate(LONG, model="slow")
            assert next(stream)
            stream.close()
            for _piece in patient.stream_translate(LONG, model="slow"):
                break
            with pytest.raises(CallError, match="DEADLINE_EXCEEDED"):
                patient.translate(LONG, model="slow", timeout=1)
            eventually(lambda: answers_at_once(client), 5)


def answers_at_once(client: Client) -> bool:
    try:
        return bool(client.translate("Um.", model="slow", max_new_tokens=1, timeout=1.5).text)
    except CallError as error:
        assert error.code == "DEADLINE_EXCEEDED"
        return False


def test_overload_is_refused_at_once_and_ends(server: Server, client: Client, stub: Any) -> None:
    with client.stream_translate(LONG, model="slow") as stream:
        next(stream)
        refused = call_error(stub, "Translate", model="slow", texts=LONG)
        assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused.details() == "too many requests wait for this model; try again later"
        assert details_of(refused, RetryInfo).retry_delay.seconds == 1
        with ThreadPoolExecutor(1) as pool, Client(server.address, timeout=60) as patient:
            waiting = pool.submit(patient.translate, LONG, model="slow", max_new_tokens=1)
            stream.close()
            assert waiting.result().text.count("\n") == WAITING - 1


def test_metrics_have_vllms_names(server: Server, client: Client) -> None:
    client.translate("Haus", model="de-en")

    def published() -> bool:
        page = server.metrics()
        lines = [line for line in page.splitlines() if 'model_name="de-en"' in line]
        return all(any(line.startswith(f"ray_{name}") for line in lines) for name in METRICS)

    eventually(published, 60)


METRICS = (
    "e2e_request_latency_seconds", "request_success_total", "translated_texts", "prompt_tokens", "generation_tokens",
    "num_requests_running", "num_requests_waiting",
)  # fmt: skip


# ---- the command


def test_the_command_translates(server: Server, client: Client, tmp_path: Path) -> None:
    options = ["translate", "--server", server.address, "--from", "de", "--to", "en", "--num-beams", "2"]
    expected = client.translate("Wie geht es?", source="de", num_beams=2, num_hypotheses=2)
    told = run_command([*options, "Wie", "geht", "es?"], tmp_path)
    assert (told.returncode, told.stdout) == (0, expected.text + "\n")
    assert told.stderr == ("" if expected.finish_reason == "stop" else f"{CUT}\n")
    both = run_command([*options, "--num-hypotheses", "2", "Wie geht es?"], tmp_path)
    assert both.stdout == "".join(f"{h.score:.3f}\t{h.text}\n" for h in expected.hypotheses)


def test_two_hundred_lines_stay_two_hundred(server: Server, client: Client, tmp_path: Path) -> None:
    lines = [("" if i % 10 == 3 else f"{' ' * (i % 3)}Zeile {i} mit Wort.") for i in range(200)]
    document = "\n".join(lines)  # whose last line has no end
    options = ["translate", "--server", server.address, "--from", "de", "--num-beams", "1"]
    (tmp_path / "d.txt").write_text("\ufeff" + document, "utf-8")
    from_file = run_command([*options, "--file", "d.txt"], tmp_path)
    piped = run_command(options, tmp_path, stdin=document)
    assert from_file.returncode == 0 and from_file.stderr in ("", f"{CUT}\n") and piped.stdout == from_file.stdout
    translated = piped.stdout.split("\n")
    assert len(translated) == 200
    assert [line[:1].isspace() or not line for line in lines] == [t[:1].isspace() or not t for t in translated]
    assert piped.stdout == client.translate(document, source="de", num_beams=1).text


def test_the_command_refuses_what_is_not_utf8_by_name_and_byte(server: Server, tmp_path: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes("Grüße".encode("latin-1"))
    options = ["translate", "--server", server.address]
    told = run_command([*options, "--file", "latin1.txt"], tmp_path)
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr == "error: latin1.txt: not UTF-8: byte 2 is 0xfc\n"
    piped = subprocess.run(
        [sys.executable, "-m", "services.cli", *options], input=b"abc\xff", env=environment(), capture_output=True
    )
    assert (piped.returncode, piped.stderr) == (2, b"error: stdin: not UTF-8: byte 3 is 0xff\n")


# ---- a replica dies; this comes last


def test_a_killed_replica_comes_back_and_the_other_service_does_not_notice(server: Server, client: Client) -> None:
    stream = client.stream_translate(LONG, model="slow")
    next(stream)
    killed = server.replicas()["translation"]
    killed.send_signal(signal.SIGKILL)
    with pytest.raises(CallError) as caught:
        list(stream)
    assert caught.value.code == "UNAVAILABLE"
    assert not [word for word in INSIDE if word in caught.value.details]
    assert client.chat("Hello", model="tiny", max_new_tokens=3).completion_tokens <= 3
    eventually(lambda: client.health("chatforge.v1.TranslationService") == "NOT_SERVING", 10)
    assert (client.health(), client.health("chatforge.v1.ChatService")) == ("NOT_SERVING", "SERVING")
    with Client(server.address, timeout=60, retries=20) as patient:
        assert patient.translate("Haus", model="de-en").text
    eventually(lambda: client.health() == client.health("chatforge.v1.TranslationService") == "SERVING")
    assert server.replicas()["translation"].pid != killed.pid


# ---- helpers


def call_error(stub: Any, method: str, timeout: float = 30, **wanted: Any) -> Any:
    """The raw error of a call that has to fail."""
    make = {"Translate": translate_request, "StreamTranslate": stream_translate_request}[method]
    languages = wanted.pop("source", ""), wanted.pop("target", "")
    request = make(wanted.pop("texts", "Guten Tag!"), languages, wanted.pop("model", ""), wanted)
    with pytest.raises(grpc.RpcError) as caught:
        answer = getattr(stub, method)(request, timeout=timeout)
        if method == "StreamTranslate":
            list(answer)
    return caught.value


def details_of(error: Any, kind: type) -> Any:
    """The detail of type `kind` in the error's google.rpc.Status, whose code and text must be the call's."""
    status = Status.FromString(dict(error.trailing_metadata())[DETAILS_KEY])
    assert (status.code, status.message) == (error.code().value[0], error.details())
    found = kind()
    assert any(detail.Unpack(found) for detail in status.details)
    return found
