"""Memory alone: what is written is read, through growth and moves."""

import pytest
import torch
from torch import Tensor

from serving.engine.kv_cache import KVCache

LAYERS, HEADS, DIM, SLOTS = 2, 3, 4, 2


@pytest.fixture
def cache() -> KVCache:
    return KVCache((LAYERS, HEADS, DIM), SLOTS, max_len=1000, dtype=torch.float32, device=torch.device("cpu"))


def fill(cache: KVCache, slot: int, start: int, stop: int) -> Tensor:
    """Writes random rows to every layer; returns them, [LAYERS, tokens, 2 · HEADS, DIM]."""
    rows = torch.randn(LAYERS, stop - start, 2 * HEADS, DIM)
    positions = torch.arange(start, stop)
    addresses = cache.addresses(torch.full_like(positions, slot), positions)
    for layer in range(LAYERS):
        cache.write(layer, addresses, rows[layer])
    return rows


def holds(cache: KVCache, slot: int, rows: Tensor) -> bool:
    length = rows.shape[1]
    for layer in range(LAYERS):
        want_keys, want_values = rows[layer].transpose(0, 1).split(HEADS)
        keys, values = (part[:, :length] for part in cache.read(layer, slot + 1))
        mine = slice(slot * HEADS, (slot + 1) * HEADS)
        alone = cache.read_slot(layer, slot, length)
        if not (torch.equal(keys[mine], want_keys) and torch.equal(values[mine], want_values)):
            return False
        if not (torch.equal(alone[0], want_keys) and torch.equal(alone[1], want_values)):
            return False
    return True


def test_slots_keep_apart(cache: KVCache) -> None:
    first, second, spare = fill(cache, 0, 0, 7), fill(cache, 1, 0, 5), fill(cache, cache.spare_slot, 0, 3)
    assert holds(cache, 0, first) and holds(cache, 1, second) and holds(cache, cache.spare_slot, spare)


def test_a_sequence_is_written_piece_by_piece(cache: KVCache) -> None:
    pieces = [fill(cache, 1, 0, 4), fill(cache, 1, 4, 5), fill(cache, 1, 5, 9)]
    assert holds(cache, 1, torch.cat(pieces, 1))


def test_reading_copies_nothing_and_is_contiguous(cache: KVCache) -> None:
    for part in cache.read(0, 2):
        assert part.is_contiguous()
        assert part.untyped_storage().data_ptr() == cache.layers[0].untyped_storage().data_ptr()


def test_growth_keeps_what_was_written_and_stops_at_the_bound(cache: KVCache) -> None:
    rows = fill(cache, 1, 0, cache.capacity)
    before = cache.capacity
    cache.fit(before)
    assert cache.capacity == before
    cache.fit(before + 1)
    assert before < cache.capacity < 1000
    assert holds(cache, 1, rows)
    cache.fit(999)
    assert cache.capacity == 1000
    assert holds(cache, 1, rows)


def test_room_is_given_back_when_the_longest_is_gone(cache: KVCache) -> None:
    cache.fit(1000)
    rows = fill(cache, 1, 0, 100)
    cache.fit(501)
    assert cache.capacity == 1000
    cache.fit(100)
    assert 100 <= cache.capacity < 200
    assert holds(cache, 1, rows)


def test_short_sequences_move_nothing(cache: KVCache) -> None:
    """Every step copied the whole cache while the longest had no more than half of the least room."""
    before = list(cache.layers)
    for length in range(1, cache.capacity + 1):
        cache.fit(length)
    assert all(now is then for now, then in zip(cache.layers, before, strict=True))


def test_without_memory_for_more_it_is_empty_and_whole(cache: KVCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer had grown and the others not, under one capacity: later requests wrote over one another."""
    cache.fit(300)
    make, made = Tensor.new_zeros, []

    def full(self: Tensor, shape: tuple[int, ...]) -> Tensor:
        made.append(shape)
        if len(made) == 2:
            raise RuntimeError("out of memory")
        return make(self, shape)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_zeros", full)
        with pytest.raises(RuntimeError, match="out of memory"):
            cache.fit(400)
    assert {layer.shape[3] for layer in cache.layers} == {cache.capacity}
    cache.fit(90)
    assert holds(cache, 1, fill(cache, 1, 0, 90))


def test_a_move_takes_the_sequence_along(cache: KVCache) -> None:
    rows = fill(cache, 1, 0, 6)
    cache.move(1, 0, 6)
    assert holds(cache, 0, rows)
