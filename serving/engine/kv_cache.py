"""Memory: the keys and values of every slot, laid out so that a decode step reads them as they lie.

One buffer per layer, [2 (keys, values), slots + 1, kv_heads, capacity, head_dim], of which a step reads the first slots
whole: a view that is contiguous, since batched products copy any other first, which took longer than the products. So
the capacity follows the longest sequence that runs, up and down. The last slot is nobody's: padding rows write there.
"""

import torch
from torch import Tensor

_GRAIN = 64  # tokens; capacities are multiples


class KVCache:
    """Keys and values of up to `slots` sequences of at most `max_len` tokens."""

    def __init__(
        self, shape: tuple[int, int, int], slots: int, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """`shape` is (layers, kv_heads, head_dim)."""
        layers, self.kv_heads, self.head_dim = shape
        self.spare_slot = slots
        self.max_len = max_len
        self.capacity = min(_GRAIN, max_len)
        size = (2, slots + 1, self.kv_heads, self.capacity, self.head_dim)
        # Zeros, since a masked weight of 0 times a value that was never written must be 0 and not NaN.
        self.layers = [torch.zeros(size, dtype=dtype, device=device) for _ in range(layers)]

    def fit(self, length: int) -> None:
        """Makes room for `length` tokens per slot, the longest there is, and gives back room above twice that.

        Raises RuntimeError where there is no memory; the cache is then empty.

        Growth is by an eighth at least, which bounds the copying to a few per cent of the reading.
        """
        assert length <= self.max_len
        if self.capacity // 2 < length <= self.capacity:
            return
        wanted = max(length, self.capacity + self.capacity // 8) if length > self.capacity else length
        capacity = min(-(-wanted // _GRAIN) * _GRAIN, self.max_len)
        if capacity == self.capacity:
            return
        kept = min(self.capacity, capacity)
        try:
            for i, layer in enumerate(self.layers):
                self.layers[i] = layer.new_zeros((*layer.shape[:3], capacity, self.head_dim))
                self.layers[i][..., :kept, :] = layer[..., :kept, :]
        except RuntimeError:  # no memory: every request ends, and what is in here is nobody's
            self.capacity = min(_GRAIN, self.max_len)
            self.layers = [x.new_zeros((*x.shape[:3], self.capacity, self.head_dim)) for x in self.layers]
            raise
        self.capacity = capacity

    def addresses(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Where the rows of tokens at [T] positions of [T] slots go: [T, 2 · kv_heads], keys first, for `write`."""
        part = torch.arange(2 * self.kv_heads, device=slots.device)
        key_or_value, head = part // self.kv_heads, part % self.kv_heads
        lane = (key_or_value * (self.spare_slot + 1) + slots[:, None]) * self.kv_heads + head
        return lane * self.capacity + positions[:, None]

    def write(self, layer: int, addresses: Tensor, rows: Tensor) -> None:
        """Stores rows [T, 2 · kv_heads, head_dim] at `addresses`."""
        self.layers[layer].view(-1, self.head_dim)[addresses] = rows

    def read(self, layer: int, slots: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `slots` slots as they lie, each [slots · kv_heads, capacity, head_dim]."""
        keys, values = self.layers[layer][:, :slots].flatten(1, 2)
        return keys, values

    def read_slot(self, layer: int, slot: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one slot's first `length` tokens, copied, each [kv_heads, length, head_dim]."""
        keys, values = self.layers[layer][:, slot, :, :length].contiguous()
        return keys, values

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` tokens of one slot to another."""
        for layer in self.layers:
            layer[:, target, :, :length] = layer[:, source, :, :length]
