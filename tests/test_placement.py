"""Where workers fit, against counting them out one by one."""

import itertools
import random
import re

import pytest

from training.placement import Need, capacity, most_workers, shortage, with_all_cpus

GIB = 2**30


def by_hand(nodes, need):
    """Put workers onto nodes until none fits."""
    left = [dict(node) for node in nodes.values()]
    for placed in itertools.count():
        room = [n for n in left if all(n.get(k, 0) >= v for k, v in need.resources.items())]
        if not room:
            return placed
        for name, amount in need.resources.items():
            room[0][name] -= amount
    raise AssertionError


def test_capacity_is_what_counting_gives():
    chance = random.Random(0)
    for _ in range(200):
        nodes = {
            str(i): {"CPU": chance.randint(0, 8), "GPU": chance.randint(0, 4), "memory": chance.randint(1, 64) * GIB}
            for i in range(chance.randint(1, 4))
        }
        need = Need(chance.randint(1, 3), chance.randint(0, 1), chance.choice([0, 4 * GIB]))
        assert capacity(nodes, need) == by_hand(nodes, need)


def test_every_worker_gets_the_cpus_that_would_else_be_idle():
    assert with_all_cpus({"a": {"CPU": 8.0}}, 2, Need()).cpus == 4
    assert with_all_cpus({"a": {"CPU": 8.0}, "b": {"CPU": 4.0}}, 3, Need()).cpus == 4
    assert with_all_cpus({"a": {"CPU": 2.0}}, 3, Need()).cpus == 1


def test_the_most_workers_that_fit_are_chosen_among_those_that_are_allowed():
    nodes = {"a": {"CPU": 3.0}, "b": {"CPU": 3.0}}
    assert most_workers(nodes, (2, 4, 8), Need()) == 4
    assert most_workers(nodes, (8, 16), Need()) is None


@pytest.mark.parametrize(
    ("nodes", "counts", "need", "words"),
    [
        ({}, (1,), Need(), "no living node"),
        ({"10.0.0.1": {"CPU": 2.0}}, (4,), Need(), r"needs 4 workers of 1 CPU; .*10.0.0.1: 0 GPU, 2 CPU.* 2 more CPU"),
        ({"a": {"CPU": 8.0, "GPU": 1.0}}, (2, 4), Need(gpus=1), "1 more GPU"),
        ({"a": {"CPU": 8.0, "memory": 4.0 * GIB}}, (2,), Need(memory=3 * GIB), "2 more GiB of memory"),
        ({"a": {"CPU": 1.0}, "b": {"CPU": 1.0}}, (1,), Need(cpus=2), "nodes that are large enough for one worker"),
    ],
)
def test_a_shortage_says_what_is_missing(nodes, counts, need, words):
    said = shortage("pretrain", nodes, counts, need)
    assert re.search(words, said), said
    assert said.startswith("pretrain: needs")
