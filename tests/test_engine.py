"""TorchEngine against transformers, and what it promises to many callers at once."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import pytest
import torch
from conftest import TinyWorld

from serving.api import EngineClosed, QueueFull
from serving.engine.api import Chunk, SamplingParams
from serving.engine.torch_engine import TorchEngine
from serving.model_folder import load_causal_lm

GREEDY = SamplingParams(max_new_tokens=24, temperature=0.0, seed=0)
FOREVER = SamplingParams(max_new_tokens=200, temperature=0.0)


def prompts(count: int, longest: int = 200) -> list[list[int]]:
    """Ragged prompts; some are longer than a chunk, one is a single token."""
    g = torch.Generator().manual_seed(4)
    lengths = [1, longest, *torch.randint(2, longest, (count,), generator=g).tolist()]
    return [torch.randint(10, 400, (n,), generator=g).tolist() for n in lengths[:count]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pair(request: pytest.FixtureRequest, tiny_world: TinyWorld) -> tuple[Any, Any]:
    return load_causal_lm(getattr(tiny_world, request.param), torch.float32)


@pytest.fixture(scope="module")
def llama(tiny_world: TinyWorld) -> tuple[Any, Any]:
    """A model that never ends by itself, for tests that need time."""
    model, tokenizer = load_causal_lm(tiny_world.llama, torch.float32)
    model.generation_config.eos_token_id = []
    return model, tokenizer


@pytest.fixture
def engine(llama: tuple[Any, Any]) -> Iterator[TorchEngine]:
    engine = TorchEngine(*llama, max_num_seqs=2, max_waiting=2)
    yield engine
    engine.close()


def reference(model: Any, prompt: list[int], tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("concurrent", [1, 4, 16])
def test_greedy_equals_transformers_generate(pair: tuple[Any, Any], concurrent: int) -> None:
    engine = TorchEngine(*pair, max_num_seqs=concurrent)
    completions = engine.generate_all(prompts(20), GREEDY)
    want = [reference(pair[0], prompt, GREEDY.max_new_tokens) for prompt in prompts(20)]
    assert [list(c.token_ids) for c in completions] == want
    assert {c.finish_reason for c in completions} <= {"stop", "length"}


def test_greedy_equals_transformers_generate_when_the_cache_grows(pair: tuple[Any, Any]) -> None:
    engine = TorchEngine(*pair, max_num_seqs=3)
    asked = SamplingParams(max_new_tokens=100, temperature=0.0)
    completions = engine.generate_all(prompts(5, longest=150), asked)
    assert [list(c.token_ids) for c in completions] == [reference(pair[0], p, 100) for p in prompts(5, longest=150)]


def test_a_model_without_fast_path_gives_the_same(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fast = TorchEngine(*pair, max_num_seqs=4).generate_all(prompts(6), GREEDY)
    monkeypatch.setattr("serving.engine.decoder._fast_family", lambda model: None)
    slow = TorchEngine(*pair, max_num_seqs=4)
    assert "transformers cache" in caplog.text
    assert [c.token_ids for c in slow.generate_all(prompts(6), GREEDY)] == [c.token_ids for c in fast]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_seed_gives_the_same_alone_and_among_others(tiny_world: TinyWorld, family: str, dtype: torch.dtype) -> None:
    engine = TorchEngine.from_folder(getattr(tiny_world, family), dtype, max_num_seqs=16)
    each = [
        SamplingParams(
            max_new_tokens=24, temperature=0.7 + 0.1 * i, top_p=0.8 + 0.02 * (i % 11), top_k=i % 4 * 20, seed=i
        )
        for i in range(16)
    ]
    together = engine.generate_all(prompts(16), each)
    alone = [engine.generate_all([prompt], params)[0] for prompt, params in zip(prompts(16), each, strict=True)]
    assert together == alone
    backwards = engine.generate_all(prompts(16)[::-1], each[::-1])
    assert backwards[::-1] == together


def test_bf16_logits_are_the_same_bits_whatever_the_batch(tiny_world: TinyWorld) -> None:
    engine = TorchEngine.from_folder(tiny_world.llama, torch.bfloat16, max_num_seqs=16)
    asked = SamplingParams(max_new_tokens=12, temperature=0.0, logprobs=True, seed=0)
    together = engine.generate_all(prompts(16), asked)
    assert together == [engine.generate_all([prompt], asked)[0] for prompt in prompts(16)]


def test_without_a_seed_completions_differ_and_name_the_seed_that_repeats_them(llama: tuple[Any, Any]) -> None:
    engine = TorchEngine(*llama)
    first, second = engine.generate_all([[20, 30]] * 2, SamplingParams(max_new_tokens=24))
    assert first.token_ids != second.token_ids
    again = engine.generate_all([[20, 30]], SamplingParams(max_new_tokens=24, seed=second.seed))
    assert again == [second]


def test_logprobs_equal_those_of_a_plain_forward(pair: tuple[Any, Any]) -> None:
    params = SamplingParams(max_new_tokens=16, temperature=1.3, top_k=50, seed=3, logprobs=True)
    for prompt, completion in zip(prompts(4), TorchEngine(*pair).generate_all(prompts(4), params), strict=True):
        tokens = torch.tensor([[*prompt, *completion.token_ids]])
        every = pair[0](tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        want = every.gather(1, tokens[0, len(prompt) :, None])[:, 0]
        assert completion.logprobs == pytest.approx(want.tolist(), abs=1e-4)


def test_an_eos_token_ends_the_tokens_and_is_not_in_the_text(llama: tuple[Any, Any]) -> None:
    model, tokenizer = llama
    free = TorchEngine(model, tokenizer).generate_all([[50, 60, 70]], GREEDY)[0]
    engine = TorchEngine(model, tokenizer)
    ending = free.token_ids[5]
    engine.eos_ids = frozenset([ending])
    completion = engine.generate_all([[50, 60, 70]], GREEDY)[0]
    end = free.token_ids.index(ending)
    assert completion.token_ids == free.token_ids[: end + 1]
    assert completion.finish_reason == "stop"
    assert completion.text == tokenizer.decode(free.token_ids[:end], skip_special_tokens=True).rstrip("\ufffd")


def test_eos_ids_are_read_from_the_generation_config(tiny_world: TinyWorld) -> None:
    model, tokenizer = load_causal_lm(tiny_world.llama)
    assert TorchEngine(model, tokenizer).eos_ids == set(model.generation_config.eos_token_id)
    model.generation_config.eos_token_id = None
    assert TorchEngine(model, tokenizer).eos_ids == {tokenizer.eos_token_id}


def test_a_stop_string_is_cut_with_what_follows(llama: tuple[Any, Any]) -> None:
    engine = TorchEngine(*llama)
    free = engine.generate_all([[50, 60, 70]], GREEDY)[0]
    stop = free.text[4:9]
    completion = engine.generate_all(
        [[50, 60, 70]], SamplingParams(max_new_tokens=24, temperature=0.0, stop=("§§", stop))
    )[0]
    assert completion.text == free.text[: free.text.index(stop)]
    assert completion.finish_reason == "stop"
    assert completion.token_ids == free.token_ids[: len(completion.token_ids)]


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], GREEDY, "empty"),
        ([5] * 250, GREEDY, "250 tokens with max_new_tokens=24 needs 274 tokens, above the limit of 256"),
        ([5, 100_000], GREEDY, "outside"),
        ([-1], GREEDY, "outside"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused_at_once(
    engine: TorchEngine, prompt: list[int], params: SamplingParams, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        engine.generate(prompt, params, "r")
    with pytest.raises(ValueError, match=message):
        engine.generate_all([[5], prompt], params)
    assert engine.stats().num_requests_waiting == 0


@pytest.mark.parametrize("limit", [1, 257])
def test_a_limit_beyond_the_model_is_refused(llama: tuple[Any, Any], limit: int) -> None:
    with pytest.raises(ValueError, match=f"context_tokens={limit}"):
        TorchEngine(*llama, context_tokens=limit)


async def collect(engine: TorchEngine, prompt: list[int], params: SamplingParams) -> list[Chunk]:
    return [chunk async for chunk in engine.generate(prompt, params, "r")]


async def until(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "did not happen within a minute"
        await asyncio.sleep(0.002)


async def test_streams_of_many_tasks_equal_the_batch(llama: tuple[Any, Any]) -> None:
    engine = TorchEngine(*llama, max_num_seqs=4)
    each = [SamplingParams(max_new_tokens=20, seed=i, logprobs=True) for i in range(12)]
    want = engine.generate_all(prompts(12), each)
    streams = await asyncio.gather(*(collect(engine, p, s) for p, s in zip(prompts(12), each, strict=True)))
    for chunks, completion in zip(streams, want, strict=True):
        assert "".join(c.text for c in chunks) == completion.text
        assert tuple(t for c in chunks for t in c.token_ids) == completion.token_ids
        assert tuple(p for c in chunks for p in c.logprobs) == completion.logprobs
        assert [c.finish_reason for c in chunks] == [None] * (len(chunks) - 1) + [completion.finish_reason]
        assert {c.seed for c in chunks} == {completion.seed}
    engine.close()


async def test_closing_the_iterator_frees_the_slot(engine: TorchEngine) -> None:
    async with aclosing(engine.generate([5, 6], FOREVER, "first")) as stream:
        await anext(stream)
        assert engine.stats().num_requests_running == 1
    done = asyncio.create_task(collect(engine, [7], GREEDY))
    await until(lambda: engine.stats().num_requests_running == 1)
    await done
    assert engine.stats().generation_tokens < FOREVER.max_new_tokens + GREEDY.max_new_tokens
    assert engine.stats().num_requests_running == 0


async def test_a_cancelled_task_frees_the_slot(engine: TorchEngine) -> None:
    tasks = [asyncio.create_task(collect(engine, [5, 6], FOREVER)) for _ in range(3)]
    await until(lambda: engine.stats().num_requests_running == 2)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await until(lambda: engine.stats().num_requests_running == 0)
    assert engine.stats().num_requests_waiting == 0


async def test_a_full_queue_refuses_and_takes_again_later(engine: TorchEngine) -> None:
    tasks = [asyncio.create_task(collect(engine, [5, 6], FOREVER)) for _ in range(2)]
    await until(lambda: engine.stats().num_requests_running == 2)
    tasks += [asyncio.create_task(collect(engine, [5, 6], GREEDY)) for _ in range(2)]
    await until(lambda: engine.stats().num_requests_waiting == 2)
    with pytest.raises(QueueFull):
        await collect(engine, [5, 6], GREEDY)
    for task in tasks[:2]:
        task.cancel()
    assert all([chunks[-1].finish_reason for chunks in await asyncio.gather(*tasks[2:])])
    assert (await collect(engine, [5, 6], GREEDY))[-1].finish_reason


async def test_drain_lets_the_running_end_and_takes_no_more(engine: TorchEngine) -> None:
    running = asyncio.create_task(collect(engine, [5, 6], FOREVER))
    await until(lambda: engine.stats().num_requests_running == 1)
    await engine.drain()
    assert (await running)[-1].finish_reason == "length"
    with pytest.raises(EngineClosed):
        await collect(engine, [5, 6], GREEDY)


async def test_close_ends_what_runs(engine: TorchEngine) -> None:
    running = asyncio.create_task(collect(engine, [5, 6], FOREVER))
    await until(lambda: engine.stats().num_requests_running == 1)
    engine.close()
    with pytest.raises(EngineClosed):
        await running


async def test_a_failing_step_ends_its_requests_and_not_the_engine(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(engine._decoder, "logits", lambda step: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await collect(engine, [5, 6], GREEDY)
    assert (await collect(engine, [5, 6], GREEDY))[-1].finish_reason


async def test_those_who_wait_are_not_in_a_step_that_fails(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, waiting = await two_running_and_one_waiting(engine)
    logits = engine._decoder.logits

    def full_once(step: Any) -> Any:
        monkeypatch.setattr(engine._decoder, "logits", logits)
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(engine._decoder, "logits", full_once)
    ended = await asyncio.gather(*running, return_exceptions=True)
    assert [type(error) for error in ended] == [torch.OutOfMemoryError] * 2
    assert (await waiting)[-1].finish_reason


async def test_a_lost_device_ends_those_who_wait_too(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = await two_running_and_one_waiting(engine)

    def lost(step: Any) -> Any:
        raise torch.AcceleratorError("gone")

    monkeypatch.setattr(engine._decoder, "logits", lost)
    ended = await asyncio.gather(*tasks[0], tasks[1], return_exceptions=True)
    assert [type(error) for error in ended] == [torch.AcceleratorError] * 3


async def two_running_and_one_waiting(engine: TorchEngine) -> tuple[list[Any], Any]:
    running = [asyncio.create_task(collect(engine, [5, 6], FOREVER)) for _ in range(2)]
    await until(lambda: engine.stats().num_requests_running == 2)
    waiting = asyncio.create_task(collect(engine, [5, 6], GREEDY))
    await until(lambda: engine.stats().num_requests_waiting == 1)
    return running, waiting


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), torch.AcceleratorError("gone")])
async def test_a_lost_device_is_known_and_a_full_one_is_not_lost(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """What the replica's health check looks at: it would answer INTERNAL for ever."""

    def fail(step: object) -> None:
        raise error

    monkeypatch.setattr(engine._decoder, "logits", fail)
    with pytest.raises(type(error)):
        await collect(engine, [5, 6], GREEDY)
    assert engine.device_is_lost == isinstance(error, torch.AcceleratorError)


