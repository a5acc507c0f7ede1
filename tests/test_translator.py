"""Translator: what it promises to many callers at once, and that every kind of folder is taken."""

import asyncio
import shutil
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import M2M100Tokenizer, MarianTokenizer, MBart50Tokenizer, MBartTokenizer, NllbTokenizer
from translation_world import EOS, build_folder, build_opus_folder

from serving.api import EngineClosed, QueueFull
from serving.model_folder import load_causal_lm, load_translation
from serving.translation.api import Hypothesis, Translation, TranslationParams
from serving.translation.batching import Call, Waiting, pick
from serving.translation.codec import Codec
from serving.translation.translator import Translator

GREEDY = TranslationParams(1, max_new_tokens=8)
BEAMS = TranslationParams(3, 0.8, 2, max_new_tokens=8)
FOREVER = TranslationParams(1, max_new_tokens=60)
TEXTS = ["Der Hund. Die Katze!\n\n  Das Haus?\r\n", "", "12 😀", "Der Hund. Wo ist er? Der Hund.", "Buch\tTisch 😀"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_folder(tmp_path_factory.mktemp("translation"))


@pytest.fixture(scope="module")
def endless_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_folder(tmp_path_factory.mktemp("endless"), endless=True)


@pytest.fixture
def translator(folder: Path) -> Iterator[Translator]:
    translator = Translator(folder)
    yield translator
    translator.close()


@pytest.fixture
def endless(endless_folder: Path) -> Iterator[Translator]:
    """One sentence a batch, and four that may wait."""
    translator = Translator(endless_folder, max_batch_tokens=1, max_waiting=4)
    yield translator
    translator.close()


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "did not happen within a minute"
        await asyncio.sleep(0.001)


def idle(translator: Translator) -> bool:
    stats = translator.stats()
    return stats.num_requests_running == stats.num_requests_waiting == 0


@pytest.mark.parametrize("params", [GREEDY, BEAMS])
async def test_together_alone_and_streamed_are_the_same(translator: Translator, params: TranslationParams) -> None:
    together = await translator.translate(TEXTS, params)
    assert translator.translate_all(TEXTS, params) == together
    many = await asyncio.gather(*(translator.translate([text], params) for text in TEXTS))
    for (alone,), want in zip(many, together, strict=True):
        assert [h.text for h in alone.hypotheses] == [h.text for h in want.hypotheses]
        assert [h.score for h in alone.hypotheses] == pytest.approx([h.score for h in want.hypotheses], rel=1e-4)
    for text, want in zip(TEXTS, together, strict=True):
        pieces = [piece async for piece in translator.stream(text, params)]
        assert "".join(piece.text for piece in pieces) == want.hypotheses[0].text
        assert sum(piece.prompt_tokens for piece in pieces) == want.prompt_tokens
        assert sum(piece.completion_tokens for piece in pieces) == want.completion_tokens


def test_a_text_is_its_sentences_translations_in_their_places(translator: Translator) -> None:
    sentences = ["Der Hund.", "Die Katze!", "Das Haus?"]
    parts = [each.hypotheses for each in translator.translate_all(sentences, BEAMS)]
    (whole,) = translator.translate_all(TEXTS[:1], BEAMS)
    for n, hypothesis in enumerate(whole.hypotheses):
        a, b, c = (part[n] for part in parts)
        assert hypothesis.text == f"{a.text} {b.text}\n\n  {c.text}\r\n"
        assert hypothesis.score == pytest.approx(a.score + b.score + c.score, rel=1e-4)
        assert (hypothesis.finish_reason == "length") == any(part.finish_reason == "length" for part in (a, b, c))
    assert len(whole.hypotheses) == 2


def test_a_sentence_is_what_the_model_generates(folder: Path, translator: Translator) -> None:
    model, tokenizer = load_translation(folder)
    out = model.generate(
        **tokenizer("Das Haus?", return_tensors="pt"), num_beams=3, length_penalty=0.8, max_new_tokens=8
    )
    want = " ".join(tokenizer.decode(out[0], skip_special_tokens=True).splitlines()).strip()
    ((best, _),) = (t.hypotheses for t in translator.translate_all(["Das Haus?"], BEAMS))
    assert best.text == want


def test_what_has_nothing_to_translate_is_itself(translator: Translator) -> None:
    texts = ["", "\n", "12.5 %", "😀 👍🏽", "مرحبا بالعالم"]
    assert translator.translate_all(texts, BEAMS) == [
        Translation((Hypothesis(text, 0.0, "stop"),) * 2, 0, 0) for text in texts
    ]
    assert translator.translate_all([], BEAMS) == []


def test_a_document_keeps_its_lines(translator: Translator) -> None:
    breaks = ("\n", "\r\n")
    text = "".join(f"{'  ' * (n % 3)}Zeile {n % 7}.{breaks[n % 2]}" for n in range(200))
    ((best,),) = (t.hypotheses for t in translator.translate_all([text], GREEDY))
    ends = [line[len(line.rstrip()) :] for line in text.splitlines(keepends=True)]
    assert [line[len(line.rstrip()) :] for line in best.text.splitlines(keepends=True)] == ends


def test_a_sentence_too_long_for_the_model_is_cut(translator: Translator) -> None:
    assert translator.max_source_tokens == 64
    words, word = " ".join(["Haus"] * 300), "x" * 10_000
    for text in (words, word):
        (translation,) = translator.translate_all([text], GREEDY)
        assert translation.prompt_tokens >= len(text) / 8
        assert translation.hypotheses[0].text


def test_a_repeated_sentence_is_translated_once_and_counted_each_time(translator: Translator) -> None:
    once, twice = translator.translate_all(["Der Hund.", "Der Hund. Der Hund."], GREEDY)
    assert twice.hypotheses[0].text == " ".join([once.hypotheses[0].text] * 2)
    assert twice.prompt_tokens == 2 * once.prompt_tokens
    assert translator.stats().prompt_tokens == once.prompt_tokens
    assert translator.stats().generation_tokens == once.completion_tokens


def test_max_new_tokens_ends_with_length(endless: Translator) -> None:
    (translation,) = endless.translate_all(["Der Hund. 12"], GREEDY)
    assert translation.hypotheses[0].finish_reason == "length"
    assert translation.completion_tokens == 8


async def test_pieces_come_before_the_text_is_done(endless: Translator) -> None:
    async with aclosing(endless.stream("Eins ist da. Zwei ist da. Drei ist da.", FOREVER)) as pieces:
        first = await anext(pieces)
        assert first.finish_reason == "length"
        assert endless.stats().num_requests_waiting >= 1
    await until(lambda: idle(endless))


async def test_a_cancelled_call_leaves_at_once(endless: Translator) -> None:
    before = endless.stats().generation_tokens
    task = asyncio.create_task(endless.translate(["Eins. Zwei. Drei. Vier."], FOREVER))
    await until(lambda: endless.stats().num_requests_running == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert endless.stats().num_requests_waiting == 0
    await until(lambda: idle(endless))
    assert endless.stats().generation_tokens - before <= FOREVER.max_new_tokens
    assert (await endless.translate(["Buch"], GREEDY))[0].completion_tokens == 8


async def test_a_full_queue_refuses_and_takes_again_later(endless: Translator) -> None:
    running = asyncio.create_task(endless.translate(["Eins"], FOREVER))
    await until(lambda: endless.stats().num_requests_running == 1)
    waiting = asyncio.create_task(endless.translate(["Zwei ist. Drei ist. Vier ist."], FOREVER))
    await until(lambda: endless.stats().num_requests_waiting == 3)
    with pytest.raises(QueueFull, match="3 sentences wait already and 2 are new"):
        await endless.translate(["Buch da. Tisch da."], GREEDY)
    assert len(await endless.translate(["12"], GREEDY)) == 1  # what needs no place is always taken
    waiting.cancel()
    assert len(await endless.translate(["Buch da. Tisch da."], GREEDY)) == 1
    await running


async def test_a_request_with_more_sentences_than_may_wait_is_taken_when_none_waits(endless: Translator) -> None:
    numbers = ("Eins", "Zwei", "Drei", "Vier", "Fünf", "Sechs")
    (translation,) = await endless.translate([" ".join(f"{number} ist da." for number in numbers)], GREEDY)
    assert translation.completion_tokens == len(numbers) * 8  # of which four may wait


async def test_calls_of_different_params_share_the_translator(translator: Translator) -> None:
    each = [TranslationParams(1 + n % 3, max_new_tokens=2 + n) for n in range(9)]
    results = await asyncio.gather(*(translator.translate(TEXTS, params) for params in each))
    assert results == [translator.translate_all(TEXTS, params) for params in each]


async def test_drain_lets_the_open_end_and_takes_no_more(endless: Translator) -> None:
    running = asyncio.create_task(endless.translate(["Eins ist. Zwei ist."], FOREVER))
    await until(lambda: endless.stats().num_requests_running == 1)
    await endless.drain()
    assert (await running)[0].completion_tokens == 120
    with pytest.raises(EngineClosed):
        await endless.translate(["Eins"], GREEDY)


async def test_close_ends_what_runs_and_joins_the_thread(endless: Translator) -> None:
    others = set(threading.enumerate())
    running = asyncio.create_task(endless.translate(["Eins ist. Zwei ist."], FOREVER))
    await until(lambda: endless.stats().num_requests_running == 1)
    endless.close()
    with pytest.raises(EngineClosed):
        await running
    assert "translator" not in {thread.name for thread in set(threading.enumerate()) - others}
    endless.close()


async def test_a_failing_batch_ends_its_calls_and_not_the_translator(
    translator: Translator, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(translator._decoder, "decode", lambda *batch: iter([1 / 0]))
        with pytest.raises(ZeroDivisionError):
            await translator.translate(TEXTS, GREEDY)
    await until(lambda: idle(translator))
    assert len(await translator.translate(TEXTS, GREEDY)) == len(TEXTS)


async def test_a_lost_device_is_known_and_a_full_one_is_not_lost(
    translator: Translator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, lost in ((torch.OutOfMemoryError("full"), False), (torch.AcceleratorError("gone"), True)):

        def fail(*batch: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(translator._decoder, "decode", fail)
        with pytest.raises(type(error)):
            await translator.translate(TEXTS, GREEDY)
        await until(lambda: idle(translator))
        assert translator.device_is_lost == lost


async def test_a_letter_that_becomes_many_does_not_pass_the_models_limit(translator: Translator) -> None:
    """Unicode's normal forms make four bytes twelve: longer than the positions that there are."""
    limit = translator.max_source_tokens
    text = "a" + "\U0001d160" * ((limit - 9) // 4)
    assert len(text.encode()) + 8 <= limit
    (translated,) = await translator.translate([text], GREEDY)
    assert len(translated.hypotheses) == 1


def waiting(*lengths: int, beams: int = 1) -> list[Waiting]:
    call = Call({str(i): [EOS] * n for i, n in enumerate(lengths)}, TranslationParams(beams))
    return [Waiting(sentence, call) for sentence in call.sources]


def test_a_batch_is_the_oldest_and_those_nearest_in_length() -> None:
    queue = [*waiting(20), *waiting(21, beams=2), *waiting(90, 30, 19, 25)]
    assert [len(w.source) for w in pick(queue, 3 * 25)] == [20, 19, 25]
    assert [len(w.source) for w in pick(queue, 1)] == [20]
    assert [len(w.source) for w in pick(queue[1:], 4096)] == [21]
    assert len(pick(waiting(*[2] * 100), 160)) == 10  # a short one counts as 16 tokens


def test_the_folder_names_languages_and_defaults(folder: Path, translator: Translator) -> None:
    assert (translator.source_language, translator.target_language) == ("de", "en")
    assert translator.defaults == TranslationParams(3, 0.8)
    other = Translator(folder, target_language="en-GB")
    assert other.target_language == "en-GB"
    other.close()


def test_folders_that_cannot_be_served_are_refused(folder: Path, tmp_path: Path, tiny_world: Any) -> None:
    with pytest.raises(ValueError, match="holds a causal-lm model; a translation is needed"):
        Translator(tiny_world.llama)
    with pytest.raises(ValueError, match="holds a translation model; a causal-lm is needed"):
        load_causal_lm(folder)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "chatforge.json").write_text("{}")
    with pytest.raises(ValueError, match="set source_language"):
        Translator(copy)
    with pytest.raises(ValueError, match="backend='onnx'"):
        Translator(folder, backend="onnx")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_waiting=0"):
        Translator(folder, max_waiting=0)
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights"):
        load_translation(copy)


@pytest.fixture(scope="module")
def opus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_opus_folder(tmp_path_factory.mktemp("opus-mt-de-en"))


def test_an_opus_mt_folder_is_served(opus_folder: Path) -> None:
    translator = Translator(opus_folder)
    assert (translator.source_language, translator.target_language) == ("de", "en")
    assert isinstance(translator._codec._tokenizer, MarianTokenizer)
    text = "der hund sah die katze.\n  der see"
    (translation,) = translator.translate_all([text], translator.defaults)
    translator.close()
    model, tokenizer = load_translation(opus_folder)
    want = []
    for sentence in ("der hund sah die katze.", "der see"):
        out = model.generate(**tokenizer(sentence, return_tensors="pt"), num_beams=2, max_new_tokens=64)
        want.append(tokenizer.decode(out[0], skip_special_tokens=True).strip())
    assert translation.hypotheses[0].text == "\n  ".join(want)


def test_a_text_in_another_form_has_the_same_tokens(folder: Path) -> None:
    """Decomposed letters, no-break spaces and double ones: models are taught NFC with single spaces."""
    _, tokenizer = load_translation(folder)
    codec = Codec(tokenizer, "de", "en")
    wanted, *others = codec.encode(["süße z. B.", unicodedata.normalize("NFD", "süße z. B."), "süße z.\u00a0B.  "])
    assert others == [wanted, wanted]
    assert codec.encode_targets(["Cafe\u0301"]) == codec.encode_targets(["Café"])


def test_control_tokens_in_a_text_are_text(folder: Path) -> None:
    _, tokenizer = load_translation(folder)
    codec = Codec(tokenizer, "de", "en")
    for encode in (codec.encode, codec.encode_targets):
        (ids,) = encode([f"Haus {tokenizer.eos_token} da {tokenizer.pad_token} x"])
        assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.pad_token_id not in ids


@pytest.mark.parametrize(
    ("tokenizer", "source", "target", "first"),
    [
        (NllbTokenizer, "deu-Latn", "eng_Latn", "eng_Latn"),
        (MBart50Tokenizer, "de", "en", "en_XX"),
        (MBartTokenizer, "de-DE", "ro", None),
    ],
)
def test_a_multilingual_tokenizer_is_set_to_the_languages(
    tokenizer: Any, source: str, target: str, first: str | None
) -> None:
    multilingual = tokenizer()
    codec = Codec(multilingual, source, target)
    assert multilingual.src_lang in multilingual.convert_ids_to_tokens(codec.encode(["x"])[0])
    assert multilingual.src_lang.startswith("de")
    (made,) = codec.encode_targets(["x"])
    assert multilingual.tgt_lang in multilingual.convert_ids_to_tokens(made)
    assert multilingual.src_lang not in multilingual.convert_ids_to_tokens(made)
    assert codec.first_token == (None if first is None else multilingual.convert_tokens_to_ids(first))
    with pytest.raises(ValueError, match="language 'tlh' is none of"):
        Codec(multilingual, source, "tlh")


def test_m2m100_names_its_languages_otherwise(opus_folder: Path) -> None:
    tokenizer = M2M100Tokenizer(str(opus_folder / "vocab.json"), str(opus_folder / "source.spm"))
    codec = Codec(tokenizer, "de", "en")
    assert codec.first_token == tokenizer.get_lang_id("en")
    assert codec.encode(["hund"])[0][0] == tokenizer.get_lang_id("de")


def test_nothing_is_written_into_a_model_folder(folder: Path) -> None:
    pytest.importorskip("ctranslate2")
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    translator = Translator(folder, backend="ct2")
    translator.translate_all(TEXTS, BEAMS)
    translator.close()
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_the_translators_thread_has_the_threads_that_it_is_given(folder: Path) -> None:
    translator = Translator(folder, threads=torch.get_num_threads() + 1)
    seen, decode = [], translator._decoder.decode
    translator._decoder.decode = lambda *given: (seen.append(torch.get_num_threads()), decode(*given))[1]
    before = torch.get_num_threads()
    translator.translate_all(["Der Hund."], GREEDY)
    translator.close()
    assert seen == [before + 1] and torch.get_num_threads() == before
    torch.set_num_threads(before)  # which threads that come later begin with
