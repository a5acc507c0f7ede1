"""Greedy and beam search against transformers.generate, and against the search through everything."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from translation_world import EOS, PAD, sources, tiny_model

from serving.translation.api import TranslationParams
from serving.translation.decoding import TorchDecoder
from serving.translation.forward import TransformersForward
from serving.translation.rules import Rules, rules_of
from serving.translation.search import BeamSearch, Output

RAGGED = sources(1, 2, 13, 5, 30, 8)
SEARCHES = [
    TranslationParams(1, 1.0, 1, 12),
    TranslationParams(2, 1.0, 2, 12),
    TranslationParams(4, 0.6, 3, 12),
    TranslationParams(5, 2.0, 5, 12),
    TranslationParams(3, -1.0, 2, 12),
]
OPUS_MT = {"bad_words_ids": [[PAD]], "forced_eos_token_id": EOS, "renormalize_logits": True}
NLLB = {"forced_bos_token_id": 7, "suppress_tokens": [9, 10]}
RARE = {"min_length": 6, "no_repeat_ngram_size": 2, "repetition_penalty": 1.5, "bad_words_ids": [[11], [12, 13]]}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def decode(decoder: TorchDecoder, asked: list[list[int]], params: TranslationParams) -> list[list[Output]]:
    ended: dict[int, list[Output]] = {}
    for step in decoder.decode(asked, params, lambda i: False):
        ended |= step
    return [ended[i] for i in range(len(asked))]


def general(model: Any) -> TorchDecoder:
    """By transformers' own forward, also where there is a fast path."""
    decoder = TorchDecoder(model)
    decoder._forward = lambda *batch: TransformersForward(model, *batch)
    return decoder


