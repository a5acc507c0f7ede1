"""Policy: who waits, who has a slot, and what the next step computes. Knows tokens and slots, no tensors.

A request holds one slot from admission to its end. Its prompt is computed in chunks cut at fixed multiples of
`chunk_tokens`, never where its neighbours happen to leave room, so that what a prompt computes does not depend on them.
"""

import time
from collections import deque
from dataclasses import dataclass, field

from serving.api import QueueFull
from serving.engine.api import SamplingParams


@dataclass(eq=False)
class Request:
    """One request on its way through the engine."""

    request_id: str
    tokens: list[int]  # the prompt, then what was drawn
    params: SamplingParams
    seed: int
    prompt_len: int = field(init=False)
    slot: int = -1
    cached: int = 0  # leading tokens whose keys and values are in the cache
    cancelled: bool = False
    arrived: float = field(default_factory=time.perf_counter)
    queue_seconds: float = 0.0  # from its arrival to its slot

    def __post_init__(self) -> None:
        self.prompt_len = len(self.tokens)

    @property
    def num_new(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def decoding(self) -> bool:
        return self.num_new > 0


@dataclass(frozen=True)
class PromptChunk:
    """Tokens start..stop of a prompt, to be computed in one step."""

    request: Request
    start: int
    stop: int

    @property
    def ends_prompt(self) -> bool:
        return self.stop == self.request.prompt_len


@dataclass(frozen=True)
class Step:
    """What one pass of the model does: first `moves`, then a row per decoding request, and the rows of the chunks."""

    moves: list[tuple[Request, int]]  # a request and the slot it comes from; `request.slot` is where it goes
    decoding: list[Request]
    chunks: list[PromptChunk]
    longest: int  # tokens of the longest running request

    @property
    def sampled(self) -> list[Request]:
        """The requests that get their next token from this step, in the order of its logits."""
        return self.decoding + [chunk.request for chunk in self.chunks if chunk.ends_prompt]


class Scheduler:
    """First come, first served, into `max_num_seqs` slots; at most `max_waiting` wait for one."""

    def __init__(self, max_num_seqs: int, max_waiting: int, chunk_tokens: int, step_tokens: int) -> None:
        """Raises ValueError for sizes below one."""
        sizes = {"max_num_seqs": max_num_seqs, "max_waiting": max_waiting, "chunk_tokens": chunk_tokens}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        assert step_tokens >= chunk_tokens
        self.max_num_seqs = max_num_seqs
        self.max_waiting = max_waiting
        self.chunk_tokens = chunk_tokens
        self.step_tokens = step_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, request: Request, bounded: bool = True) -> None:
        """Queues a request. Raises QueueFull when as many as may wait do so already, unless not `bounded`."""
        if bounded and len(self.waiting) >= self.max_waiting:
            raise QueueFull(f"{len(self.waiting)} requests wait already (max_waiting={self.max_waiting})")
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """Frees the request's slot."""
        self.running.remove(request)

    def schedule(self) -> Step:
        """Drops the cancelled, admits the waiting, closes gaps between slots, and picks this step's tokens."""
        self.waiting = deque(s for s in self.waiting if not s.cancelled)
        self.running = [s for s in self.running if not s.cancelled]
        self._admit()
        longest = max((len(s.tokens) for s in self.running), default=0)
        return Step(self._compact(), [s for s in self.running if s.decoding], self._pick_chunks(), longest)

    def _free_slots(self) -> list[int]:
        taken = {s.slot for s in self.running}
        return [slot for slot in range(self.max_num_seqs) if slot not in taken]

    def _admit(self) -> None:
        for slot in self._free_slots():
            if not self.waiting:
                return
            request = self.waiting.popleft()
            request.slot = slot
            request.queue_seconds = time.perf_counter() - request.arrived
            self.running.append(request)

    def _compact(self) -> list[tuple[Request, int]]:
        """Moves the highest slots into the gaps, so that the first len(running) slots are the taken ones."""
        moves = []
        gaps = [slot for slot in self._free_slots() if slot < len(self.running)]
        outside = [s for s in self.running if s.slot >= len(self.running)]
        for request, gap in zip(outside, gaps, strict=True):
            moves.append((request, request.slot))
            request.slot = gap
        return moves

    def _pick_chunks(self) -> list[PromptChunk]:
        """Whole chunks of the oldest unfinished prompts, up to `step_tokens`."""
        chunks: list[PromptChunk] = []
        budget = self.step_tokens
        for request in self.running:
            start = request.cached
            while start < request.prompt_len and not request.decoding:
                stop = min(start + self.chunk_tokens, request.prompt_len)
                if stop - start > budget:
                    return chunks
                chunks.append(PromptChunk(request, start, stop))
                budget -= stop - start
                start = stop
        return chunks
