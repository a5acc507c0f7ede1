"""Batches of pictures: of one bucket each, everything once an epoch, the same again from the same seed."""

from collections import Counter

import numpy as np
import pytest

from training.data.bucket_sampler import BucketSampler, shard
from training.seeds import derived_seed

BUCKETS = ["wide"] * 7 + ["tall"] * 4 + ["wide"] * 2


def test_every_picture_is_learnt_and_a_batch_is_of_one_bucket():
    sampler = BucketSampler(BUCKETS, 4, seed=1)
    assert len(sampler) == 4  # of thirteen pictures
    batches = [sampler.at(step) for step in range(4)]
    assert all(len(batch) == 4 and len({BUCKETS[i] for i in batch}) == 1 for batch in batches)
    whole = BucketSampler(["wide"] * 12, 4, seed=1)
    assert sorted(np.concatenate([whole.at(step) for step in range(3)]).tolist()) == list(range(12))


def test_a_rare_bucket_is_not_learnt_more_often_than_others():
    """One panorama among a thousand photographs had a whole batch of every epoch."""
    kinds = ["photo"] * 300 + ["panorama"] + ["banner"] * 19
    sampler = BucketSampler(kinds, 32, seed=1)
    epochs = 400
    counts = Counter(np.concatenate([sampler.at(step) for step in range(epochs * len(sampler))]).tolist())
    assert len(sampler) == 10
    assert counts[300] / epochs == pytest.approx(1.0, abs=0.5)
    for kind in ("photo", "banner"):
        seen = [counts[i] for i, name in enumerate(kinds) if name == kind]
        assert np.mean(seen) / epochs == pytest.approx(1.0, abs=0.1)


def test_epochs_differ_and_a_step_is_always_the_same():
    sampler, again = BucketSampler(BUCKETS, 4, seed=1), BucketSampler(BUCKETS, 4, seed=1)
    first = [sampler.at(step).tolist() for step in range(8)]
    assert first[:4] != first[4:]
    assert [again.at(step).tolist() for step in reversed(range(8))] == first[::-1]
    assert [BucketSampler(BUCKETS, 4, seed=2).at(step).tolist() for step in range(8)] != first


@pytest.mark.parametrize(("workers", "passes"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_workers_share_a_batch_without_rest(workers, passes):
    batch = np.arange(8)
    parts = [shard(batch, rank, workers, passes) for rank in range(workers)]
    assert all(len(rows) == passes for rows in parts)
    assert sorted(np.concatenate([row for rows in parts for row in rows]).tolist()) == list(range(8))


def test_derived_seeds_differ_by_seed_step_and_place():
    seeds = {derived_seed(seed, step, place) for seed in range(3) for step in range(3) for place in range(3)}
    assert derived_seed(3, 5, 7) == 5908279557309048684  # what a run goes on with is what it began with
    assert len(seeds) == 27 and all(0 <= seed < 2**63 for seed in seeds)
