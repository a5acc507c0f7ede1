"""TorchEngine: continuous batching of a transformers model, in a thread of its own."""

import secrets
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from serving.api import FinishReason
from serving.engine import sampler
from serving.engine.api import MIN_CONTEXT_TOKENS, Chunk, Completion, EngineStats, SamplingParams, joined
from serving.engine.decoder import make_decoder
from serving.engine.detokenizer import Detokenizer
from serving.engine.scheduler import Request, Scheduler, Step
from serving.model_folder import context_length, eos_ids, load_causal_lm
from serving.news import News
from serving.worker import Worker

CHUNK_TOKENS = 128  # of a prompt per step: what those who decode wait for a newcomer
STEP_TOKENS = 256  # of all prompts per step

Deliver = Callable[[Chunk | Exception], None]


@dataclass(eq=False)
class _Output:
    """The text of a request so far, and where its chunks go."""

    text: Detokenizer
    deliver: Deliver


class TorchEngine(Worker[Request, _Output]):
    """The `Engine` of serving.engine.api for any causal LM of transformers, on the device the model is on.

    Greedy float32 output equals `transformers.generate` token by token. A seed's draws depend on the prompt and the
    params alone: on a CPU the logits of a sequence are the same bits whatever runs beside it in bfloat16, and
    equal to about 1e-6 in float32, where a draw changes only if it falls that close to the border of two tokens. On
    other devices matrix products depend on the batch, and a seed fixes the draws only as far as these do.

    Steps run one at a time, in a thread that the first `generate` starts, or in the caller's for `generate_all`.
    """

    _name = "engine"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_num_seqs: int = 16,
        max_waiting: int = 256,
        context_tokens: int | None = None,
        threads: int | None = None,
    ) -> None:
        """`context_tokens` bounds prompt plus completion, in tokens; by default it is what the model was made for.

        `threads` are torch's in the engine's own thread, by default what torch has there. Raises ValueError for sizes
        out of range.
        """
        super().__init__(threads)
        self.context_tokens = _limit(context_tokens, context_length(model.config))
        self.eos_ids = eos_ids(model, tokenizer)
        self.vocab_size = model.get_input_embeddings().weight.shape[0]
        self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self._scheduler = Scheduler(max_num_seqs, max_waiting, CHUNK_TOKENS, STEP_TOKENS)
        self._decoder = make_decoder(model, max_num_seqs, self.context_tokens)
        self._prompt_tokens = self._generation_tokens = 0
        self._stepping = threading.Lock()  # one step at a time

    @classmethod
    def from_folder(cls, path: str | Path, dtype: torch.dtype | None = None, **dials: Any) -> "TorchEngine":
        """An engine for a model folder or hub name; `dials` as the constructor's, `dtype` None as the folder has it.

        Raises ValueError where the folder cannot be served.
        """
        model, tokenizer = load_causal_lm(path, dtype)
        return cls(model, tokenizer, **dials)

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams, request_id: str) -> AsyncIterator[Chunk]:
        """As `Engine.generate`. Chunks that the caller was too slow to take come as one."""
        self._check(prompt_ids, params)
        return self._stream(prompt_ids, params, request_id)

    def generate_all(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """One completion per prompt, in order, computed in the calling thread; any number of prompts may wait.

        Raises ValueError where a prompt does not fit, before anything is computed.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"params has {len(each)} entries for {len(prompts)} prompts")
        for prompt, wanted in zip(prompts, each, strict=True):
            self._check(prompt, wanted)
        outputs: list[list[Chunk | Exception]] = [[] for _ in prompts]
        requests = [
            self._submit(prompt, wanted, f"batch-{i}", outputs[i].append, bounded=False)
            for i, (prompt, wanted) in enumerate(zip(prompts, each, strict=True))
        ]
        try:
            while any(request in self._open for request in requests):
                self._work()
        finally:
            for request in requests:
                self._cancel(request)
        return [_completion(chunks) for chunks in outputs]

    def stats(self) -> EngineStats:
        with self._changed:
            running = self._scheduler.running
            used = sum(s.cached for s in running)
            return EngineStats(
                num_requests_running=len(running),
                num_requests_waiting=len(self._scheduler.waiting),
                kv_cache_usage_perc=used / (self._scheduler.max_num_seqs * self.context_tokens),
                prompt_tokens=self._prompt_tokens,
                generation_tokens=self._generation_tokens,
            )

    def update_weights(self) -> None:
        """Reads the model's parameters again, after a training step has changed them.

        Raises RuntimeError while requests are in flight, whose cached keys and values would be of two models.
        """
        with self._stepping:
            if self._open:
                raise RuntimeError(f"update_weights() with {len(self._open)} requests in flight; let them end first")
            self._decoder.update_weights()

    def _check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        wanted = len(prompt_ids) + params.max_new_tokens
        if not prompt_ids:
            raise ValueError("prompt_ids is empty; a prompt has at least one token")
        if wanted > self.context_tokens:
            raise ValueError(
                f"a prompt of {len(prompt_ids)} tokens with max_new_tokens={params.max_new_tokens} needs {wanted} "
                f"tokens, above the limit of {self.context_tokens}; shorten the prompt or ask for fewer tokens"
            )
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < self.vocab_size:
            raise ValueError(f"prompt_ids has ids outside 0..{self.vocab_size - 1}")

    async def _stream(self, prompt_ids: Sequence[int], params: SamplingParams, request_id: str) -> AsyncIterator[Chunk]:
        mailbox = _Mailbox()
        request = self._submit(prompt_ids, params, request_id, mailbox.put, bounded=True)
        self._ensure_thread()
        try:
            finished = False
            while not finished:
                chunk = await mailbox.take()
                finished = chunk.finish_reason is not None
                yield chunk
        finally:
            self._cancel(request)

    def _submit(
        self, prompt_ids: Sequence[int], params: SamplingParams, request_id: str, deliver: Deliver, bounded: bool
    ) -> Request:
        seed = secrets.randbits(63) if params.seed is None else params.seed
        request = Request(request_id, list(prompt_ids), params, seed)
        with self._changed:
            self._refuse_when_draining()
            self._scheduler.add(request, bounded)
            self._open[request] = _Output(Detokenizer(self._decode, params.stop), deliver)
            self._changed.notify_all()
        return request

    def _end(self, request: Request, listener: _Output, error: Exception) -> None:
        listener.deliver(error)

    def _has_work(self) -> bool:
        return not self._scheduler.idle

    def _in_work(self) -> list[Request]:
        return list(self._scheduler.running)

    @torch.inference_mode()
    def _work(self) -> None:
        """Schedule, compute, draw, deliver."""
        with self._stepping:
            with self._changed:
                step = self._scheduler.schedule()
            if not step.decoding and not step.chunks:
                return
            logits = self._decoder.logits(step)
            drawn = self._draw(step, logits) if step.sampled else []
            with self._changed:
                outputs = self._advance(step, drawn)
        for output, chunk in outputs:
            output.deliver(chunk)

    def _draw(self, step: Step, logits: torch.Tensor) -> list[tuple[int, float | None]]:
        """The next token of each sampled request, with its logprob where wanted."""
        sampled, logits = step.sampled, logits.float()
        params = [s.params for s in sampled]
        uniforms = [sampler.uniform(s.seed, s.num_new) for s in sampled]
        tokens = sampler.next_tokens(logits, params, uniforms, [s.tokens for s in sampled])
        wanting = [i for i, p in enumerate(params) if p.logprobs]
        logprobs = sampler.token_logprobs(logits[wanting], tokens[wanting]).tolist() if wanting else []
        by_row = dict(zip(wanting, logprobs, strict=True))
        return [(token, by_row.get(i)) for i, token in enumerate(tokens.tolist())]

    def _advance(self, step: Step, drawn: list[tuple[int, float | None]]) -> list[tuple[_Output, Chunk]]:
        """Books what the step computed; returns what to deliver."""
        for request in step.decoding:
            request.cached = len(request.tokens)
        for chunk in step.chunks:
            chunk.request.cached = chunk.stop
            self._prompt_tokens += chunk.stop - chunk.start
        self._generation_tokens += len(drawn)
        outputs = []
        for request, (token, logprob) in zip(step.sampled, drawn, strict=True):
            request.tokens.append(token)
            output = self._open.get(request)
            if output is not None:  # not cancelled meanwhile
                outputs.append((output, self._chunk(request, output.text, token, logprob)))
        return outputs

    def _chunk(self, request: Request, text: Detokenizer, token: int, logprob: float | None) -> Chunk:
        """What `token` adds to the request's answer; ends the request where it is the last."""
        piece = "" if token in self.eos_ids else text.push(token)
        reason: FinishReason | None = None
        if token in self.eos_ids or text.stopped:
            reason = "stop"
        elif request.num_new == request.params.max_new_tokens:
            reason = "length"
        if reason is not None:
            piece += text.flush()
            self._scheduler.finish(request)
            del self._open[request]
        logprobs = () if logprob is None else (logprob,)
        return Chunk(piece, (token,), request.seed, logprobs, reason, request.queue_seconds)


def _limit(wanted: int | None, made_for: int | None) -> int:
    limit = made_for if wanted is None else wanted
    if limit is None:
        raise ValueError("context_tokens is required: the model's config names no context length")
    if limit < MIN_CONTEXT_TOKENS or (made_for is not None and limit > made_for):
        allowed = f"between {MIN_CONTEXT_TOKENS} and the model's context of {made_for} tokens"
        raise ValueError(f"context_tokens={limit} must be {allowed}")
    return limit


class _Mailbox:
    """Chunks from the engine's thread to one asyncio task."""

    def __init__(self) -> None:
        self._news = News()
        self._items: deque[Chunk | Exception] = deque()

    def put(self, item: Chunk | Exception) -> None:
        self._items.append(item)
        self._news.tell()

    async def take(self) -> Chunk:
        """All that has come, as one chunk; raises what the engine failed with."""
        while not self._items:  # an earlier wake-up may be for what was taken already
            await self._news.wait()
        items = [self._items.popleft() for _ in range(len(self._items))]
        return joined(_raised(items))


def _raised(items: Iterable[Chunk | Exception]) -> Iterator[Chunk]:
    """The chunks; raises what the engine failed with."""
    for item in items:
        if isinstance(item, Exception):
            raise item
        yield item


def _completion(items: Iterable[Chunk | Exception]) -> Completion:
    whole = joined(_raised(items))
    assert whole.finish_reason is not None
    return Completion(whole.token_ids, whole.text, whole.logprobs, whole.finish_reason, whole.seed)
