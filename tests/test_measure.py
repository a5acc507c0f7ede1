"""training.measure against slower ways to the same numbers."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from serving.engine.api import SamplingParams
from training import measure, pretrain, zero
from training.data.rankings import read_rankings
from training.data.text import Document, PackedTokens, tokenize_to_shards
from training.reward import fitting
from training.run import Run
from training.tokenizer import encode_completion, encode_prompt

SEQ_LEN = 64


@pytest.fixture(scope="module")
def llama(tiny_world):  # type: ignore[no-untyped-def]
    return measure.load(str(tiny_world.llama), "cpu")


@pytest.fixture(scope="module")
def samples(llama):  # type: ignore[no-untyped-def]
    """Prompts of unequal lengths and completions drawn from the model, with the engine's logprobs."""
    model, tokenizer = llama
    messages = [[{"role": "user", "content": "Hello! " * n}] for n in range(1, 6)]
    prompts = [encode_prompt(tokenizer, prompt) for prompt in messages]
    params = [SamplingParams(max_new_tokens=4 + 3 * i, seed=i, logprobs=True) for i in range(5)]
    return prompts, measure.generate(model, tokenizer, prompts, params)


def test_bits_per_byte_is_what_pretraining_validates_with(tiny_world, llama, tmp_path) -> None:  # type: ignore[no-untyped-def]
    zero.init_distributed("cpu")
    run = Run(tmp_path, "pretrain", val_fraction=0.2)
    model, tokenizer = llama
    data = PackedTokens(tokenize_to_shards([str(tiny_world.corpus)], tokenizer, run), "val", SEQ_LEN)
    ours = measure.bits_per_byte(model, measure.shard_batches(data, SEQ_LEN), data.side.tokens / data.side.bytes)
    theirs = pretrain.bits_per_byte(model, data, 8, run, len(data))
    assert ours.mean == pytest.approx(theirs, rel=1e-5)
    assert ours.n == len(data) > measure.BATCH  # more than one batch
    assert 0 < ours.stderr < 0.1 * ours.mean


def test_much_text_is_measured_at_even_distances(tiny_world, llama, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    run = Run(tmp_path, "pretrain", val_fraction=0.2)
    data = PackedTokens(tokenize_to_shards([str(tiny_world.corpus)], llama[1], run), "val", SEQ_LEN)
    monkeypatch.setattr(measure, "MAX_TOKENS", 40 * SEQ_LEN)
    rows = torch.cat([batch["input_ids"] for batch in measure.shard_batches(data, SEQ_LEN)])
    assert len(data) > 80 and len(rows) == 40
    assert torch.equal(rows[[0, 20]], data.batch([0, len(data) // 2])["input_ids"])


def test_documents_do_not_see_one_another(llama) -> None:  # type: ignore[no-untyped-def]
    """In one window or in a window each, the second document's tokens cost the same."""
    model, tokenizer = llama
    bos = tokenizer.bos_token_id
    texts = ["The cat sat on the mat.", "A dog ran."]
    first, second = (measure.token_stream([Document(text, text)], tokenizer, bos) for text in texts)
    both = np.concatenate([first, second])

    def nats(ids: np.ndarray) -> float:
        """Summed over all tokens but the first of the window."""
        estimate = measure.bits_per_byte(model, measure.document_batches(ids, bos, 10_000), math.log(2))
        return estimate.mean * (len(ids) - 1)

    boundary = model(torch.from_numpy(first)[None]).logits[0, -1].log_softmax(-1)[bos].item()
    assert nats(both) == pytest.approx(nats(first) + nats(second) - boundary, rel=1e-4)


def test_every_token_of_a_stream_is_in_one_window() -> None:
    ids = np.arange(103)
    windows = [row for batch in measure.document_batches(ids, 0, 10) for row in batch["input_ids"].tolist()]
    assert [token for window in windows for token in window] == ids.tolist()
    assert [len(window) for window in windows] == [10] * 10 + [3]


def test_special_tokens_written_in_a_text_are_text(llama) -> None:  # type: ignore[no-untyped-def]
    _, tokenizer = llama
    bos = tokenizer.bos_token_id
    ids = measure.token_stream([Document("say <|endoftext|> twice", "k")], tokenizer, bos)
    assert ids.tolist().count(bos) == 1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_completion_logprobs_are_those_of_one_token_at_a_time(llama, samples, temperature) -> None:  # type: ignore[no-untyped-def]
    model, _ = llama
    prompts, completions = samples
    tokens = [completion.token_ids for completion in completions]
    sums = measure.completion_logprobs(model, prompts, tokens, temperature)
    for prompt, completion, total in zip(prompts, tokens, sums, strict=True):
        slow = 0.0
        for i, token in enumerate(completion):
            ids = torch.tensor([[*prompt, *completion[:i]]])
            slow += (model(ids).logits[0, -1] / temperature).log_softmax(-1)[token].item()
        assert total == pytest.approx(slow, rel=1e-4)


def test_completion_logprobs_agree_with_the_engine_that_drew_them(llama, samples) -> None:  # type: ignore[no-untyped-def]
    prompts, completions = samples
    sums = measure.completion_logprobs(llama[0], prompts, [c.token_ids for c in completions], 1.0)
    assert sums == pytest.approx([sum(c.logprobs) for c in completions], rel=1e-3)


def test_equal_scores_are_half_right_and_ties_are_no_pairs(tiny_world) -> None:  # type: ignore[no-untyped-def]
    strict, tied = read_rankings([str(tiny_world.rankings)])[:2]
    assert (strict.ranks, tied.ranks) == ([4, 3, 2, 1], [3, 3, 2, 1])
    right, pairs = measure.pairs_right([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 1.0]], [strict, tied])
    assert pairs == [6.0, 5.0]
    assert right == pytest.approx([6.0, 4.0])


def test_what_is_too_long_for_the_reward_model_leaves_its_ranking(tiny_world, llama) -> None:  # type: ignore[no-untyped-def]
    _, tokenizer = llama
    ranking = read_rankings([str(tiny_world.rankings)])[0]
    lengths = [
        len(encode_prompt(tokenizer, ranking.prompt) + encode_completion(tokenizer, c)) for c in ranking.completions
    ]
    assert len(set(lengths)) == 4
    second_longest = sorted(lengths)[-2]
    [kept] = fitting([ranking], tokenizer, second_longest)
    assert len(kept.completions) == 3 and ranking.completions[lengths.index(max(lengths))] not in kept.completions
    assert fitting([ranking], tokenizer, min(lengths)) == []
    assert fitting([replace(ranking, ranks=[1, 1, 1, 1])], tokenizer, 10_000) == []


def test_a_pass_holds_no_more_than_some_thousand_tokens():
    """Thirty-two windows of a thousand had logits of many gigabytes."""
    batches = list(measure.document_batches(np.zeros(100_000, np.int64), 0, 1024))
    assert max(batch["input_ids"].numel() for batch in batches) == measure.PASS_TOKENS
    assert sum(batch["input_ids"].numel() for batch in batches) == 100_000
