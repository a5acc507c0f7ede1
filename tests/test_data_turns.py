"""Batches of pictures: of one kind each, everything once an epoch, the same again from the same seed."""

from collections import Counter

import numpy as np
import pytest

from training.data.turns import Turns, chance, mine

KINDS = ["wide"] * 7 + ["tall"] * 4 + ["wide"] * 2


def test_every_picture_has_its_turn_and_a_batch_is_of_one_kind():
    turns = Turns(KINDS, 4, seed=1)
    assert len(turns) == 4  # of thirteen pictures
    batches = [turns.at(step) for step in range(4)]
    assert all(len(batch) == 4 and len({KINDS[i] for i in batch}) == 1 for batch in batches)
    whole = Turns(["wide"] * 12, 4, seed=1)
    assert sorted(np.concatenate([whole.at(step) for step in range(3)]).tolist()) == list(range(12))


def test_a_rare_kind_is_not_learnt_more_often_than_others():
    """One panorama among a thousand photographs had a whole batch of every epoch."""
    kinds = ["photo"] * 300 + ["panorama"] + ["banner"] * 19
    turns = Turns(kinds, 32, seed=1)
    epochs = 400
    counts = Counter(np.concatenate([turns.at(step) for step in range(epochs * len(turns))]).tolist())
    assert len(turns) == 10
    assert counts[300] / epochs == pytest.approx(1.0, abs=0.5)
    for kind in ("photo", "banner"):
        seen = [counts[i] for i, name in enumerate(kinds) if name == kind]
        assert np.mean(seen) / epochs == pytest.approx(1.0, abs=0.1)


def test_epochs_differ_and_a_step_is_always_the_same():
    turns, again = Turns(KINDS, 4, seed=1), Turns(KINDS, 4, seed=1)
    first = [turns.at(step).tolist() for step in range(8)]
    assert first[:4] != first[4:]
    assert [again.at(step).tolist() for step in reversed(range(8))] == first[::-1]
    assert [Turns(KINDS, 4, seed=2).at(step).tolist() for step in range(8)] != first


@pytest.mark.parametrize(("workers", "passes"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_workers_share_a_batch_without_rest(workers, passes):
    batch = np.arange(8)
    parts = [mine(batch, rank, workers, passes) for rank in range(workers)]
    assert all(len(rows) == passes for rows in parts)
    assert sorted(np.concatenate([row for rows in parts for row in rows]).tolist()) == list(range(8))


def test_chances_differ_by_seed_step_and_place():
    seeds = {chance(seed, step, place) for seed in range(3) for step in range(3) for place in range(3)}
    assert len(seeds) == 27 and all(0 <= seed < 2**63 for seed in seeds)