def generate(model: Any, asked: list[list[int]], params: TranslationParams) -> tuple[list[list[int]], list[float]]:
    """All hypotheses of all sentences by transformers: tokens up to the end, and scores (of beams alone)."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(s) for s in asked], batch_first=True, padding_value=PAD)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(s)) for s in asked], batch_first=True).long()
    out = model.generate(
        ids, attention_mask=mask, do_sample=False, num_beams=params.num_beams, length_penalty=params.length_penalty,
        num_return_sequences=params.num_hypotheses, max_new_tokens=params.max_new_tokens,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends
    tokens = [sequence[1:].tolist() for sequence in out.sequences]
    ended = [t[: next((i + 1 for i, token in enumerate(t) if token in ends), len(t))] for t in tokens]
    return ended, out.sequences_scores.tolist() if params.num_beams > 1 else []


def assert_equals_generate(model: Any, decoder: TorchDecoder) -> None:
    for params in SEARCHES:
        outputs = [output for each in decode(decoder, RAGGED, params) for output in each]
        tokens, scores = generate(model, RAGGED, params)
        assert [list(output.tokens) for output in outputs] == tokens
        if scores:
            assert [output.score for output in outputs] == pytest.approx(scores, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("family", ["marian", "bart", "m2m100", "t5"])
@pytest.mark.parametrize("asked", [{}, OPUS_MT, NLLB], ids=["plain", "opus-mt", "nllb"])
def test_output_equals_transformers_generate(family: str, asked: dict[str, Any]) -> None:
    model = tiny_model(family, **asked)
    assert_equals_generate(model, TorchDecoder(model))


@pytest.mark.parametrize(
    "asked",
    [RARE, {"eos_token_id": [EOS, 5]}, {"early_stopping": True}, {"early_stopping": "never"}],
    ids=["rare", "two ends", "early", "never early"],
)
def test_every_rule_equals_transformers_generate(asked: dict[str, Any]) -> None:
    model = tiny_model("marian", **asked)
    assert_equals_generate(model, TorchDecoder(model))


@pytest.mark.parametrize("params", SEARCHES)
def test_the_fast_path_equals_the_general_one(params: TranslationParams) -> None:
    model = tiny_model("marian", **OPUS_MT)
    model.final_logits_bias.normal_()
    fast, slow = decode(TorchDecoder(model), RAGGED, params), decode(general(model), RAGGED, params)
    assert [[o.tokens for o in each] for each in fast] == [[o.tokens for o in each] for each in slow]


@pytest.mark.parametrize("family", ["marian", "t5"])
@pytest.mark.parametrize("params", SEARCHES[:3])
def test_a_batch_gives_what_each_sentence_gives_alone(family: str, params: TranslationParams) -> None:
    decoder = TorchDecoder(tiny_model(family))
    for together, asked in zip(decode(decoder, RAGGED, params), RAGGED, strict=True):
        (alone,) = decode(decoder, [asked], params)
        assert [o.tokens for o in together] == [o.tokens for o in alone]
        assert [o.score for o in together] == pytest.approx([o.score for o in alone], rel=1e-4)


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
def test_a_greedy_score_is_the_sum_of_logprobs_by_length(penalty: float) -> None:
    model = tiny_model("bart")
    for (output,), source in zip(
        decode(TorchDecoder(model), RAGGED, TranslationParams(1, penalty)), RAGGED, strict=True
    ):
        read = torch.tensor([[PAD, *output.tokens[:-1]]])
        logprobs = model(input_ids=torch.tensor([source]), decoder_input_ids=read).logits[0].log_softmax(1)
        total = logprobs.gather(1, torch.tensor(output.tokens)[:, None]).sum().item()
        assert output.score == pytest.approx(total / len(output.tokens) ** penalty, rel=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("forced", [None, EOS])
def test_max_new_tokens_ends_with_length(beams: int, forced: int | None) -> None:
    model = tiny_model("marian", forced_eos_token_id=forced)
    model.final_logits_bias[0, EOS] = -1e4
    params = TranslationParams(beams, max_new_tokens=5)
    outputs = [best for best, *_ in decode(TorchDecoder(model), RAGGED, params)]
    assert {(len(o.tokens), o.finish_reason) for o in outputs} == {(5, "length")}
    model.final_logits_bias[0, EOS] = 1e4
    outputs = [best for best, *_ in decode(TorchDecoder(model), RAGGED, TranslationParams(beams))]
    assert {(o.tokens, o.finish_reason) for o in outputs} == {((EOS,), "stop")}


def test_no_more_tokens_are_made_than_the_model_has_positions_for() -> None:
    model = tiny_model("marian")
    model.final_logits_bias[0, EOS] = -1e4
    ((output,),) = decode(TorchDecoder(model), RAGGED[:1], TranslationParams(1, max_new_tokens=1000))
    assert (len(output.tokens), output.finish_reason) == (64, "length")


class Recorder:
    """A forward that notes how many sentences each step computes."""

    def __init__(self, forward: Any, sizes: list[int]) -> None:
        self._forward, self._sizes, self.keep = forward, sizes, forward.keep

    def logits(self, tokens: torch.Tensor, parents: torch.Tensor | None) -> torch.Tensor:
        self._sizes.append(len(tokens))
        return self._forward.logits(tokens, parents)


@pytest.mark.parametrize("beams", [1, 3])
def test_sentences_that_ended_or_were_cancelled_leave_the_batch(beams: int) -> None:
    model, sizes = tiny_model("marian"), []
    decoder, cancelled = TorchDecoder(model), set()
    start = decoder._forward
    decoder._forward = lambda *batch: Recorder(start(*batch), sizes)
    want = decode(decoder, RAGGED, TranslationParams(beams, max_new_tokens=12))
    sizes.clear()
    left, ended = len(RAGGED), {}
    for number, step in enumerate(
        decoder.decode(RAGGED, TranslationParams(beams, max_new_tokens=12), cancelled.__contains__)
    ):
        assert sizes[-1] == left
        ended |= step
        if number == 0:
            cancelled |= {0, 4}
        left = len(RAGGED) - len(cancelled | ended.keys())
    assert ended == {i: outputs for i, outputs in enumerate(want) if i not in (0, 4)}


def every_hypothesis(
    logprobs: dict[tuple[int, ...], list[float]], end: int, limit: int, penalty: float
) -> list[Output]:
    """The slow way: all token sequences that end, or reach the limit, best first."""
    found = []
    for length in range(1, limit + 1):
        for tokens in itertools.product(range(len(logprobs[()])), repeat=length):
            if end not in tokens[:-1] and (tokens[-1] == end or length == limit):
                total = sum(logprobs[tokens[:i]][token] for i, token in enumerate(tokens))
                reason: Any = "stop" if tokens[-1] == end else "length"
                found.append(Output(tokens, total / length**penalty, reason))
    return sorted(found, key=lambda output: -output.score)


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
def test_enough_beams_find_the_best_of_all_there_are(penalty: float) -> None:
    vocab, end, limit = 4, 1, 3
    generator = torch.Generator().manual_seed(3)
    tables = [
        {
            prefix: torch.randn(vocab, generator=generator).log_softmax(0).tolist()
            for length in range(limit)
            for prefix in itertools.product(range(vocab), repeat=length)
        }
        for _ in range(8)
    ]
    rules = Rules(0, torch.tensor([end]), torch.tensor([], dtype=torch.long), None, None, [], False, "never")
    params = TranslationParams(32, penalty, 8)
    search = BeamSearch(rules, params, len(tables), limit)
    while True:
        read = search._history[:, :, 1:].tolist()
        logits = torch.tensor(
            [table[tuple(tokens)] for table, beams in zip(tables, read, strict=True) for tokens in beams]
        )
        ended = search.advance(logits).ended
        if len(ended) == len(tables):
            break
        assert not ended
    for i, table in enumerate(tables):
        want = every_hypothesis(table, end, limit, penalty)[:8]
        assert [o.tokens for o in ended[i]] == [o.tokens for o in want]
        assert [o.score for o in ended[i]] == pytest.approx([o.score for o in want], rel=1e-5)


def test_a_model_without_start_token_is_refused() -> None:
    model = tiny_model("marian", decoder_start_token_id=None)
    with pytest.raises(ValueError, match="decoder_start_token_id"):
        rules_of(model)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_beams", 0), ("num_beams", 33), ("length_penalty", 11.0), ("length_penalty", float("nan")),
        ("num_hypotheses", 5), ("num_hypotheses", 0), ("max_new_tokens", 0),
    ],
)  # fmt: skip
def test_params_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}={value}"):
        TranslationParams(**{field: value})  # type: ignore[arg-type]