def test_stats_count_tokens(engine: TorchEngine) -> None:
    engine.generate_all([[5, 6, 7], [8]], SamplingParams(max_new_tokens=4))
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generation_tokens) == (4, 8)
    assert stats.kv_cache_usage_perc == 0


def test_updated_weights_are_used(tiny_world: TinyWorld) -> None:
    model, tokenizer = load_causal_lm(tiny_world.llama, torch.float32)
    engine = TorchEngine(model, tokenizer)
    before = engine.generate_all(prompts(3), GREEDY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    engine.update_weights()
    after = engine.generate_all(prompts(3), GREEDY)
    assert [c.token_ids for c in after] != [c.token_ids for c in before]
    assert after == TorchEngine(model, tokenizer).generate_all(prompts(3), GREEDY)


async def test_weights_do_not_change_under_a_running_request(engine: TorchEngine) -> None:
    async with aclosing(engine.generate([5, 6], FOREVER, "r")) as stream:
        await anext(stream)
        with pytest.raises(RuntimeError, match="in flight"):
            engine.update_weights()
    engine.update_weights()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_adapters_of_a_live_policy_are_merged(tiny_world: TinyWorld, family: str) -> None:
    peft = pytest.importorskip("peft")
    model, tokenizer = load_causal_lm(getattr(tiny_world, family), torch.float32)
    policy = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    ).eval()
    completions = TorchEngine(policy, tokenizer).generate_all(prompts(4), GREEDY)
    merged = policy.merge_and_unload()
    assert [list(c.token_ids) for c in completions] == [reference(merged, p, 24) for p in prompts(4)]


async def test_the_engines_thread_has_the_threads_that_it_is_given(tiny_world) -> None:
    engine = TorchEngine(*load_causal_lm(tiny_world.llama), threads=torch.get_num_threads() + 1)
    seen, logits = [], engine._decoder.logits
    engine._decoder.logits = lambda step: (seen.append(torch.get_num_threads()), logits(step))[1]
    before = torch.get_num_threads()
    async for _ in engine.generate([5, 6], SamplingParams(max_new_tokens=2), "x"):
        pass
    engine.close()
    assert set(seen) == {before + 1} and torch.get_num_threads() == before
    torch.set_num_threads(before)  # which threads that come later begin with
