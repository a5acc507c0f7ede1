"""Seeds made of a run's seed: what is drawn with one depends on what it is for, and not on which worker draws it."""

import numpy as np


def derived_seed(*parts: int) -> int:
    """A seed from 0 to 2^63 - 1 that is a hash of `parts`, whole numbers from 0: run seed, step, position, say."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
