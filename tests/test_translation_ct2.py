"""CTranslate2 behind the same `decode` as the torch decoder."""

import sys
from collections.abc import Iterator

import pytest
import torch
from translation_world import EOS, PAD, VOCAB, sources, tiny_model

from serving.translation.api import TranslationParams
from serving.translation.decoding import Decoder, TorchDecoder
from serving.translation.search import Output

pytest.importorskip("ctranslate2")

from serving.translation.ct2 import Ct2Decoder

RAGGED = sources(2, 3, 13, 5, 30, 8, 9, 4, 6, 7)
OPUS_MT = {"bad_words_ids": [[PAD]], "forced_eos_token_id": EOS, "renormalize_logits": True}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def decode(decoder: Decoder, asked: list[list[int]], params: TranslationParams) -> list[list[Output]]:
    ended: dict[int, list[Output]] = {}
    for step in decoder.decode(asked, params, lambda i: False):
        ended |= step
    return [ended[i] for i in range(len(asked))]


@pytest.mark.parametrize("rules", [{}, OPUS_MT, {"forced_bos_token_id": 7}], ids=["plain", "opus-mt", "nllb"])
def test_float32_greedy_equals_the_torch_decoder(rules: dict[str, object]) -> None:
    model = tiny_model("marian", **rules)
    params = TranslationParams(1, 0.6, max_new_tokens=12)
    want, decoder = decode(TorchDecoder(model), RAGGED, params), Ct2Decoder(model, compute_type="float32")
    got = decode(decoder, RAGGED, params)
    decoder.close()
    assert [(o.tokens, o.finish_reason) for (o,) in got] == [(o.tokens, o.finish_reason) for (o,) in want]
    assert [o.score for (o,) in got] == pytest.approx([o.score for (o,) in want], rel=1e-3)


def test_int8_agrees_on_nearly_all_sentences() -> None:
    model = tiny_model("marian", steps=400)
    asked = sources(*[3 + n % 6 for n in range(100)])
    params = TranslationParams(3, max_new_tokens=12)
    want, decoder = decode(TorchDecoder(model), asked, params), Ct2Decoder(model)
    got = decode(decoder, asked, params)
    decoder.close()
    assert sum(a.tokens == b.tokens for (a,), (b,) in zip(got, want, strict=True)) >= 90


def test_hypotheses_are_ranked_and_cancelled_sentences_dropped() -> None:
    decoder = Ct2Decoder(tiny_model("marian"))
    params = TranslationParams(4, num_hypotheses=3, max_new_tokens=12)
    steps = list(decoder.decode(RAGGED * 4, params, lambda i: i >= 20))
    decoder.close()
    assert [sorted(step) for step in steps] == [list(range(16)), list(range(16, 20))]
    for outputs in (outputs for step in steps for outputs in step.values()):
        assert len(outputs) == 3
        assert [o.score for o in outputs] == sorted((o.score for o in outputs), reverse=True)


def test_what_it_cannot_take_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"takes Marian models; this is a T5ForConditionalGeneration: .*'torch'"):
        Ct2Decoder(tiny_model("t5", steps=0))
    with pytest.raises(ValueError, match="NoRepeatNGram"):
        Ct2Decoder(tiny_model("marian", no_repeat_ngram_size=2))
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(ValueError, match=r"pip install chatforge\[ct2\]"):
        Ct2Decoder(tiny_model("marian"))


def test_the_model_itself_is_left_as_it_was() -> None:
    model = tiny_model("marian")
    before, config = {k: v.clone() for k, v in model.state_dict().items()}, model.config.to_dict()
    Ct2Decoder(model).close()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config and len(before["final_logits_bias"][0]) == VOCAB
