"""Policy alone: no model, no tensors."""

import subprocess
import sys

import pytest

from serving.api import QueueFull
from serving.engine.api import SamplingParams
from serving.engine.scheduler import Request, Scheduler, Step


def request(prompt_len: int = 4, name: str = "") -> Request:
    return Request(name, list(range(prompt_len)), SamplingParams(), seed=0)


def compute(step: Step) -> None:
    """What the engine does to requests when a step is through."""
    for s in step.decoding:
        s.cached = len(s.tokens)
    for chunk in step.chunks:
        chunk.request.cached = chunk.stop
    for s in step.sampled:
        s.tokens.append(0)


def test_scheduling_needs_no_torch() -> None:
    code = "import sys, serving.engine.scheduler; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_new_prompts_join_between_steps_in_order() -> None:
    scheduler = Scheduler(max_num_seqs=2, max_waiting=10, chunk_tokens=8, step_tokens=16)
    first, second, third = (request() for _ in range(3))
    scheduler.add(first)
    compute(scheduler.schedule())
    scheduler.add(second)
    scheduler.add(third)
    step = scheduler.schedule()
    assert step.decoding == [first]
    assert [c.request for c in step.chunks] == [second]
    assert list(scheduler.waiting) == [third]
    compute(step)
    scheduler.finish(first)
    assert [c.request for c in scheduler.schedule().chunks] == [third]
    assert third.slot == 0


def test_a_request_knows_how_long_it_waited_for_its_slot() -> None:
    scheduler = Scheduler(max_num_seqs=1, max_waiting=10, chunk_tokens=8, step_tokens=8)
    first, second = request(), request()
    second.arrived -= 10
    for added in (first, second):
        scheduler.add(added)
    compute(scheduler.schedule())
    assert second.queue_seconds == 0
    scheduler.finish(first)
    scheduler.schedule()
    assert first.queue_seconds < 10 <= second.queue_seconds


def test_the_queue_has_a_bound_that_counts_the_waiting_alone() -> None:
    scheduler = Scheduler(max_num_seqs=1, max_waiting=2, chunk_tokens=8, step_tokens=8)
    scheduler.add(request())
    scheduler.schedule()
    scheduler.add(request())
    scheduler.add(request())
    with pytest.raises(QueueFull, match="max_waiting=2"):
        scheduler.add(request())
    scheduler.add(request(), bounded=False)
    assert len(scheduler.waiting) == 3


def test_long_prompts_are_cut_and_do_not_stop_those_who_decode() -> None:
    scheduler = Scheduler(max_num_seqs=2, max_waiting=10, chunk_tokens=8, step_tokens=8)
    short, long = request(3), request(20)
    scheduler.add(short)
    compute(scheduler.schedule())
    scheduler.add(long)
    spans = []
    for _ in range(3):
        step = scheduler.schedule()
        assert short in step.decoding
        spans += [(c.start, c.stop) for c in step.chunks]
        compute(step)
    assert spans == [(0, 8), (8, 16), (16, 20)]
    assert scheduler.schedule().decoding == [short, long]


def test_chunks_are_cut_at_the_same_places_whatever_the_neighbours() -> None:
    scheduler = Scheduler(max_num_seqs=4, max_waiting=10, chunk_tokens=8, step_tokens=16)
    prompts = [request(n) for n in (5, 19, 11, 8)]
    for prompt in prompts:
        scheduler.add(prompt)
    spans: dict[int, list[tuple[int, int]]] = {len(p.tokens): [] for p in prompts}
    while not all(p.decoding for p in prompts):
        step = scheduler.schedule()
        assert 0 < sum(c.stop - c.start for c in step.chunks) <= 16
        for chunk in step.chunks:
            spans[chunk.request.prompt_len].append((chunk.start, chunk.stop))
        compute(step)
    assert spans == {5: [(0, 5)], 19: [(0, 8), (8, 16), (16, 19)], 11: [(0, 8), (8, 11)], 8: [(0, 8)]}


def test_the_cancelled_leave_by_the_next_step() -> None:
    scheduler = Scheduler(max_num_seqs=1, max_waiting=10, chunk_tokens=8, step_tokens=8)
    running, waiting, last = (request() for _ in range(3))
    for s in (running, waiting, last):
        scheduler.add(s)
    compute(scheduler.schedule())
    running.cancelled = waiting.cancelled = True
    step = scheduler.schedule()
    assert step.decoding == []
    assert [c.request for c in step.chunks] == [last]


def test_gaps_between_slots_are_closed() -> None:
    scheduler = Scheduler(max_num_seqs=4, max_waiting=10, chunk_tokens=8, step_tokens=64)
    requests = [request() for _ in range(4)]
    for s in requests:
        scheduler.add(s)
    compute(scheduler.schedule())
    scheduler.finish(requests[0])
    scheduler.finish(requests[2])
    step = scheduler.schedule()
    assert step.moves == [(requests[3], 3)]
    assert sorted(s.slot for s in step.decoding) == [0, 1]


@pytest.mark.parametrize("dial", ["max_num_seqs", "max_waiting"])
def test_sizes_below_one_are_refused_by_name(dial: str) -> None:
    sizes = {"max_num_seqs": 1, "max_waiting": 1, dial: 0}
    with pytest.raises(ValueError, match=f"{dial}=0"):
        Scheduler(**sizes, chunk_tokens=8, step_tokens=8)
