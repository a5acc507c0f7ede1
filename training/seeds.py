"""Seeds made of a run's seed: what is drawn with one depends on what it is for, and not on which worker draws it."""

import hashlib


def derived_seed(*parts: object) -> int:
    """A seed from 0 to 2^63 - 1 for one thing among many, independent of the others': a hash of `parts` as words."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
