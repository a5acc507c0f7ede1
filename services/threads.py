"""One OpenMP pool in a replica."""

import torch


def give_away_the_pool() -> int:
    """The threads that torch has in the calling thread, which from now on computes alone.

    OpenMP keeps a pool for every thread that computes, and once its threads are more than the cores they sleep at every
    barrier: a third of the speed. So a replica loads its models in a thread without a pool, and the thread that answers
    is given the pool.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    return threads
